"""In which condition a disk's volumes were left: clean, unclean, or not checked. There is no fourth answer.

A machine that was shut down leaves its volumes clean. NTFS is read in the process of `surveyor.py`, of FAT and exFAT
the flags that say so, without mounting anything. Whatever is none of these, or cannot be read, was not checked, and is
named. Nothing is refused here, that is the caller's business.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from thrave.volumes import fat, locating, surveyor
from thrave.volumes.errors import (
    ComponentMissingError,
    FileSystemUnsupportedError,
    SandboxUnavailableError,
    SkipRefusedError,
)
from thrave.volumes.locating import FileSystem
from thrave.volumes.partitions import Partition, read
from thrave.volumes.volume import Volume


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


def conditions(volume: Volume) -> list[Finding]:
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
        places = locating.places(volume)
    except SkipRefusedError as refusal:
        yield _of_refusal(refusal, refusal.reason)
        return
    if not places:
        yield _not_checked("it has no partition")
    for place in places:
        yield from _found_at(volume, place)


def _found_at(volume: Volume, place: Partition) -> Iterator[Finding]:
    try:
        kind = locating.kind_of(volume, place)
        if kind is None:
            yield _not_checked(locating.of(place, "no file system is known"))
        elif kind is not FileSystem.NTFS:
            if _is_dirty(volume, place, kind):
                words = f"its {kind} is marked as in use: have the guest check it, and shut it down fully"
                yield Finding(Verdict.UNCLEAN, locating.of(place, words))
        else:
            for condition in surveyor.conditions_in(volume, place):
                yield Finding(Verdict.UNCLEAN, locating.of(place, condition))
    except FileSystemUnsupportedError as refusal:
        # `kind_of` names the place, the surveyor does not.
        prefix = locating.of(place, "")
        yield _not_checked(refusal.reason if refusal.reason.startswith(prefix) else prefix + refusal.reason)
    except SkipRefusedError as refusal:
        yield _of_refusal(refusal, locating.of(place, refusal.reason))
    except ComponentMissingError as missing:
        yield _not_checked(locating.of(place, f"it cannot be told whether Windows was shut down fully: {missing}"))


def _of_refusal(refusal: SkipRefusedError, words: str) -> Finding:
    if isinstance(refusal, FileSystemUnsupportedError | SandboxUnavailableError):
        return _not_checked(words)
    return Finding(Verdict.UNCLEAN, words)


def _not_checked(words: str) -> Finding:
    return Finding(Verdict.NOT_CHECKED, f"not checked whether it is clean: {words}")


def _is_dirty(volume: Volume, place: Partition, kind: FileSystem) -> bool:
    sector = read(volume, place.offset, fat.BOOT_SIZE)
    if kind is FileSystem.EXFAT:
        return fat.is_exfat_dirty(sector)
    found = fat.fat_volume(sector, place.length)
    return found is None or fat.is_fat_dirty(found, locating.fat_head(volume, place, found))
