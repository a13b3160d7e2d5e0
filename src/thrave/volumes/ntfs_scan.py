"""Scans an NTFS volume: which clusters are unused, and whether it was unmounted. Repairs nothing.

Unused are the clusters that are free in $Bitmap, and the contents of three files that Windows writes again at its next
start. $Bitmap is trusted only after these checks: the volume was unmounted, $MFT and its mirror agree, and every run of
every file is on clusters that are marked as used and that belong to no other file. The last check reads the whole MFT,
as `ntfsresize --info` and chkdsk do; it detects a bitmap that lacks a file before anything is left out.

`find_problems` uses the criteria with which ntfs-3g refuses to write to a volume: a flag in $Volume, restart pages of
$LogFile that were not closed, a memory image in hiberfil.sys. It searches $MFT for the name of that file and reads
neither folders nor other files, so it needs about as long as reading $MFT once.
"""

import heapq
import re
from collections.abc import Iterator
from functools import partial

from thrave.volumes import ntfs_format, ntfs_reader
from thrave.volumes.base import Extent, merge_extents
from thrave.volumes.errors import FileSystemCorruptError, FileSystemUnsupportedError, VolumeNotCleanError
from thrave.volumes.ntfs_format import BootSector
from thrave.volumes.ntfs_reader import ClusterRun, NtfsFile, NtfsVolume

HIBERNATION_FILE = "hiberfil.sys"
"""In the root folder; in lower case."""

DISPOSABLE = frozenset({"pagefile.sys", HIBERNATION_FILE, "swapfile.sys"})
"""Files in the root folder whose content Windows writes again at its next start; names in lower case."""

MAX_CLUSTERS = 1 << 29
"""2 TiB with clusters of 4 KiB; $Bitmap then takes 64 MiB of memory."""

MAX_HOLES = 1 << 18
"""More are refused, since they are kept in memory. The user can defragment the volume or not skip unused space."""

# The name in UTF-16, in two halves: fixups replace two bytes at the end of each 512, so one half is always complete.
_NAME_HALVES = ("hiberf".encode("utf-16-le"), "il.sys".encode("utf-16-le"))
_ZEROS = re.compile("0+")
_PIECE = 1 << 20  # bytes of $Bitmap in one read, and clusters in one step
_MIRRORED_RECORDS = 4


def find_problems(source: ntfs_reader.Source) -> Iterator[str]:
    """Report every sign that the volume was not unmounted by a full shutdown.

    Args:
        source: The partition with the volume.

    Yields:
        A short message: the sign, and what to do about it.

    Raises:
        FileSystemCorruptError: The volume contradicts itself, or cannot be read.
    """
    boot = ntfs_format.parse_boot_sector(source.read(0, ntfs_format.BOOT_SIZE), source.size)
    volume = NtfsVolume(source)
    checks = partial(_check_flags, volume), partial(_check_log, volume), partial(_check_hibernation_files, boot, volume)
    for check in checks:
        try:
            check()
        except VolumeNotCleanError as error:
            yield error.reason


def find_unused(source: ntfs_reader.Source) -> list[Extent]:
    """Return the unused ranges of a volume.

    Args:
        source: The partition with the volume.

    Returns:
        Ranges in bytes from the beginning of the volume: ascending, not touching, at most MAX_HOLES.

    Raises:
        SkipRefusedError: They cannot be determined reliably.
    """
    boot = ntfs_format.parse_boot_sector(source.read(0, ntfs_format.BOOT_SIZE), source.size)
    if boot.clusters > MAX_CLUSTERS:
        raise FileSystemUnsupportedError(f"it has {boot.clusters} clusters, more than {MAX_CLUSTERS}")
    volume = NtfsVolume(source)
    _check_flags(volume)
    _check_log(volume)
    _check_mirror(boot, source)
    bitmap = _read_bitmap(boot, volume)
    free = _limit_count(find_free_runs(bitmap, boot.clusters))
    disposable = _claim_files(boot, volume, bitmap)
    runs = heapq.merge(free, sorted(disposable))
    return merge_extents([(first * boot.cluster_size, count * boot.cluster_size) for first, count in runs])


