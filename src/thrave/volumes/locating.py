"""Where the NTFS volumes of a disk are: in its partitions, or, if it has none, the whole of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from thrave.volumes import ntfs
from thrave.volumes.errors import SkipRefusedError
from thrave.volumes.partitions import Partition, find_partitions, read
from thrave.volumes.volume import Volume


def places(volume: Volume) -> list[Partition]:
    """Where a file system may begin.

    Raises:
        SkipRefusedError: It cannot be told for certain.
        VolumeError: The disk cannot be read.
    """
    whole = Partition(0, volume.size)
    return [whole] if is_ntfs(volume, whole) else find_partitions(volume)


def is_ntfs(volume: Volume, place: Partition) -> bool:
    """Whether there is an NTFS volume at a place of the disk.

    Raises:
        FileSystemUnsupportedError: BitLocker or ReFS.
        VolumeError: The disk cannot be read.
    """
    with about(place):
        return ntfs.is_ntfs(read(volume, place.offset, ntfs.BOOT_SIZE))


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
