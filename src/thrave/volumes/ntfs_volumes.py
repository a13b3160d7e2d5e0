"""Leaves out what the NTFS volumes of a disk do not use, and finds volumes that were not unmounted. Mounts nothing.

NTFS is read in a confined process (`ntfs_sandbox`); of FAT and exFAT only the flags that record the state are read.
Whether an unclean volume is an error is decided by the caller.
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
from thrave.volumes.partitions import FileSystem, Partition


class Verdict(StrEnum):
    """Why a volume is reported."""

    UNCLEAN = "unclean"
    NOT_CHECKED = "not checked"


class UncleanVolume(NamedTuple):
    """A volume of a disk that is not known to be clean.

    Attributes:
        verdict: Whether it is unclean, or was not checked.
        message: The volume's offset in bytes, what was found, and what to do: a sentence without a full stop.
    """

    verdict: Verdict
    message: str


def find_unclean(volume: Volume) -> list[UncleanVolume]:
    """Check every volume of a disk; a full shutdown leaves all of them clean.

    Args:
        volume: The disk; it is read from this thread only.

    Returns:
        Every volume that is unclean or was not checked; empty only if every volume is known to be clean. A volume that
        contradicts itself, or takes too long to read, is unclean. Not checked: kinds other than NTFS, FAT and exFAT
        (BitLocker, ReFS, dynamic disks, Storage Spaces, file systems of Linux), and NTFS if pytsk3 is not installed or
        cannot be confined.

    Raises:
        VolumeError: The disk cannot be read.
    """
    try:
        found = partitions.find_volumes(volume)
    except SkipRefusedError as refusal:
        return [_from_refusal(refusal, refusal.reason)]
    if not found:
        return [_not_checked("it has no partition")]
    return [problem for partition in found for problem in _check_volume(volume, partition)]


def _check_volume(volume: Volume, partition: Partition) -> Iterator[UncleanVolume]:
    try:
        kind = partitions.detect_file_system(volume, partition)
        if kind is None:
            yield _not_checked(partitions.locate(partition, "no file system is known"))
        elif kind is not FileSystem.NTFS:
            if _is_dirty(volume, partition, kind):
                message = f"its {kind} is marked as in use: have the guest check it, and shut it down fully"
                yield UncleanVolume(Verdict.UNCLEAN, partitions.locate(partition, message))
        else:
            for problem in ntfs_sandbox.scan_problems(volume, partition):
                yield UncleanVolume(Verdict.UNCLEAN, partitions.locate(partition, problem))
    except FileSystemUnsupportedError as refusal:
        # Errors of `detect_file_system` have the location already, errors of `ntfs_sandbox` do not.
        prefix = partitions.locate(partition, "")
        yield _not_checked(refusal.reason if refusal.reason.startswith(prefix) else prefix + refusal.reason)
    except SkipRefusedError as refusal:
        yield _from_refusal(refusal, partitions.locate(partition, refusal.reason))
    except ToolNotInstalled as error:
        message = f"whether Windows was shut down fully is unknown: {error}"
        yield _not_checked(partitions.locate(partition, message))


def _from_refusal(refusal: SkipRefusedError, message: str) -> UncleanVolume:
    if isinstance(refusal, FileSystemUnsupportedError | SandboxUnavailableError):
        return _not_checked(message)
    return UncleanVolume(Verdict.UNCLEAN, message)


def _not_checked(message: str) -> UncleanVolume:
    return UncleanVolume(Verdict.NOT_CHECKED, f"not checked whether it is clean: {message}")


def _is_dirty(volume: Volume, partition: Partition, kind: FileSystem) -> bool:
    sector = partitions.read_bytes(volume, partition.offset, fat_format.BOOT_SIZE)
    if kind is FileSystem.EXFAT:
        return fat_format.is_exfat_dirty(sector)
    fat = fat_format.parse_fat(sector, partition.length)
    return fat is None or fat_format.is_fat_dirty(fat, partitions.read_fat_head(volume, partition, fat))


class FilteredVolume:
    """A volume without its unused ranges: they are not in its extents, and read as zeros.

    Args:
        inside: The volume; it is closed together with this one.
        unused: Ascending, not overlapping, within its size.
    """

    def __init__(self, inside: Volume, unused: Sequence[Extent]) -> None:
        self._inside = inside
        self._unused = unused
        self.prefetch = inside.prefetch
        self.close = inside.close

    @property
    def size(self) -> int:
        """Size of the volume inside, in bytes."""
        return self._inside.size

    def extents(self) -> list[Extent]:
        """Return the extents of the volume inside without the unused ranges."""
        return merge_extents(list(_subtract(self._inside.extents(), self._unused)))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read the volume inside, then overwrite unused ranges with zeros: their content must not be in a bundle."""
        self._inside.read_into(offset, buffer)
        end = offset + len(buffer)
        for start, length in _find_overlapping(self._unused, offset, end):
            first, last = max(start, offset), min(start + length, end)
            buffer[first - offset : last - offset] = bytes(last - first)


def exclude_unused(volume: Volume, path: Path) -> FilteredVolume:
    """Return a disk without what its NTFS volumes do not use.

    Free clusters, and the contents of pagefile.sys, hiberfil.sys and swapfile.sys, become holes. Existing holes stay,
    and everything else is unchanged, in particular what is outside of file systems: boot code, other partitions, backup
    boot sectors, gaps. If one NTFS volume cannot be scanned reliably, the disk is refused: a user would assume that a
    bundle without unused space contains no deleted file.

    Args:
        volume: The disk, with or without partitions.
        path: Its file, for messages.

    Raises:
        SkipRefusedError: It has no NTFS volume, or one that cannot be scanned reliably.
        VolumeError: The disk cannot be read, or pytsk3 is not installed.
    """
    unused: list[Extent] = []
    try:
        found = [
            partition
            for partition in partitions.find_volumes(volume)
            if partitions.detect_file_system(volume, partition) is FileSystem.NTFS
        ]
        if not found:
            raise NoFileSystemError("there is no NTFS volume on it")
        for partition in found:
            with partitions.located_errors(partition):
                unused += ntfs_sandbox.scan_unused(volume, partition)
    except SkipRefusedError as refusal:
        raise type(refusal)(refusal.reason, path) from refusal
    return FilteredVolume(volume, unused)


def _subtract(extents: Sequence[Extent], unused: Sequence[Extent]) -> Iterator[tuple[int, int]]:
    for offset, length in extents:
        start, end = offset, offset + length
        for hole, hole_length in _find_overlapping(unused, start, end):
            yield start, max(0, hole - start)
            start = max(start, hole + hole_length)
        yield start, max(0, end - start)


def _find_overlapping(runs: Sequence[Extent], start: int, end: int) -> Iterator[Extent]:
    """Yield the runs that overlap [start, end)."""
    first = bisect_right(runs, start, key=lambda run: run.offset) - 1
    for index in range(max(first, 0), len(runs)):
        if runs[index].offset >= end:
            return
        if runs[index].offset + runs[index].length > start:
            yield runs[index]
