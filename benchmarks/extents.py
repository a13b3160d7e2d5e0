"""Where a file has data: what its file system has stored, by SEEK_DATA and SEEK_HOLE (lseek(2)).

Reading, copying and comparing by extents costs nothing for holes, so that it works for disks of terabytes.
"""

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

_PIECE = 1 << 20  # bytes


def data_extents(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and length in bytes of each stretch of data."""
    with path.open("rb") as file:
        size, end = os.fstat(file.fileno()).st_size, 0
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: only holes from here on
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, end - start


def stored_bytes(path: Path) -> int:
    """Bytes of data."""
    return sum(length for _, length in data_extents(path))


def copy_data(source: Path, target: Path, shift: int) -> None:
    """Copy the data, and only that, into a file that is there, `shift` bytes further on; what falls off is left out."""
    with source.open("rb") as read, target.open("rb+") as write:
        for start, length in _pieces(data_extents(source)):
            if start + shift >= 0:
                os.pwrite(write.fileno(), os.pread(read.fileno(), length, start), start + shift)


def are_equal(one: Path, other: Path) -> bool:
    """Whether two files have the same bytes; only what is data in at least one of them is read."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        return all(
            os.pread(first.fileno(), length, start) == os.pread(second.fileno(), length, start)
            for start, length in _pieces(chain(data_extents(one), data_extents(other)))
        )


def _pieces(extents: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for offset, length in extents:
        for start in range(offset, offset + length, _PIECE):
            yield start, min(_PIECE, offset + length - start)
