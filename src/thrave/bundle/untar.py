"""Reads the one member of a bundle's tar stream: where each byte of the image belongs.

A reader of its own, since the stream comes in pieces, may hold terabytes, and is a stranger's: plain, old-GNU sparse
and PAX sparse members with GNU, POSIX or no magic, after long-name or PAX headers if a tool wrote them, with or without
padding. The member's name, mode and owner are never looked at, nothing is ever extracted by name, and the map of a
sparse member is checked whole before the first byte of data is handed on.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from thrave.bundle import pax
from thrave.bundle.errors import ContentError
from thrave.bundle.pax import PaxHeader, read_map, read_pax
from thrave.bundle.pieces import Pieces
from thrave.bundle.sparsemap import SparseMap
from thrave.bundle.tar import BLOCK, MAP_IN_BLOCK, MAP_IN_HEADER

_MOST_HEADER_DATA = 64 * 1024
_MOST_PADDING = 1024 * 1024
_REGULAR = (b"0", b"\0", b"7")
_GNU_MAGIC = b"ustar  \0"
_FIELDS_IN_HEADER = struct.Struct("12s" * 2 * MAP_IN_HEADER)
_FIELDS_IN_BLOCK = struct.Struct("12s" * 2 * MAP_IN_BLOCK)


class Run(NamedTuple):
    """Bytes of the image and where they belong."""

    offset: int
    data: memoryview


def image_runs(pieces: Iterable[bytes | memoryview], size: int) -> Iterator[Run]:
    """Yield the data of the image in ascending order; what is never mentioned is a hole.

    The stream is consumed to its end.

    Args:
        pieces: the tar stream.
        size: bytes of the image as the manifest says.

    Raises:
        ContentError: it is no tar with one regular member of that size, or its map is wrong.
    """
    stream = Pieces(pieces, "tar stream")
    header, records = _member_header(stream)
    stored = _number(header[124:136]) if records.stored is None else records.stored
    sparse_map = _sparse_map(stream, header, records, stored)
    real = stored if sparse_map is None else sparse_map.size
    if real != size:
        raise ContentError(f"the image in the tar stream has {real} bytes, the manifest says {size}")
    for offset, length in [(0, size)] if sparse_map is None else sparse_map:
        yield from _run(stream, offset, length)
    _expect_end(stream, -stored % BLOCK)


def _member_header(stream: Pieces) -> tuple[bytes, PaxHeader]:
    """Return the header of the first real member, and what PAX records say of it."""
    records = PaxHeader()
    for _ in range(8):
        header = stream.exactly(BLOCK)
        _check_sum(header)
        kind = header[156:157]
        if kind in _REGULAR or (kind == b"S" and header[257:265] == _GNU_MAGIC):
            return header, records
        if kind not in b"LKxg":
            raise ContentError(f"the tar member is of type {kind!r}, not a regular file")
        length = _number(header[124:136])
        if length > (pax.MOST_BYTES if kind == b"x" else _MOST_HEADER_DATA):
            raise ContentError(f"an extended tar header of {length} bytes")
        extended = stream.exactly(length)
        stream.exactly(-length % BLOCK)
        if kind == b"x" and records != PaxHeader():
            raise ContentError("a second PAX header of one tar member")
        if kind == b"x":
            records = read_pax(extended)
    raise ContentError("the tar stream has too many extended headers")


def _check_sum(header: bytes) -> None:
    expected = _number(header[148:156])
    if expected != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise ContentError("what was deciphered and inflated is no tar stream (header checksum)")


def _number(field: bytes) -> int:
    """Return an octal or base-256 field as tar writes them."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        digits = field.strip(b" \0") or b"0"
        if not digits.isdigit() or b"8" in digits or b"9" in digits:
            raise ContentError(f"{field!r} in the tar header is no number")
        value = int(digits, 8)
    if value >= 1 << 63:
        raise ContentError("a number in the tar header is absurd")
    return value


def _sparse_map(stream: Pieces, header: bytes, records: PaxHeader, stored: int) -> SparseMap | None:
    """Return the map of a sparse member, None for a member without holes.

    Args:
        stream: Behind the header; a map that follows is read from it.
        header: The member's.
        records: What its PAX header says.
        stored: Bytes of the member in the archive, a map in front of its data included.
    """
    sparse_map = records.sparse_map
    if header[156:157] == b"S":
        sparse_map = SparseMap(_number(header[483:495]))
        sparse_map.extend(_gnu_map(stream, header))
    elif sparse_map is None:
        return None
    elif records.map_follows:
        stored -= read_map(stream, sparse_map)
    if sparse_map.data_size != stored:
        raise ContentError(f"the tar member's map speaks of {sparse_map.data_size} bytes, its header of {stored}")
    return sparse_map


def _gnu_map(stream: Pieces, header: bytes) -> Iterator[int]:
    """Yield the numbers of an old-GNU map; an entry that begins with NUL, and whatever follows it, is not in use."""
    fields, more = _FIELDS_IN_HEADER.unpack_from(header, 386), header[482]
    while True:
        for offset, length in zip(fields[::2], fields[1::2], strict=True):
            if not offset[0]:
                return
            yield _number(offset)
            yield _number(length)
        if not more:
            return
        block = stream.exactly(BLOCK)
        fields, more = _FIELDS_IN_BLOCK.unpack_from(block), block[24 * MAP_IN_BLOCK]


def _run(stream: Pieces, offset: int, length: int) -> Iterator[Run]:
    end = offset + length
    while offset < end:
        data = stream.some(end - offset)
        if not data:
            raise ContentError("the tar stream ends within the image")
        yield Run(offset, data)
        offset += len(data)


def _expect_end(stream: Pieces, padding: int) -> None:
    """Consume the rest, which is zeros: the last block's, the end of the archive, the padding of its record."""
    left = padding + _MOST_PADDING
    while piece := stream.some(left + 1):
        left -= len(piece)
        if left < 0 or any(piece):
            raise ContentError("something follows the image in the tar stream")
