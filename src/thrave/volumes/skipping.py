"""A volume without what its NTFS file systems do not use: `skip_unused`.

It stands around any other volume. Free clusters, and the contents of pagefile.sys, hiberfil.sys and swapfile.sys,
become holes; what was a hole stays one; all else is as it was, above all everything outside the file systems: boot
code, other partitions, backup boot sectors, gaps. If any NTFS volume of the disk cannot be surveyed for certain, all is
refused: a bundle from which deleted files are missing only here and there would be believed to hold none.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from thrave.volumes import locating
from thrave.volumes.errors import NoFileSystemError, SkipRefusedError
from thrave.volumes.partitions import Partition
from thrave.volumes.surveyor import unused_in
from thrave.volumes.volume import Extent, Volume, joined


class UsedVolume:
    """The volume inside, but for its unused runs: they are no extents, and they read as zeros.

    Args:
        inside: The volume; closing this one closes it.
        unused: Ascending, not overlapping, within its size.
    """

    def __init__(self, inside: Volume, unused: Sequence[Extent]) -> None:
        self._inside = inside
        self._unused = unused

    @property
    def size(self) -> int:
        """That of the volume inside, in bytes."""
        return self._inside.size

    def extents(self) -> list[Extent]:
        """Its extents, cut where something is unused."""
        return joined(list(_without(self._inside.extents(), self._unused)))

    def will_read(self, offset: int, length: int) -> None:
        """Tell the volume inside."""
        self._inside.will_read(offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read the volume inside, then wipe what is unused: nothing of it ever leaves."""
        self._inside.read_into(offset, buffer)
        end = offset + len(buffer)
        for start, length in _overlapping(self._unused, offset, end):
            first, last = max(start, offset), min(start + length, end)
            buffer[first - offset : last - offset] = bytes(last - first)

    def close(self) -> None:
        """Close the volume inside."""
        self._inside.close()


def without_unused(volume: Volume, path: Path) -> UsedVolume:
    """Survey every NTFS volume of a disk, or of a volume without partitions.

    Args:
        volume: The disk.
        path: Its file, for messages.

    Raises:
        SkipRefusedError: There is none, or one of them cannot be surveyed for certain.
        VolumeError: The disk cannot be read, or the library is not installed.
    """
    try:
        return UsedVolume(volume, [extent for place in _ntfs_volumes(volume) for extent in _surveyed(volume, place)])
    except SkipRefusedError as refusal:
        raise type(refusal)(refusal.reason, path) from refusal


def _ntfs_volumes(volume: Volume) -> list[Partition]:
    found = [place for place in locating.places(volume) if locating.is_ntfs(volume, place)]
    if not found:
        raise NoFileSystemError("there is no NTFS volume on it")
    return found


def _surveyed(volume: Volume, place: Partition) -> list[Extent]:
    with locating.about(place):
        return unused_in(volume, place)


def _without(extents: Sequence[Extent], unused: Sequence[Extent]) -> Iterator[tuple[int, int]]:
    for offset, length in extents:
        start, end = offset, offset + length
        for hole, hole_length in _overlapping(unused, start, end):
            yield start, max(0, hole - start)
            start = max(start, hole + hole_length)
        yield start, max(0, end - start)


def _overlapping(runs: Sequence[Extent], start: int, end: int) -> Iterator[Extent]:
    """Those of the runs that have something in common with [start, end)."""
    first = bisect_right(runs, start, key=lambda run: run.offset) - 1
    for index in range(max(first, 0), len(runs)):
        if runs[index].offset >= end:
            return
        if runs[index].offset + runs[index].length > start:
            yield runs[index]
