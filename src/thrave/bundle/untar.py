"""Reads the one member of a bundle's tar stream: where each byte of the image belongs.

A reader of its own, since the stream comes in pieces, may hold terabytes, and is a stranger's: plain, old-GNU sparse
and PAX sparse members with GNU, POSIX or no magic, after long-name or PAX headers if a tool wrote them, with or without
padding. The member's name, mode and owner are never looked at, nothing is ever extracted by name, and the map of a
sparse member is checked whole before the first byte of data is handed on.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from thrave.bundle.errors import ContentError
from thrave.bundle.pax import PaxHeader, read_map, read_pax
from thrave.bundle.pieces import Pieces
from thrave.bundle.tar import BLOCK, MAP_IN_BLOCK, MAP_IN_HEADER

MOST_EXTENTS = 1 << 22
"""In memory they have 16 bytes each. An image of 10 GiB, the most that ec2-ami-tools takes, can have 1.3 million."""

_MOST_HEADER_DATA = 64 * 1024
_MOST_PADDING = 1024 * 1024
_REGULAR = (b"0", b"\0", b"7")
_GNU_MAGIC = b"ustar  \0"


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
    header, pax = _member_header(stream)
    stored = _number(header[124:136]) if pax.stored is None else pax.stored
    extents, real = _extents(stream, header, pax, stored)
    if real != size:
        raise ContentError(f"the image in the tar stream has {real} bytes, the manifest says {size}")
    spans = iter([(0, size)]) if extents is None else _spans(extents)
    for offset, length in spans:
        yield from _run(stream, offset, length)
    _expect_end(stream, -stored % BLOCK)


def _member_header(stream: Pieces) -> tuple[bytes, PaxHeader]:
    """Return the header of the first real member, and what PAX records say of it."""
    pax = PaxHeader()
    for _ in range(8):
        header = stream.exactly(BLOCK)
        _check_sum(header)
        kind = header[156:157]
        if kind in _REGULAR or (kind == b"S" and header[257:265] == _GNU_MAGIC):
            return header, pax
        if kind not in b"LKxg":
            raise ContentError(f"the tar member is of type {kind!r}, not a regular file")
        length = _number(header[124:136])
        if length > _MOST_HEADER_DATA:
            raise ContentError(f"an extended tar header of {length} bytes")
        extended = stream.exactly(length + -length % BLOCK)[:length]
        if kind == b"x":
            pax = read_pax(extended)
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
        digits = field.strip(b" \0")
        if not all(digit in b"01234567" for digit in digits):
            raise ContentError(f"{field!r} in the tar header is no number")
        value = int(digits or b"0", 8)
    if value >= 1 << 63:
        raise ContentError("a number in the tar header is absurd")
    return value


def _extents(stream: Pieces, header: bytes, pax: PaxHeader, stored: int) -> tuple["array[int] | None", int]:
    """Return offset and length by turns, None for a member without holes; and the size of the file."""
    if header[156:157] == b"S":
        flat, real = _gnu_map(stream, header), _number(header[483:495])
        _check_map(flat, stored, real)
        return flat, real
    if pax.sparse_size is not None:
        flat, map_size = read_map(stream, MOST_EXTENTS)
        _check_map(flat, stored - map_size, pax.sparse_size)
        return flat, pax.sparse_size
    return None, stored


def _gnu_map(stream: Pieces, header: bytes) -> "array[int]":
    flat = array("Q")
    block, entries, more = header[386:], MAP_IN_HEADER, header[482]
    while _append(flat, block, entries) and more:
        if len(flat) > 2 * MOST_EXTENTS:
            raise ContentError(f"the tar member's map has more than {MOST_EXTENTS} extents")
        block, entries = stream.exactly(BLOCK), MAP_IN_BLOCK
        more = block[24 * MAP_IN_BLOCK]
    return flat


def _append(flat: "array[int]", block: bytes, entries: int) -> bool:
    """Add a block's entries to the map; say whether all of them were in use."""
    for at in range(0, 24 * entries, 24):
        if not block[at]:
            return False
        flat.extend((_number(block[at : at + 12]), _number(block[at + 12 : at + 24])))
    return True


def _check_map(flat: "array[int]", stored: int, real: int) -> None:
    end = total = 0
    for offset, length in _spans(flat):
        # GNU tar begins each extent on a block of its own, other readers do not: only the image's end may be odd.
        if offset < end or offset + length > real or (length % BLOCK and offset + length != real):
            raise ContentError(f"the tar member's map is wrong at offset {offset}")
        end, total = offset + length, total + length
    if total != stored:
        raise ContentError(f"the tar member's map speaks of {total} bytes, its header of {stored}")


def _spans(flat: "array[int]") -> Iterator[tuple[int, int]]:
    numbers = iter(flat)
    return zip(numbers, numbers, strict=True)


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
