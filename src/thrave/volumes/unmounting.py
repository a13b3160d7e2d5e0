"""How an NTFS volume was left: whether it was unmounted, and whether Windows sleeps on it. Nothing is mended.

The signs are those by which ntfs-3g refuses to write to a volume: a flag in $Volume, restart pages of $LogFile that
were not closed, a memory image in hiberfil.sys. That file is looked for in $MFT itself, by name: neither folders nor
other files are read, so that it takes no more than reading $MFT once.
"""

from collections.abc import Iterator
from functools import partial

from thrave.volumes import filesystem, ntfs, sleuthkit
from thrave.volumes.errors import VolumeNotCleanError
from thrave.volumes.filesystem import NtfsFile, NtfsVolume

HIBERNATION_FILE = "hiberfil.sys"
"""In the root folder; in lower case."""

# As a record has the name on the disk: fixups may have taken one of its letters away, and one half of it is whole.
_HALVES = ("hiberf".encode("utf-16-le"), "il.sys".encode("utf-16-le"))


def conditions(source: sleuthkit.Source) -> Iterator[str]:
    """What is not as a full shutdown leaves it.

    Args:
        source: The partition that holds the volume.

    Yields:
        What was found, and what to do about it, in a few words.

    Raises:
        FileSystemCorruptError: It contradicts itself, or cannot be read.
    """
    boot = ntfs.boot_sector(source.read(0, ntfs.BOOT_SIZE), source.size)
    volume = NtfsVolume(source)
    for check in (partial(check_flags, volume), partial(check_log, volume), partial(_check_awake, boot, volume)):
        try:
            check()
        except VolumeNotCleanError as found:
            yield found.reason


def check_flags(volume: NtfsVolume) -> None:
    """Raise VolumeNotCleanError if $Volume says that the volume is dirty."""
    ntfs.check_flags(volume.file(filesystem.VOLUME).volume_flags())


def check_log(volume: NtfsVolume) -> None:
    """Raise VolumeNotCleanError if $LogFile was not closed."""
    log = volume.file(filesystem.LOG_FILE)
    ntfs.check_log(log.read(0, min(ntfs.LOG_HEAD, log.size)))


def check_hibernation(file: NtfsFile) -> None:
    """Raise VolumeNotCleanError if Windows sleeps in this file."""
    ntfs.check_hibernation(file.read(0, min(ntfs.HIBERNATION_HEAD, file.size)))


def _check_awake(boot: ntfs.BootSector, volume: NtfsVolume) -> None:
    for number in _candidates(boot, volume):
        file = volume.file(number)
        if HIBERNATION_FILE in file.root_names():
            check_hibernation(file)


def _candidates(boot: ntfs.BootSector, volume: NtfsVolume) -> Iterator[int]:
    """The numbers of files with a record in which something like the name stands."""
    for first, records in volume.records(boot):
        for index in sorted({place // boot.record_size for place in _places(records.lower())}):
            record = records[index * boot.record_size :][: boot.record_size]
            number = ntfs.base_number(first + index, record)
            if number is not None:
                yield number


def _places(records: bytes) -> Iterator[int]:
    """Where one half of the name begins."""
    for half in _HALVES:
        place = records.find(half)
        while place >= 0:
            yield place
            place = records.find(half, place + 1)
