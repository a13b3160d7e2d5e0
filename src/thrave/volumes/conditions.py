"""In which condition a disk's NTFS volumes were left, for people: dirty, hibernated, with a log that was not closed.

A machine that was shut down fully leaves none of that. It is found in the process of `surveyor.py`, without mounting
anything. What is said is a report; nothing is refused here, that is the caller's business.
"""

from collections.abc import Iterator
from pathlib import Path

from thrave.volumes import locating, surveyor
from thrave.volumes.errors import ComponentMissingError, FileSystemUnsupportedError, SkipRefusedError
from thrave.volumes.partitions import Partition
from thrave.volumes.volume import Volume


def conditions(volume: Volume, path: Path) -> list[str]:
    """Look at every NTFS volume of a disk.

    BitLocker, ReFS, dynamic disks and Storage Spaces do not show their condition, and nothing is said of them.

    Args:
        volume: The disk; it is read from this thread only.
        path: Its file, for the words.

    Returns:
        A sentence, without a full stop, for each thing that is not as a full shutdown leaves it: the volume's offset in
        bytes, and what to do. A volume that contradicts itself or takes too long to be read is one of them, and so is
        one that cannot be looked at, because the library that reads NTFS is not installed. Empty if all is well, or if
        there is no NTFS.

    Raises:
        VolumeError: The disk cannot be read.
    """
    return [f"{path}: {said}" for said in _said(volume)]


def _said(volume: Volume) -> Iterator[str]:
    try:
        places = locating.places(volume)
    except FileSystemUnsupportedError:
        return
    except SkipRefusedError as refusal:
        yield refusal.reason
        return
    for place in places:
        yield from _said_of(volume, place)


def _said_of(volume: Volume, place: Partition) -> Iterator[str]:
    try:
        if locating.is_ntfs(volume, place):
            for condition in surveyor.conditions_in(volume, place):
                yield locating.of(place, condition)
    except FileSystemUnsupportedError:
        return
    except SkipRefusedError as refusal:
        yield locating.of(place, refusal.reason)
    except ComponentMissingError as missing:
        yield locating.of(place, f"it cannot be told whether Windows was shut down fully: {missing}")
