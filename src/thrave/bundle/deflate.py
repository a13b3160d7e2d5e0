"""Gzip in both directions: independent chunks of one member out, any gzip in.

Chunks are deflated each for itself and end on a byte boundary, so that any number of threads can make one single
gzip member, as pigz does; several members are read short by Ruby's and Perl's readers, which old tools use. No thread
is started here.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator

from thrave.bundle.errors import ContentError
from thrave.bundle.zlibs import FAST, Inflater, Library

CHUNK = 1024 * 1024
"""Bytes of the tar stream that are deflated at a time."""

GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\x03"
"""Deflate, no time, no name, made on Unix."""

_LONGEST_STORED = 65535
_BITE = 512 * 1024


def deflated(chunk: memoryview, library: Library) -> bytes:
    """Turn a chunk into raw deflate blocks that end on a byte boundary.

    What does not get smaller is stored, so that a chunk never grows by more than ``most_gzip`` says; stored blocks
    are also inflated three times as fast.
    """
    stream = library.deflater()
    packed = stream.compress(chunk) + stream.flush(zlib.Z_SYNC_FLUSH)
    return packed if len(packed) < len(chunk) else _stored(chunk)


def most_gzip(size: int) -> int:
    """Return the most bytes of gzip that ``size`` bytes in chunks can become, header and trailer included."""
    blocks_per_chunk = -(-CHUNK // _LONGEST_STORED)
    return len(GZIP_HEADER) + size + 5 * blocks_per_chunk * -(-size // CHUNK) + len(gzip_trailer(0, 0))


def gzip_trailer(crc: int, size: int) -> bytes:
    """Return what closes the member: an empty last block, the CRC-32 and the size modulo 2**32."""
    return b"\x03\0" + struct.pack("<II", crc, size & 0xFFFFFFFF)


def inflated(pieces: Iterable[memoryview], library: Library = FAST) -> Iterator[bytes]:
    """Inflate a gzip stream of any number of members into pieces of at most 1 MiB, some of them empty.

    Raises:
        ContentError: it is no gzip, its checksum is wrong, it ends early, or something follows it.
    """
    inflater = library.inflater()
    for bite in _bites(pieces):
        rest: bytes | memoryview = bite
        while rest:
            if inflater.eof:
                inflater = library.inflater()
            yield _inflate(inflater, rest, library)
            rest = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
    while not inflater.eof and (piece := _inflate(inflater, b"", library)):
        yield piece  # ISA-L may have taken all input while there was no room for what it makes
    if not inflater.eof:
        raise ContentError("the gzip stream ends early")


def _inflate(inflater: Inflater, data: bytes | memoryview, library: Library) -> bytes:
    try:
        return inflater.decompress(data, max_length=CHUNK)
    except library.error as error:
        raise ContentError(f"the gzip stream is damaged: {error}") from error


def _bites(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """Cut pieces small: at each call an inflater copies the input that it has not come to."""
    for piece in pieces:
        for start in range(0, len(piece), _BITE):
            yield piece[start : start + _BITE]


def _stored(chunk: memoryview) -> bytes:
    blocks: list[bytes | memoryview] = []
    for start in range(0, len(chunk), _LONGEST_STORED):
        block = chunk[start : start + _LONGEST_STORED]
        blocks += [struct.pack("<BHH", 0, len(block), len(block) ^ 0xFFFF), block]
    return b"".join(blocks)
