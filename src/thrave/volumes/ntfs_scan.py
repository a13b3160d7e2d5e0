"""$Bitmap: one bit for each cluster, set if it is used, beginning with the lowest bit of the first byte.

Looked at through Python's large integers, a million clusters at a time, since a loop over bits would take minutes.

How an NTFS volume was left: whether it was unmounted, and whether Windows sleeps on it. Nothing is mended.

The signs are those by which ntfs-3g refuses to write to a volume: a flag in $Volume, restart pages of $LogFile that
were not closed, a memory image in hiberfil.sys. That file is looked for in $MFT itself, by name: neither folders nor
other files are read, so that it takes no more than reading $MFT once.

What an NTFS volume does not use: its free clusters, and the contents of the three files that Windows makes anew.

Free is what $Bitmap calls free, once the volume has been believed: it was dismounted properly, $MFT and its mirror
agree, and every run of every file lies on clusters that are marked as used and that no other file claims. That last
check reads the whole MFT, as `ntfsresize --info` and chkdsk do; a bitmap that has forgotten a file is thereby found
before anything is left out. Nothing is mended, and nothing is guessed.
"""

import heapq
import re
from collections.abc import Iterator
from functools import partial

from thrave.volumes import ntfs_format, ntfs_reader
from thrave.volumes.base import Extent, merge_extents
from thrave.volumes.errors import FileSystemCorruptError, FileSystemUnsupportedError, VolumeNotCleanError
from thrave.volumes.ntfs_reader import ClusterRun, NtfsFile, NtfsVolume

_ZEROS = re.compile("0+")


