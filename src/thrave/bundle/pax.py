"""PAX headers of a bundle's tar member (POSIX.1-2017, pax): what they say about sizes and holes, nothing else.

Members with holes are read in the three formats that GNU tar writes (GNU tar manual, "Sparse Formats"; bsdtar writes
the last): 0.0, a record for each number; 0.1, one record with all numbers; 1.0, decimal numbers on lines in front of
the data.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from thrave.bundle.errors import ContentError
from thrave.bundle.pieces import Pieces
from thrave.bundle.sparsemap import MOST_EXTENTS, SparseMap
from thrave.bundle.tar import BLOCK

MOST_BYTES = 16 * 1024 * 1024
"""Of an extended header: room for a map of 280,000 extents in format 0.0 and of some 900,000 in format 0.1."""

_MOST_RECORDS = 1000  # besides those of a map; a program writes a dozen
_LENGTH = re.compile(rb"([0-9]{1,8}) ")
_KEY = re.compile(rb"[^=\n]{1,1000}=")
_NUMBER = re.compile(rb"([0-9]{1,18})(?:,|\Z)")
_MOST_DIGITS = 18


@dataclass
class PaxHeader:
    """What counts of a member's records.

    Attributes:
        stored: Bytes that the member has in the archive, if a record says so.
        sparse_map: Of a member with holes. In format 1.0 it is empty, until `read_map` has read it.
        map_follows: Whether the map stands in front of the member's data (format 1.0).
    """

    stored: int | None = None
    sparse_map: SparseMap | None = None
    map_follows: bool = False


def read_pax(records: bytes) -> PaxHeader:
    """Read the records of an extended header.

    Raises:
        ContentError: They are damaged or too many, or of a sparse member in an unknown format.
    """
    reader = _Records()
    for key, value in _split(memoryview(records)):
        reader.take(key, value)
    return reader.header()


def read_map(stream: Pieces, sparse_map: SparseMap) -> int:
    """Read the map that stands in front of a sparse member's data.

    Args:
        stream: At the beginning of the member's data.
        sparse_map: Gets the extents.

    Returns:
        Bytes that the map has in the archive, a whole number of blocks.

    Raises:
        ContentError: It is no map, or has more than `MOST_EXTENTS` extents.
    """
    lines = _Lines(stream)
    numbers = iter(lines)
    count = next(numbers)
    if count > MOST_EXTENTS:
        raise ContentError(f"the tar member's map has more than {MOST_EXTENTS} extents")
    sparse_map.extend(islice(numbers, 2 * count))
    return lines.size


class _Records:
    """Collects the records that matter, and none of the others."""

    def __init__(self) -> None:
        self._small: dict[bytes, bytes] = {}
        self._others = 0
        self._map: SparseMap | None = None  # of formats 0.0 and 0.1
        self._offset: int | None = None
        self._has_text_map = False

    def take(self, key: bytes, value: memoryview) -> None:
        if key == b"GNU.sparse.offset" and self._offset is None:
            self._offset = _decimal(bytes(value[: _MOST_DIGITS + 1]))
        elif key == b"GNU.sparse.numbytes" and self._offset is not None:
            self._begun_map().extend((self._offset, _decimal(bytes(value[: _MOST_DIGITS + 1]))))
            self._offset = None
        elif key == b"GNU.sparse.map" and not self._has_text_map:
            self._has_text_map = True
            self._begun_map().extend(_pairs(value))
        elif key in {b"GNU.sparse.offset", b"GNU.sparse.numbytes", b"GNU.sparse.map"}:
            raise ContentError("the map in a PAX header is damaged")
        else:
            self._take_small(key, value)

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
            raise ContentError("a PAX sparse member of another version than 0.0, 0.1 and 1.0")
        if self._map is not None:
            return PaxHeader(stored, self._map)
        return PaxHeader(stored, SparseMap(_decimal(self._small.get(b"GNU.sparse.realsize", b""))), map_follows=True)

    def _take_small(self, key: bytes, value: memoryview) -> None:
        self._others += 1
        if self._others > _MOST_RECORDS:
            raise ContentError(f"a PAX header of more than {_MOST_RECORDS} records")
        if key == b"size" or key.startswith(b"GNU.sparse."):
            self._small[key] = bytes(value[:100])

    def _begun_map(self) -> SparseMap:
        """Return the map; GNU tar, the one program that writes formats 0.0 and 0.1, states the size before it."""
        if self._map is None:
            self._map = SparseMap(_decimal(self._small.get(b"GNU.sparse.size", b"")))
        return self._map

    def _check_end_of_map(self, found: SparseMap) -> None:
        count = self._small.get(b"GNU.sparse.numblocks")
        if self._offset is not None or (count is not None and _decimal(count) != found.entries):
            raise ContentError("the map in a PAX header ends early")


class _Lines:
    """Decimal numbers on lines of their own, in whole blocks.

    Attributes:
        size: Bytes of the blocks that were read.
    """

    def __init__(self, stream: Pieces) -> None:
        self._stream = stream
        self.size = 0

    def __iter__(self) -> Iterator[int]:
        begun = b""
        while len(begun) <= _MOST_DIGITS:
            *lines, begun = (begun + self._stream.exactly(BLOCK)).split(b"\n")
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
    if not value.isdigit() or len(value) > _MOST_DIGITS:
        raise ContentError("a size in a PAX header or map is no number")
    return int(value)
