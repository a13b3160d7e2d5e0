"""CPU time and memory of reading padding in a bundle from an unknown source. Both must grow linearly with its size.

Each kind of padding is read in two sizes. The test compares the CPU times of both sizes, and compares the larger one
with a valid manifest of the same size.
"""

import gzip
import json
import struct
import time
import tracemalloc
import zlib
from contextlib import suppress

import pytest

from support.bundles.tar_streams import tar_of, with_field
from thrave.bundle.errors import BundleError
from thrave.bundle.gzip_stream import inflate
from thrave.bundle.manifest import read_manifest
from thrave.bundle.side_file import read_side_file
from thrave.bundle.tar_reader import image_runs
from thrave.bundle.tar_writer import TarMember

KIB, MIB = 1024, 1024 * 1024
SMALL, FACTOR = 256 * KIB, 8
TOLERANCE = 3  # factor for caches, garbage collection, and other processes
BASE_MEMORY = 6 * MIB  # bytes of buffers whose size does not depend on the input
MEMORY_PER_BYTE = 12
MAX_COST = 8  # times that of a valid manifest of the same size; skipping bytes one at a time costs 20 times as much


def gunzip(data):
    for _ in inflate(memoryview(data)[at : at + MIB] for at in range(0, len(data), MIB)):
        pass


def untar(data):
    for _ in image_runs((memoryview(data)[at : at + MIB] for at in range(0, len(data), MIB)), 1 << 40):
        pass


def member(data=b"", flags=0, extra=b""):
    """Return a gzip member with optional fields in its header."""
    trailer = struct.pack("<II", zlib.crc32(data), len(data))
    return b"\x1f\x8b\x08" + bytes([flags]) + bytes(6) + extra + zlib.compress(data, wbits=-15) + trailer


def empty_blocks(count):
    blocks = b"\0\0\0\xff\xff" * count
    return member()[:10] + blocks + zlib.compress(b"", wbits=-15) + bytes(8)


