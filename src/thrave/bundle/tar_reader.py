"""Reads the one member of a bundle's tar stream: the offset of each byte in the image.

The stream arrives in pieces, may have terabytes and is not trusted, so no library reads it. Accepted are plain, old-GNU
sparse and PAX sparse members (formats 0.0, 0.1 and 1.0 of the GNU tar manual, "Sparse Formats") with GNU, POSIX or no
magic, with or without long-name or PAX headers and padding. Name, mode and owner are ignored; nothing is extracted by
name. The map of a sparse member is checked completely before any data is passed on.
"""

import re
import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from thrave.bundle.errors import ContentError
from thrave.bundle.gzip_stream import PieceReader
from thrave.bundle.tar_writer import BLOCK, MAP_IN_BLOCK, MAP_IN_HEADER

MAX_MAP_EXTENTS = 1 << 22
"""Each needs 16 bytes of memory. An image of 10 GiB, the maximum of ec2-ami-tools, can have 1.3 million."""


_MAX_EMPTY = 16  # GNU tar and bsdtar write one, at the end of the file


class SparseMap:
    """The map of a sparse member: extents of data in ascending order. Each is checked as it is read.

    Args:
        size: Bytes of the file, including holes.

    Attributes:
        size: The same.
        data_size: Bytes of all extents together.
        entries: Extents that were read, including empty ones.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.data_size = 0
        self.entries = 0
        self._flat = array("Q")
        self._end = 0
        self._empty = 0

    def extend(self, numbers: Iterable[int]) -> None:
        """Add extents, given as alternating offsets and lengths in bytes. Empty extents are not stored.

        Raises:
            ContentError: An extent overlaps or precedes the one before, or ends beyond the file. A length is not whole
                blocks, although the file does not end there. There are too many extents, or empty extents.
        """
        pairs = iter(numbers)
        for offset, length in zip(pairs, pairs, strict=True):
            end = offset + length
            # GNU tar starts each extent at a new block, other readers do not: only the file may end inside a block.
            if offset < self._end or end > self.size or (length % BLOCK and end != self.size):
                raise ContentError(f"the tar member's map is wrong at offset {offset}")
            self.entries += 1
            if not length:
                self._empty += 1
            else:
                self._flat.append(offset)
                self._flat.append(length)
                self._end = end
                self.data_size += length
            if self._empty > _MAX_EMPTY or self.entries > MAX_MAP_EXTENTS:
                raise ContentError(f"the tar member's map has more than {self.entries - 1} extents, or empty ones")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield offset and length of each extent."""
        numbers = iter(self._flat)
        return zip(numbers, numbers, strict=True)


MAX_PAX_BYTES = 16 * 1024 * 1024
"""Maximum size of a PAX header: a map of 280,000 extents in format 0.0, or about 900,000 in format 0.1."""


_MAX_RECORDS = 1000  # without those of a map; programs write about a dozen


_LENGTH = re.compile(rb"([0-9]{1,8}) ")


_KEY = re.compile(rb"[^=\n]{1,1000}=")


_NUMBER = re.compile(rb"([0-9]{1,18})(?:,|\Z)")


_MAX_DIGITS = 18


@dataclass
class PaxHeader:
    """The PAX records of a member that matter here.

    Attributes:
        stored: Bytes of the member in the archive, if a record states them.
        sparse_map: Of a member with holes. In format 1.0 it is empty until `read_map` fills it.
        map_follows: Whether the map precedes the data of the member (format 1.0).
    """

    stored: int | None = None
    sparse_map: SparseMap | None = None
    map_follows: bool = False


def read_pax(records: bytes) -> PaxHeader:
    """Parse the records of a PAX header.

    Raises:
        ContentError: They are damaged or too many, or describe a sparse member in an unknown format.
    """
    reader = _Records()
    for key, value in _split(memoryview(records)):
        reader.add(key, value)
    return reader.header()


def read_map(stream: PieceReader, sparse_map: SparseMap) -> int:
    """Read the map that precedes the data of a sparse member (format 1.0).

    Args:
        stream: At the beginning of the member's data.
        sparse_map: Receives the extents.

    Returns:
        Bytes of the map in the archive, a whole number of blocks.

    Raises:
        ContentError: Not a map, or more than `MAX_MAP_EXTENTS` extents.
    """
    lines = _Lines(stream)
    numbers = iter(lines)
    count = next(numbers)
    if count > MAX_MAP_EXTENTS:
        raise ContentError(f"the tar member's map has more than {MAX_MAP_EXTENTS} extents")
    sparse_map.extend(islice(numbers, 2 * count))
    return lines.size