def find_free_runs(bitmap: bytes | bytearray, clusters: int) -> Iterator[tuple[int, int]]:
    """Yield the free clusters.

    Args:
        bitmap: $Bitmap: one bit for each cluster, set if the cluster is used, beginning with the lowest bit of the
            first byte. May be longer.
        clusters: Number of clusters.

    Yields:
        (first cluster, number of clusters), ascending. Runs may touch.
    """
    # A million clusters at a time, as one large integer: a loop over single bits would take minutes.
    for start in range(0, clusters, _PIECE):
        count = min(_PIECE, clusters - start)
        piece = bitmap[start // 8 : (start + count + 7) // 8]
        bits = f"{int.from_bytes(piece, 'little'):0{8 * len(piece)}b}"[::-1][:count]
        for zeros in _ZEROS.finditer(bits):
            yield start + zeros.start(), zeros.end() - zeros.start()


def claim_clusters(bitmap: bytearray, first: int, count: int) -> bool:
    """Assign used clusters to a file, so that a second file cannot have them.

    Args:
        bitmap: Clusters that are used and not yet assigned, as in `find_free_runs`. The bits of the run are cleared.
        first: The first cluster of the run.
        count: The number of clusters.

    Returns:
        Whether all of them were used and not assigned. If not, the bitmap must not be used any more.
    """
    for start in range(first, first + count, _PIECE):
        piece = min(_PIECE, first + count - start)
        begin, end = start // 8, (start + piece + 7) // 8
        bits = int.from_bytes(bitmap[begin:end], "little")
        run = ((1 << piece) - 1) << start % 8
        bitmap[begin:end] = (bits & ~run).to_bytes(len(bitmap[begin:end]), "little")
        if bits & run != run:
            return False
    return True


def _check_flags(volume: NtfsVolume) -> None:
    ntfs_format.check_flags(volume.file(ntfs_reader.VOLUME).volume_flags())


def _check_log(volume: NtfsVolume) -> None:
    log = volume.file(ntfs_reader.LOG_FILE)
    ntfs_format.check_log(log.read(0, min(ntfs_format.LOG_HEAD, log.size)))


def _check_hibernation(file: NtfsFile) -> None:
    ntfs_format.check_hibernation(file.read(0, min(ntfs_format.HIBERNATION_HEAD, file.size)))


def _check_hibernation_files(boot: BootSector, volume: NtfsVolume) -> None:
    for number in _find_hibernation_records(boot, volume):
        file = volume.file(number)
        if HIBERNATION_FILE in file.root_names():
            _check_hibernation(file)


def _find_hibernation_records(boot: BootSector, volume: NtfsVolume) -> Iterator[int]:
    """Yield the number of each file with a record that contains a half of the name, anywhere."""
    for first, records in volume.records(boot):
        for index in sorted({offset // boot.record_size for offset in _find_name(records.lower())}):
            record = records[index * boot.record_size :][: boot.record_size]
            number = ntfs_format.find_base_record(first + index, record)
            if number is not None:
                yield number


def _find_name(records: bytes) -> Iterator[int]:
    for half in _NAME_HALVES:
        offset = records.find(half)
        while offset >= 0:
            yield offset
            offset = records.find(half, offset + 1)


def _check_mirror(boot: BootSector, source: ntfs_reader.Source) -> None:
    def records(cluster: int) -> list[bytes]:
        head = source.read(cluster * boot.cluster_size, _MIRRORED_RECORDS * boot.record_size)
        return [ntfs_format.undo_fixups(record) for record in _split(head, boot.record_size)]

    if records(boot.mft) != records(boot.mft_mirror):
        raise FileSystemCorruptError("$MFTMirr does not agree with $MFT")


def _read_bitmap(boot: BootSector, volume: NtfsVolume) -> bytearray:
    """Read the whole $Bitmap, at most MAX_CLUSTERS bits. NTFS rounds its size up to 64 bits."""
    file = volume.file(ntfs_reader.BITMAP)
    needed = -(-boot.clusters // 64) * 8
    if not file.is_plain or not needed <= file.size < needed + boot.cluster_size:
        raise FileSystemCorruptError(f"$Bitmap has {file.size} bytes for {boot.clusters} clusters")
    bitmap = bytearray(needed)
    for start in range(0, needed, _PIECE):
        length = min(_PIECE, needed - start)
        bitmap[start : start + length] = file.read(start, length)
    return bitmap


def _limit_count(runs: Iterator[tuple[int, int]]) -> list[ClusterRun]:
    limited: list[ClusterRun] = []
    for first, count in runs:
        if len(limited) >= MAX_HOLES:
            raise FileSystemUnsupportedError(f"its free space is in more than {MAX_HOLES} pieces: defragment it")
        limited.append(ClusterRun(first, count))
    return limited


def _claim_files(boot: BootSector, volume: NtfsVolume, bitmap: bytearray) -> list[ClusterRun]:
    """Assign the clusters of every file.

    Args:
        boot: The geometry.
        volume: The volume.
        bitmap: $Bitmap; it is changed.

    Returns:
        The clusters of the contents of disposable files.
    """
    disposable: list[ClusterRun] = []
    for number in _base_records(boot, volume):
        file = volume.file(number)
        for first, count in file.runs():
            if first + count > boot.clusters or not claim_clusters(bitmap, first, count):
                raise FileSystemCorruptError(
                    f"MFT record {number} claims clusters {first} to {first + count - 1}, which are not its own"
                )
        if _is_disposable(file):
            disposable += file.content_runs()
    return disposable


def _base_records(boot: BootSector, volume: NtfsVolume) -> Iterator[int]:
    """Yield the numbers of the MFT records that are files, and not extensions of another record."""
    for first, records in volume.records(boot):
        for number, record in enumerate(_split(records, boot.record_size), first):
            if ntfs_format.find_base_record(number, record) == number:
                yield number


def _is_disposable(file: NtfsFile) -> bool:
    """Return whether the content can be left out: every name of the file must be a disposable one."""
    names = file.root_names()
    if not names or not DISPOSABLE.issuperset(names):
        return False
    if HIBERNATION_FILE in names:
        _check_hibernation(file)
    return file.is_plain


def _split(records: bytes, size: int) -> list[bytes]:
    return [records[start : start + size] for start in range(0, len(records), size)]