GZIP = {
    "name": lambda n: member(flags=8, extra=b"x" * n + b"\0"),
    "comment": lambda n: member(flags=16, extra=b"x" * n + b"\0"),
    "names of many members": lambda n: member(b"x", 8, b"x" * 60_000 + b"\0") * (n // 60_000),
    "extra fields of many members": lambda n: member(b"x", 4, b"\xff\xff" + bytes(65535)) * (n // 65_535),
    "empty members": lambda n: gzip.compress(b"") * (n // 20),
    "members of a byte": lambda n: gzip.compress(b"x") * (n // 21),
    "members of 64 KiB of zeros": lambda n: gzip.compress(bytes(64 * KIB)) * (n // 100),
    "empty blocks": lambda n: empty_blocks(n // 5),
    "garbage after the end": lambda n: member() + b"x" * n,
    "zeros after the end": lambda n: member() + bytes(n),
}


def header(size, kind=b"0"):
    return with_field(with_field(tar_of(b"")[:512], 124, b"%011o\0" % size), 156, kind)


def blocks(data):
    return data + bytes(-len(data) % 512)


def extended(records, kind=b"x"):
    return header(len(records), kind) + blocks(records)


def record(key, value):
    text = b" " + key + b"=" + value + b"\n"
    digits = next(n for n in range(1, 9) if len(str(len(text) + n)) == n)
    return b"%d" % (len(text) + digits) + text


def gnu_map(extents):
    return b"".join(TarMember("disk", 1 << 40, extents).header())


def pax_map(numbers, count):
    records = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"%d" % (1 << 40)}
    lines = b"%d\n" % count + b"".join(b"%d\n" % number for number in numbers)
    return extended(b"".join(map(record, records.keys(), records.values()))) + header(1 << 33) + blocks(lines)


def extents(count, length):
    return [(1024 * at, length) for at in range(count)]


def flat_extents(count, length):
    return [number for extent in extents(count, length) for number in extent]


SIZE = record(b"GNU.sparse.size", b"%d" % (1 << 40))


def number_records(count, length):
    offset, size = b"GNU.sparse.offset", b"GNU.sparse.numbytes"
    return b"".join(record(offset, b"%d" % at) + record(size, b"%d" % n) for at, n in extents(count, length))


def text_map(count, length):
    return record(b"GNU.sparse.map", b",".join(b"%d" % number for number in flat_extents(count, length)))


TAR = {
    "old GNU map": lambda n: gnu_map(extents(n // 24, 512)),
    "old GNU map, empty extents": lambda n: gnu_map(extents(n // 24, 0)),
    "PAX 1.0 map": lambda n: pax_map(flat_extents(n // 12, 512), n // 12),
    "PAX 1.0 map, empty extents": lambda n: pax_map(flat_extents(n // 10, 0), n // 10),
    "PAX 1.0 map, one number": lambda n: pax_map([], 1) + b"9" * n,
    "PAX 0.0 records": lambda n: extended(SIZE + number_records(n // 60, 512)) + header(512),
    "PAX 0.0 records, empty extents": lambda n: extended(SIZE + number_records(n // 60, 0)) + header(512),
    "PAX 0.1 map": lambda n: extended(SIZE + text_map(n // 12, 512)) + header(512),
    "PAX 0.1 map, empty extents": lambda n: extended(SIZE + text_map(n // 10, 0)) + header(512),
    "PAX 0.1 map, one number": lambda n: extended(SIZE + record(b"GNU.sparse.map", b"9" * n)) + header(512),
    "PAX records, all equal": lambda n: extended(b"5 a=\n" * (n // 5)) + header(512),
    "PAX records, all different": lambda n: extended(b"".join(b"13 %07d=x\n"[:13] % i for i in range(n // 13))),
    "PAX record, long": lambda n: extended(record(b"comment", b"x" * n)) + header(512),
    "PAX record, long key": lambda n: extended(record(b"x" * n, b"")) + header(512),
    "PAX record, long length": lambda n: extended(b"1" * n + b" size=5\n") + header(512),
    "long name": lambda n: extended(b"x" * n, b"L") + header(512),
    "long link": lambda n: extended(b"x" * n, b"K") + header(512),
    "global header": lambda n: extended(b"5 a=\n" * (n // 5), b"g") + header(512),
    "many headers": lambda n: extended(b"5 a=\n") * (n // 1024),
}

MANIFEST = (
    "<?xml version='1.0'?><manifest><version>2007-10-10</version><machine_configuration>"
    "<architecture>x86_64</architecture>{machine}</machine_configuration><image><name>x</name>{image}"
    "<digest algorithm='SHA1'>{digest}</digest><size>1</size><bundled_size>1</bundled_size>"
    "<parts count='{count}'>{parts}</parts></image>{end}</manifest>"
)
PART = "<part index='{0}'><filename>x.part.{0}</filename><digest algorithm='SHA1'>{1}</digest></part>"


def manifest(machine="", image="", parts="", count=0, digest="0" * 40, end=""):
    return MANIFEST.format(machine=machine, image=image, parts=parts, count=count, digest=digest, end=end).encode()


def parts(count):
    return manifest(parts="".join(PART.format(i, "0" * 40) for i in range(count)), count=count)


XML = {
    "parts": lambda n: parts(n // 110),
    "empty parts": lambda n: manifest(parts="<part/>" * (n // 7), count=n // 7),
    "parts without texts": lambda n: manifest(parts="<part><filename/><digest/></part>" * (n // 33), count=n // 33),
    "unknown elements, all equal": lambda n: manifest(machine="<a/>" * (n // 4)),
    "unknown elements, all different": lambda n: manifest(machine="".join(f"<a{i:07}/>" for i in range(n // 11))),
    "attributes": lambda n: manifest(machine="<a " + " ".join(f"a{i:07}=''" for i in range(n // 12)) + "/>"),
    "attributes of many elements": lambda n: manifest(
        machine=("<a " + " ".join(f"a{i:04}=''" for i in range(6000)) + "/>") * (n // 54_000)
    ),
    "a long attribute": lambda n: manifest(machine=f"<a a='{'x' * n}'/>"),
    "a long attribute with >": lambda n: manifest(machine=f"<a a='{'>' * n}'/>"),
    "a long tag": lambda n: manifest(machine=f"<{'a' * n}/>"),
    "nested": lambda n: manifest(machine="<a>" * (n // 3)),
    "product codes": lambda n: manifest(machine=f"<product_codes>{'<product_code/>' * (n // 15)}</product_codes>"),
    "ancestors": lambda n: manifest(image=f"<ancestry>{'<ancestor_ami_id/>' * (n // 18)}</ancestry>"),
    "block devices": lambda n: manifest(
        machine=f"<block_device_mapping>{'<mapping/>' * (n // 10)}</block_device_mapping>"
    ),
    "a comment": lambda n: manifest(end=f"<!--{'x' * n}-->"),
    "a comment of markup": lambda n: manifest(end=f"<!--{'<' * n}-->"),
    "comments": lambda n: manifest(end="<!---->" * (n // 7)),
    "comments in a text": lambda n: manifest(digest="0<!---->" * (n // 8)),
    "instructions": lambda n: manifest(end="<?a?>" * (n // 5)),
    "an instruction of markup": lambda n: manifest(end=f"<?a {'<' * n}?>"),
    "CDATA": lambda n: manifest(digest=f"<![CDATA[{'<' * n}]]>"),
    "CDATA sections": lambda n: manifest(digest="<![CDATA[0]]>" * (n // 13)),
    "character references": lambda n: manifest(digest="&#48;" * (n // 5)),
    "a text": lambda n: manifest(digest="0" * n),
    "white space": lambda n: manifest(end=" " * n),
    "white space between comments": lambda n: manifest(end=(" " * 1000 + "<!---->") * (n // 1007)),
    "a document type": lambda n: b"<!DOCTYPE m [" + b"<!ENTITY a 'x'>" * (n // 15) + b"]><manifest/>",
    "no markup": lambda n: b"x" * n,
    "NULs": lambda n: b"<manifest>" + bytes(n),
}


def side(contents):
    rest = ',"publicKey":"' + "A" * 43 + '=","signature":"","keySignature":""}'
    return ('{"contents":' + contents + rest).encode()


def side_parts(count):
    lines = [{"filename": f"x.part.{i}", "size": 1, "sha256": "0" * 64} for i in range(count)]
    return side(json.dumps({"parts": lines}))


JSON = {
    "parts": lambda n: side_parts(n // 130),
    "lists": lambda n: side("{}")[:-1] + b',"x":[' + b"[]," * (n // 3) + b"[]]}",
    "nested lists": lambda n: side("[" * n),
    "deep nesting of few objects": lambda n: side('{"a":' * 900 + '"' + "x" * n + '"' + "}" * 900),
    "objects": lambda n: side("{}")[:-1] + b',"x":[' + b"{}," * (n // 3) + b"{}]}",
    "numbers": lambda n: side('{"x":[' + ",".join(["1000"] * (n // 5)) + "]}"),
    "texts": lambda n: side('{"x":[' + ",".join(['"ab"'] * (n // 5)) + "]}"),
    "digits": lambda n: side(f'{{"x":{"1" * n}}}'),
    "numbers of many digits": lambda n: side('{"x":[' + ",".join(["1" * 4000] * (n // 4000)) + "]}"),
    "base64": lambda n: b'{"contents":{},"publicKey":"' + b"A" * n + b'"}',
    "escapes": lambda n: side('{"x":"' + "\\u0041" * (n // 6) + '"}'),
    "white space": lambda n: side(" " * n + "{}"),
}
PADDINGS = [
    pytest.param(read, make, id=f"{kind}: {name}")
    for kind, read, make_functions in (
        ("gzip", gunzip, GZIP),
        ("tar", untar, TAR),
        ("manifest", read_manifest, XML),
        ("side file", read_side_file, JSON),
    )
    for name, make in make_functions.items()
]


def seconds(read, data):
    """Return the CPU time of reading the data: the least of three measurements, in seconds."""
    measured = []
    for _ in range(3):
        started = time.thread_time()
        with suppress(BundleError):
            read(data)
        measured.append(time.thread_time() - started)
    return min(measured)


def memory(read, data):
    """Return the peak memory of Python objects while the data is read, in bytes."""
    tracemalloc.start()
    try:
        with suppress(BundleError):
            read(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def valid_manifest_cost():
    """CPU time of reading a valid manifest of the larger size."""
    return seconds(read_manifest, parts(FACTOR * SMALL // 110))


@pytest.mark.parametrize(("read", "make"), PADDINGS)
def test_reading_padding_has_linear_cost(read, make, valid_manifest_cost):
    small, large = make(SMALL), make(FACTOR * SMALL)
    cost = seconds(read, large)
    assert cost <= TOLERANCE * FACTOR * max(seconds(read, small), valid_manifest_cost / FACTOR)
    assert cost <= MAX_COST * valid_manifest_cost
    assert memory(read, large) <= BASE_MEMORY + MEMORY_PER_BYTE * len(large)