class _Records:
    """Collects the records that matter; ignores the others."""

    def __init__(self) -> None:
        self._small: dict[bytes, bytes] = {}
        self._others = 0
        self._map: SparseMap | None = None  # of formats 0.0 and 0.1
        self._offset: int | None = None
        self._has_text_map = False

    def add(self, key: bytes, value: memoryview) -> None:
        if key == b"GNU.sparse.offset" and self._offset is None:
            self._offset = _decimal(bytes(value[: _MAX_DIGITS + 1]))
        elif key == b"GNU.sparse.numbytes" and self._offset is not None:
            self._started_map().extend((self._offset, _decimal(bytes(value[: _MAX_DIGITS + 1]))))
            self._offset = None
        elif key == b"GNU.sparse.map" and not self._has_text_map:
            self._has_text_map = True
            self._started_map().extend(_pairs(value))
        elif key in {b"GNU.sparse.offset", b"GNU.sparse.numbytes", b"GNU.sparse.map"}:
            raise ContentError("the map in a PAX header is damaged")
        else:
            self._add_small(key, value)

    def header(self) -> PaxHeader:
        size = self._small.get(b"size")
        stored = None if size is None else _decimal(size)
        version = self._small.get(b"GNU.sparse.major"), self._small.get(b"GNU.sparse.minor")
        if self._map is not None:
            self._check_end_of_map(self._map)
            known = version in {(None, None), (b"0", b"0"), (b"0", b"1")}
        elif any(key.startswith(b"GNU.sparse.") for key in self._small):
            known = version == (b"1", b"0")
        else:
            return PaxHeader(stored)
        if not known:
            raise ContentError("a PAX sparse member of an unknown format; known are 0.0, 0.1 and 1.0")
        if self._map is not None:
            return PaxHeader(stored, self._map)
        return PaxHeader(stored, SparseMap(_decimal(self._small.get(b"GNU.sparse.realsize", b""))), map_follows=True)

    def _add_small(self, key: bytes, value: memoryview) -> None:
        self._others += 1
        if self._others > _MAX_RECORDS:
            raise ContentError(f"a PAX header of more than {_MAX_RECORDS} records")
        if key == b"size" or key.startswith(b"GNU.sparse."):
            self._small[key] = bytes(value[:100])

    def _started_map(self) -> SparseMap:
        """Return the map. GNU tar, the only program that writes formats 0.0 and 0.1, writes the size before the map."""
        if self._map is None:
            self._map = SparseMap(_decimal(self._small.get(b"GNU.sparse.size", b"")))
        return self._map

    def _check_end_of_map(self, found: SparseMap) -> None:
        count = self._small.get(b"GNU.sparse.numblocks")
        if self._offset is not None or (count is not None and _decimal(count) != found.entries):
            raise ContentError("the map in a PAX header ends early")


class _Lines:
    """Decimal numbers, one per line, in whole blocks.

    Attributes:
        size: Bytes of the blocks that were read.
    """

    def __init__(self, stream: PieceReader) -> None:
        self._stream = stream
        self.size = 0

    def __iter__(self) -> Iterator[int]:
        incomplete = b""
        while len(incomplete) <= _MAX_DIGITS:
            *lines, incomplete = (incomplete + self._stream.read_exactly(BLOCK)).split(b"\n")
            self.size += BLOCK
            for line in lines:
                yield _decimal(line)
        raise ContentError("the map of a PAX sparse member is damaged")


