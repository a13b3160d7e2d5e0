"""In which condition a disk's volumes were left: clean, unclean, or not checked. There is no fourth answer.

A machine that was shut down leaves its volumes clean. NTFS is read in the process of `surveyor.py`, of FAT and exFAT
the flags that say so, without mounting anything. Whatever is none of these, or cannot be read, was not checked, and is
named. Nothing is refused here, that is the caller's business.

A volume without what its NTFS file systems do not use: `skip_unused`.

It stands around any other volume. Free clusters, and the contents of pagefile.sys, hiberfil.sys and swapfile.sys,
become holes; what was a hole stays one; all else is as it was, above all everything outside the file systems: boot
code, other partitions, backup boot sectors, gaps. If any NTFS volume of the disk cannot be surveyed for certain, all is
refused: a bundle from which deleted files are missing only here and there would be believed to hold none.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from thrave.volumes import fat_format, ntfs_sandbox, partitions
from thrave.volumes.base import Extent, Volume, merge_extents
from thrave.volumes.errors import (
    FileSystemUnsupportedError,
    NoFileSystemError,
    SandboxUnavailableError,
    SkipRefusedError,
    ToolNotInstalled,
)
from thrave.volumes.ntfs_sandbox import scan_unused
from thrave.volumes.partitions import FileSystem, Partition, read


class Verdict(StrEnum):
    """What is not a clean volume."""

    UNCLEAN = "unclean"
    NOT_CHECKED = "not checked"


class Finding(NamedTuple):
    """What was found of one of a disk's volumes.

    Attributes:
        verdict: Whether it is unclean, or was not checked.
        words: The volume's offset in bytes, what was found, and what to do: a sentence without a full stop.
    """

    verdict: Verdict
    words: str


def check_unclean(volume: Volume) -> list[Finding]:
    """Check every volume of a disk.

    Args:
        volume: The disk; it is read from this thread only.

    Returns:
        Whatever is not as a full shutdown leaves it, or was not checked. Empty only if every volume is known to be
        clean. A volume that contradicts itself or takes too long to be read is unclean; one of another kind than NTFS,
        FAT and exFAT (BitLocker, ReFS, dynamic disks, Storage Spaces, Linux' file systems) was not checked, nor was one
        for which the library is not installed or cannot be confined.

    Raises:
        VolumeError: The disk cannot be read.
    """
    return list(_found(volume))


def _found(volume: Volume) -> Iterator[Finding]:
    try:
        places = partitions.find_volumes(volume)
    except SkipRefusedError as refusal:
        yield _of_refusal(refusal, refusal.reason)
        return
    if not places:
        yield _not_checked("it has no partition")
    for place in places:
        yield from _found_at(volume, place)


def _found_at(volume: Volume, place: Partition) -> Iterator[Finding]:
    try:
        kind = partitions.kind_of(volume, place)
        if kind is None:
            yield _not_checked(partitions.of(place, "no file system is known"))
        elif kind is not FileSystem.NTFS:
            if _is_dirty(volume, place, kind):
                words = f"its {kind} is marked as in use: have the guest check it, and shut it down fully"
                yield Finding(Verdict.UNCLEAN, partitions.of(place, words))
        else:
            for condition in ntfs_sandbox.scan_problems(volume, place):
                yield Finding(Verdict.UNCLEAN, partitions.of(place, condition))
    except FileSystemUnsupportedError as refusal:
        # `kind_of` names the place, the surveyor does not.
        prefix = partitions.of(place, "")
        yield _not_checked(refusal.reason if refusal.reason.startswith(prefix) else prefix + refusal.reason)
    except SkipRefusedError as refusal:
        yield _of_refusal(refusal, partitions.of(place, refusal.reason))
    except ToolNotInstalled as missing:
        yield _not_checked(partitions.of(place, f"it cannot be told whether Windows was shut down fully: {missing}"))


def _of_refusal(refusal: SkipRefusedError, words: str) -> Finding:
    if isinstance(refusal, FileSystemUnsupportedError | SandboxUnavailableError):
        return _not_checked(words)
    return Finding(Verdict.UNCLEAN, words)


def _not_checked(words: str) -> Finding:
    return Finding(Verdict.NOT_CHECKED, f"not checked whether it is clean: {words}")


def _is_dirty(volume: Volume, place: Partition, kind: FileSystem) -> bool:
    sector = read(volume, place.offset, fat_format.BOOT_SIZE)
    if kind is FileSystem.EXFAT:
        return fat_format.is_exfat_dirty(sector)
    found = fat_format.fat_volume(sector, place.length)
    return found is None or fat_format.is_fat_dirty(found, partitions.fat_head(volume, place, found))


class FilteredVolume:
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
        return merge_extents(list(_without(self._inside.extents(), self._unused)))

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


def exclude_unused(volume: Volume, path: Path) -> FilteredVolume:
    """Survey every NTFS volume of a disk, or of a volume without partitions.

    Args:
        volume: The disk.
        path: Its file, for messages.

    Raises:
        SkipRefusedError: There is none, or one of them cannot be surveyed for certain.
        VolumeError: The disk cannot be read, or the library is not installed.
    """
    try:
        return FilteredVolume(
            volume, [extent for place in _ntfs_volumes(volume) for extent in _surveyed(volume, place)]
        )
    except SkipRefusedError as refusal:
        raise type(refusal)(refusal.reason, path) from refusal


def _ntfs_volumes(volume: Volume) -> list[Partition]:
    found = [place for place in partitions.find_volumes(volume) if partitions.is_ntfs(volume, place)]
    if not found:
        raise NoFileSystemError("there is no NTFS volume on it")
    return found


def _surveyed(volume: Volume, place: Partition) -> list[Extent]:
    with partitions.about(place):
        return scan_unused(volume, place)


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
