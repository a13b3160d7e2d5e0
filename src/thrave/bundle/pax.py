"""PAX headers of a bundle's tar member (POSIX.1-2017, pax): what they say about sizes and holes, nothing else.

A member with holes is version 1.0 of GNU's format for them (GNU tar manual, "Sparse Formats"), which bsdtar writes,
too: its map stands in front of the data, as decimal numbers, each on a line. The versions 0.0 and 0.1, which GNU tar
writes only if it is told to, are refused.
"""

from array import array
from collections import deque
from dataclasses import dataclass

from thrave.bundle.errors import ContentError
from thrave.bundle.pieces import Pieces
from thrave.bundle.tar import BLOCK

_SPARSE = b"GNU.sparse."
_MOST_DIGITS = 18


@dataclass(frozen=True)
class PaxHeader:
    """What counts of a member's records.

    Attributes:
        stored: bytes that the member has in the archive, if that is said here.
        sparse_size: bytes of the file, holes included, if it has some; a map stands in front of its data then.
    """

    stored: int | None = None
    sparse_size: int | None = None


def read_pax(records: bytes) -> PaxHeader:
    """Read the records of an extended header.

    Raises:
        ContentError: they are damaged, or of a sparse member in another version.
    """
    found: dict[bytes, bytes] = {}
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or not len(length) < int(length[:6]) <= len(records):
            raise ContentError("a PAX header of the tar stream is damaged")
        key, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key] = value
        records = records[int(length) :]
    size = found.get(b"size")
    return PaxHeader(None if size is None else _decimal(size), _sparse_size(found))


def read_map(stream: Pieces, most: int) -> tuple["array[int]", int]:
    """Read the map that stands in front of a sparse member's data.

    Returns:
        Offset and length of each extent by turns, not checked, and the bytes that the map has in the archive.

    Raises:
        ContentError: it is no map, or has more than `most` extents.
    """
    numbers = _Decimals(stream)
    count = numbers.take()
    if count > most:
        raise ContentError(f"the tar member's map has more than {most} extents")
    return array("Q", (numbers.take() for _ in range(2 * count))), numbers.size


class _Decimals:
    """Decimal numbers on lines of their own, in whole blocks.

    Attributes:
        size: bytes of the blocks that were read.
    """

    def __init__(self, stream: Pieces) -> None:
        self._stream = stream
        self._lines: deque[bytes] = deque()
        self._begun = b""
        self.size = 0

    def take(self) -> int:
        """Return the next one."""
        while not self._lines:
            self._read_block()
        return _decimal(self._lines.popleft())

    def _read_block(self) -> None:
        if len(self._begun) > _MOST_DIGITS:
            raise ContentError("the map of a PAX sparse member is damaged")
        *lines, self._begun = (self._begun + self._stream.exactly(BLOCK)).split(b"\n")
        self._lines.extend(lines)
        self.size += BLOCK


def _sparse_size(found: dict[bytes, bytes]) -> int | None:
    if not any(key.startswith(_SPARSE) for key in found):
        return None
    if (found.get(b"GNU.sparse.major"), found.get(b"GNU.sparse.minor")) != (b"1", b"0"):
        raise ContentError("a PAX sparse member of another version than 1.0")
    return _decimal(found.get(b"GNU.sparse.realsize", b""))


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > _MOST_DIGITS:
        raise ContentError("a size in a PAX header or map is no number")
    return int(value)