def free_runs(bitmap: bytes | bytearray, clusters: int) -> Iterator[tuple[int, int]]:
    """The clusters that are not used.

    Args:
        bitmap: At least one bit for each cluster.
        clusters: How many of its bits count.

    Yields:
        (first cluster, number of clusters), ascending; a run may be told in several pieces that touch.
    """
    for start in range(0, clusters, _PIECE):
        count = min(_PIECE, clusters - start)
        piece = bitmap[start // 8 : (start + count + 7) // 8]
        bits = f"{int.from_bytes(piece, 'little'):0{8 * len(piece)}b}"[::-1][:count]
        for zeros in _ZEROS.finditer(bits):
            yield start + zeros.start(), zeros.end() - zeros.start()


def claim(bitmap: bytearray, first: int, count: int) -> bool:
    """Take a run of used clusters for a file, so that no second one can.

    Args:
        bitmap: What is used and not yet claimed; the run's bits are cleared.
        first: The run's first cluster.
        count: How many.

    Returns:
        Whether all of them were there to be claimed; if not, the bitmap is of no use any more.
    """
    starts = range(first, first + count, _PIECE)
    return all(_claim(bitmap, start, min(_PIECE, first + count - start)) for start in starts)


def _claim(bitmap: bytearray, first: int, count: int) -> bool:
    start, end = first // 8, (first + count + 7) // 8
    bits = int.from_bytes(bitmap[start:end], "little")
    wanted = ((1 << count) - 1) << first % 8
    bitmap[start:end] = (bits & ~wanted).to_bytes(len(bitmap[start:end]), "little")
    return bits & wanted == wanted


HIBERNATION_FILE = "hiberfil.sys"
"""In the root folder; in lower case."""


# As a record has the name on the disk: fixups may have taken one of its letters away, and one half of it is whole.
_HALVES = ("hiberf".encode("utf-16-le"), "il.sys".encode("utf-16-le"))


def find_problems(source: ntfs_reader.Source) -> Iterator[str]:
    """What is not as a full shutdown leaves it.

    Args:
        source: The partition that holds the volume.

    Yields:
        What was found, and what to do about it, in a few words.

    Raises:
        FileSystemCorruptError: It contradicts itself, or cannot be read.
    """
    boot = ntfs_format.boot_sector(source.read(0, ntfs_format.BOOT_SIZE), source.size)
    volume = NtfsVolume(source)
    for check in (partial(check_flags, volume), partial(check_log, volume), partial(_check_awake, boot, volume)):
        try:
            check()
        except VolumeNotCleanError as found:
            yield found.reason


def check_flags(volume: NtfsVolume) -> None:
    """Raise VolumeNotCleanError if $Volume says that the volume is dirty."""
    ntfs_format.check_flags(volume.file(ntfs_reader.VOLUME).volume_flags())


def check_log(volume: NtfsVolume) -> None:
    """Raise VolumeNotCleanError if $LogFile was not closed."""
    log = volume.file(ntfs_reader.LOG_FILE)
    ntfs_format.check_log(log.read(0, min(ntfs_format.LOG_HEAD, log.size)))


def check_hibernation(file: NtfsFile) -> None:
    """Raise VolumeNotCleanError if Windows sleeps in this file."""
    ntfs_format.check_hibernation(file.read(0, min(ntfs_format.HIBERNATION_HEAD, file.size)))


def _check_awake(boot: ntfs_format.BootSector, volume: NtfsVolume) -> None:
    for number in _candidates(boot, volume):
        file = volume.file(number)
        if HIBERNATION_FILE in file.root_names():
            check_hibernation(file)


def _candidates(boot: ntfs_format.BootSector, volume: NtfsVolume) -> Iterator[int]:
    """The numbers of files with a record in which something like the name stands."""
    for first, records in volume.records(boot):
        for index in sorted({place // boot.record_size for place in _places(records.lower())}):
            record = records[index * boot.record_size :][: boot.record_size]
            number = ntfs_format.base_number(first + index, record)
            if number is not None:
                yield number


def _places(records: bytes) -> Iterator[int]:
    """Where one half of the name begins."""
    for half in _HALVES:
        place = records.find(half)
        while place >= 0:
            yield place
            place = records.find(half, place + 1)


DISPOSABLE = frozenset({"pagefile.sys", HIBERNATION_FILE, "swapfile.sys"})
"""Files in the root folder whose content Windows writes anew when it starts; names in lower case."""


MOST_CLUSTERS = 1 << 29
"""2 TiB in clusters of 4 KiB: the bitmap then has 64 MiB, which is what reading it may cost in memory."""


MOST_HOLES = 1 << 18
"""More are refused: they are kept in memory. Defragment the volume, or skip nothing."""


_PIECE = 1 << 20  # bytes of $Bitmap that are read together


_MIRRORED = 4  # records


def find_unused(source: ntfs_reader.Source) -> list[Extent]:
    """Survey a volume.

    Args:
        source: The partition that holds it.

    Returns:
        What need not be kept, in bytes from the volume's beginning: ascending, not touching, at most MOST_HOLES.

    Raises:
        SkipRefusedError: It cannot be told for certain.
    """
    boot = ntfs_format.boot_sector(source.read(0, ntfs_format.BOOT_SIZE), source.size)
    if boot.clusters > MOST_CLUSTERS:
        raise FileSystemUnsupportedError(f"it has {boot.clusters} clusters, more than {MOST_CLUSTERS}")
    volume = NtfsVolume(source)
    check_flags(volume)
    check_log(volume)
    _check_mirror(boot, source)
    bitmap = _bitmap(boot, volume)
    free = _few(free_runs(bitmap, boot.clusters))
    disposable = _claim_all(boot, volume, bitmap)
    runs = heapq.merge(free, sorted(disposable))
    return merge_extents([(first * boot.cluster_size, count * boot.cluster_size) for first, count in runs])


def _check_mirror(boot: ntfs_format.BootSector, source: ntfs_reader.Source) -> None:
    def records(cluster: int) -> list[bytes]:
        head = source.read(cluster * boot.cluster_size, _MIRRORED * boot.record_size)
        return [ntfs_format.without_fixups(record) for record in _cut(head, boot.record_size)]

    if records(boot.mft) != records(boot.mft_mirror):
        raise FileSystemCorruptError("$MFTMirr does not agree with $MFT")


def _bitmap(boot: ntfs_format.BootSector, volume: NtfsVolume) -> bytearray:
    """The whole of $Bitmap, at most MOST_CLUSTERS bits; NTFS gives it whole words of 64."""
    file = volume.file(ntfs_reader.BITMAP)
    needed = -(-boot.clusters // 64) * 8
    if not file.is_plain or not needed <= file.size < needed + boot.cluster_size:
        raise FileSystemCorruptError(f"$Bitmap has {file.size} bytes for {boot.clusters} clusters")
    bitmap = bytearray(needed)
    for start in range(0, needed, _PIECE):
        length = min(_PIECE, needed - start)
        bitmap[start : start + length] = file.read(start, length)
    return bitmap


def _few(runs: Iterator[tuple[int, int]]) -> list[ClusterRun]:
    found: list[ClusterRun] = []
    for first, count in runs:
        if len(found) >= MOST_HOLES:
            raise FileSystemUnsupportedError(f"its free space lies in more than {MOST_HOLES} pieces: defragment it")
        found.append(ClusterRun(first, count))
    return found


def _claim_all(boot: ntfs_format.BootSector, volume: NtfsVolume, bitmap: bytearray) -> list[ClusterRun]:
    """Let every file claim its clusters.

    Args:
        boot: The geometry.
        volume: Whose files.
        bitmap: $Bitmap; it is used up.

    Returns:
        The clusters of the disposable files' contents.
    """
    disposable: list[ClusterRun] = []
    for number in _base_records(boot, volume):
        file = volume.file(number)
        for first, count in file.runs():
            if first + count > boot.clusters or not claim(bitmap, first, count):
                raise FileSystemCorruptError(
                    f"MFT record {number} claims clusters {first} to {first + count - 1}, which are not its own"
                )
        if _is_disposable(file):
            disposable += file.content_runs()
    return disposable


def _base_records(boot: ntfs_format.BootSector, volume: NtfsVolume) -> Iterator[int]:
    """The numbers of the records that are files, from the heads of all that there are."""
    for first, records in volume.records(boot):
        for number, record in enumerate(_cut(records, boot.record_size), first):
            if ntfs_format.base_number(number, record) == number:
                yield number


def _is_disposable(file: NtfsFile) -> bool:
    """Whether its content need not be kept: each name that it has must say so."""
    names = file.root_names()
    if not names or not DISPOSABLE.issuperset(names):
        return False
    if HIBERNATION_FILE in names:
        check_hibernation(file)
    return file.is_plain


def _cut(records: bytes, size: int) -> list[bytes]:
    return [records[start : start + size] for start in range(0, len(records), size)]