def _split(records: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield key and value of each record; each length is checked before it is used."""
    at = 0
    while at < len(records):
        prefix = _LENGTH.match(records, at)
        end = at + int(prefix[1]) if prefix else 0
        key = _KEY.match(records, prefix.end()) if prefix else None
        if key is None or not key.end() < end <= len(records) or records[end - 1] != ord("\n"):
            raise ContentError("a PAX header of the tar stream is damaged")
        yield key[0][:-1], records[key.end() : end - 1]
        at = end


def _pairs(value: memoryview) -> Iterator[int]:
    at = count = 0
    while at < len(value):
        number = _NUMBER.match(value, at)
        if number is None:
            break
        at, count = number.end(), count + 1
        yield int(number[1])
    if at != len(value) or count % 2:
        raise ContentError("the map in a PAX header is damaged")


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > _MAX_DIGITS:
        raise ContentError("a size in a PAX header or map is not a number")
    return int(value)


_MAX_HEADER_DATA = 64 * 1024


_MAX_PADDING = 1024 * 1024


_REGULAR = (b"0", b"\0", b"7")


_GNU_MAGIC = b"ustar  \0"


_FIELDS_IN_HEADER = struct.Struct("12s" * 2 * MAP_IN_HEADER)


_FIELDS_IN_BLOCK = struct.Struct("12s" * 2 * MAP_IN_BLOCK)


class ImageRun(NamedTuple):
    """Bytes of the image and their offset."""

    offset: int
    data: memoryview


def image_runs(pieces: Iterable[bytes | memoryview], size: int) -> Iterator[ImageRun]:
    """Yield the data of the image in ascending order; all other bytes are holes. Consumes the whole stream.

    Args:
        pieces: The tar stream.
        size: Bytes of the image according to the manifest.

    Raises:
        ContentError: Not a tar stream with one regular member of that size, or the map is wrong.
    """
    stream = PieceReader(pieces, "tar stream")
    header, records = _member_header(stream)
    stored = _number(header[124:136]) if records.stored is None else records.stored
    sparse_map = _sparse_map(stream, header, records, stored)
    real_size = stored if sparse_map is None else sparse_map.size
    if real_size != size:
        raise ContentError(f"the image in the tar stream has {real_size} bytes; the manifest states {size}")
    for offset, length in [(0, size)] if sparse_map is None else sparse_map:
        yield from _run(stream, offset, length)
    _expect_end(stream, -stored % BLOCK)


def _member_header(stream: PieceReader) -> tuple[bytes, PaxHeader]:
    """Return the header of the first regular member, and its PAX records."""
    records = PaxHeader()
    for _ in range(8):
        header = stream.read_exactly(BLOCK)
        _check_checksum(header)
        kind = header[156:157]
        if kind in _REGULAR or (kind == b"S" and header[257:265] == _GNU_MAGIC):
            return header, records
        if kind not in b"LKxg":
            raise ContentError(f"the tar member is of type {kind!r}, not a regular file")
        length = _number(header[124:136])
        if length > (MAX_PAX_BYTES if kind == b"x" else _MAX_HEADER_DATA):
            raise ContentError(f"an extended tar header of {length} bytes")
        extended = stream.read_exactly(length)
        stream.read_exactly(-length % BLOCK)
        if kind == b"x" and records != PaxHeader():
            raise ContentError("a second PAX header of one tar member")
        if kind == b"x":
            records = read_pax(extended)
    raise ContentError("the tar stream has too many extended headers")


def _check_checksum(header: bytes) -> None:
    expected = _number(header[148:156])
    if expected != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise ContentError("the decompressed data is not a tar stream (header checksum)")


def _number(field: bytes) -> int:
    """Parse an octal or base-256 field."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        digits = field.strip(b" \0") or b"0"
        if not digits.isdigit() or b"8" in digits or b"9" in digits:
            raise ContentError(f"{field!r} in the tar header is not a number")
        value = int(digits, 8)
    if value >= 1 << 63:
        raise ContentError("a number in the tar header is too large")
    return value


def _sparse_map(stream: PieceReader, header: bytes, records: PaxHeader, stored: int) -> SparseMap | None:
    """Return the map of a sparse member, None for a member without holes.

    Args:
        stream: After the header; a map before the data is read from it.
        header: Of the member.
        records: Its PAX records.
        stored: Bytes of the member in the archive, including a map before the data.
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
        raise ContentError(f"the tar member's map has {sparse_map.data_size} bytes of data, its header {stored}")
    return sparse_map


def _gnu_map(stream: PieceReader, header: bytes) -> Iterator[int]:
    """Yield the numbers of an old-GNU map. An entry that begins with NUL ends it."""
    fields, more = _FIELDS_IN_HEADER.unpack_from(header, 386), header[482]
    while True:
        for offset, length in zip(fields[::2], fields[1::2], strict=True):
            if not offset[0]:
                return
            yield _number(offset)
            yield _number(length)
        if not more:
            return
        block = stream.read_exactly(BLOCK)
        fields, more = _FIELDS_IN_BLOCK.unpack_from(block), block[24 * MAP_IN_BLOCK]


def _run(stream: PieceReader, offset: int, length: int) -> Iterator[ImageRun]:
    end = offset + length
    while offset < end:
        data = stream.read_some(end - offset)
        if not data:
            raise ContentError("the tar stream ends within the image")
        yield ImageRun(offset, data)
        offset += len(data)


def _expect_end(stream: PieceReader, padding: int) -> None:
    """Consume the remaining zeros: of the last block, the end of the archive, and the padding of the record."""
    remaining = padding + _MAX_PADDING
    while piece := stream.read_some(remaining + 1):
        remaining -= len(piece)
        if remaining < 0 or any(piece):
            raise ContentError("the tar stream has data after the image")
