"""Where the file systems of a disk are: in its partitions, or, if it has none, the whole of it; and which they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from thrave.volumes import fat, ntfs
from thrave.volumes.errors import FileSystemCorruptError, FileSystemUnsupportedError, SkipRefusedError
from thrave.volumes.partitions import SECTOR, Partition, find_partitions, has_table, read
from thrave.volumes.volume import Volume


class FileSystem(StrEnum):
    """A kind of file system whose condition can be read."""

    NTFS = "NTFS"
    FAT = "FAT"
    EXFAT = "exFAT"


def places(volume: Volume) -> list[Partition]:
    """Where a file system may begin.

    A disk without a partition table is one place. A first sector can be read as a boot sector and as a partition table:
    the table counts if it is consistent, else the file system, if there is a known one.

    Raises:
        SkipRefusedError: It cannot be told for certain.
        VolumeError: The disk cannot be read.
    """
    whole = Partition(0, volume.size)
    if not has_table(read(volume, 0, SECTOR)):
        return [whole]
    try:
        return find_partitions(volume, lambda place: _is_known(volume, place))
    except FileSystemCorruptError:
        if _is_known(volume, whole):
            return [whole]
        raise


def kind_of(volume: Volume, place: Partition) -> FileSystem | None:
    """Which file system is at a place of the disk; None if it is none of those.

    Raises:
        FileSystemUnsupportedError: BitLocker or ReFS.
        VolumeError: The disk cannot be read.
    """
    with about(place):
        sector = read(volume, place.offset, min(ntfs.BOOT_SIZE, place.length))
        if ntfs.is_ntfs(sector):
            return FileSystem.NTFS
        if fat.is_exfat(sector):
            return FileSystem.EXFAT
        found = fat.fat_volume(sector, place.length)
        is_fat = found is not None and fat.is_fat_head(found, fat_head(volume, place, found))
        return FileSystem.FAT if is_fat else None


def fat_head(volume: Volume, place: Partition, found: fat.FatVolume) -> bytes:
    """The beginning of a FAT volume's first table. Raises VolumeError."""
    return read(volume, place.offset + found.table, fat.HEAD_SIZE)


def is_ntfs(volume: Volume, place: Partition) -> bool:
    """Whether there is an NTFS volume at a place of the disk. Raises as `kind_of`."""
    return kind_of(volume, place) is FileSystem.NTFS


def _is_known(volume: Volume, place: Partition) -> bool:
    try:
        return kind_of(volume, place) is not None
    except FileSystemUnsupportedError:
        return True


@contextmanager
def about(place: Partition) -> Iterator[None]:
    """Say which of the disk's volumes a refusal is about."""
    try:
        yield
    except SkipRefusedError as refusal:
        raise type(refusal)(of(place, refusal.reason)) from refusal


def of(place: Partition, reason: str) -> str:
    """Something said of one of the disk's volumes."""
    return f"of the volume at byte {place.offset}, {reason}"
