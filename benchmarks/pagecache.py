"""Keeps disks in the page cache while a contest is held, so that every contender finds them there, alike.

A page that no process has mapped can be dropped at any time, and virtual machines' are, to give the memory back to the
host: then one contender reads memory, and another the disk. Data are read as any program reads them, so that the kernel
keeps them in large pieces for everybody: what it was told is read at random it keeps page by page, which takes longer.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from extents import data_extents, stored_bytes

_PIECE = 1 << 20  # bytes


@contextmanager
def kept_in_memory(disks: Iterable[Path]) -> Iterator[None]:
    """Read disks and map them, all but those with more data than half of the memory."""
    room = psutil.virtual_memory().total // 2
    with ExitStack() as kept:
        for disk in disks:
            if 0 < stored_bytes(disk) <= room:
                kept.enter_context(_mapped(disk))
        yield


@contextmanager
def _mapped(disk: Path) -> Iterator[None]:
    with disk.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        mapping.madvise(mmap.MADV_RANDOM)
        for start, length in data_extents(disk):
            for offset in range(start, start + length, _PIECE):
                end = min(offset + _PIECE, start + length)
                os.pread(file.fileno(), end - offset, offset)
                mapping[offset : end : mmap.PAGESIZE]  # touched, and thereby mapped
        yield
