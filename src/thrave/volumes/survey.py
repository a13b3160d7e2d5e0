"""What an NTFS volume does not use: its free clusters, and the contents of the three files that Windows makes anew.

Free is what $Bitmap calls free, once the volume has been believed: it was dismounted properly, $MFT and its mirror
agree, and every run of every file lies on clusters that are marked as used and that no other file claims. That last
check reads the whole MFT, as `ntfsresize --info` and chkdsk do; a bitmap that has forgotten a file is thereby found
before anything is left out. Nothing is mended, and nothing is guessed.
"""

import heapq
from collections.abc import Iterator

from thrave.volumes import filesystem, ntfs, sleuthkit, unmounting
from thrave.volumes.bitmap import claim, free_runs
from thrave.volumes.errors import FileSystemCorruptError, FileSystemUnsupportedError
from thrave.volumes.filesystem import NtfsFile, NtfsVolume, Run
from thrave.volumes.volume import Extent, joined

DISPOSABLE = frozenset({"pagefile.sys", unmounting.HIBERNATION_FILE, "swapfile.sys"})
"""Files in the root folder whose content Windows writes anew when it starts; names in lower case."""

MOST_CLUSTERS = 1 << 29
"""2 TiB in clusters of 4 KiB: the bitmap then has 64 MiB, which is what reading it may cost in memory."""

MOST_HOLES = 1 << 18
"""More are refused: they are kept in memory. Defragment the volume, or skip nothing."""

_PIECE = 1 << 20  # bytes of $Bitmap that are read together
_MIRRORED = 4  # records


def unused(source: sleuthkit.Source) -> list[Extent]:
    """Survey a volume.

    Args:
        source: The partition that holds it.

    Returns:
        What need not be kept, in bytes from the volume's beginning: ascending, not touching, at most MOST_HOLES.

    Raises:
        SkipRefusedError: It cannot be told for certain.
    """
    boot = ntfs.boot_sector(source.read(0, ntfs.BOOT_SIZE), source.size)
    if boot.clusters > MOST_CLUSTERS:
        raise FileSystemUnsupportedError(f"it has {boot.clusters} clusters, more than {MOST_CLUSTERS}")
    volume = NtfsVolume(source)
    unmounting.check_flags(volume)
    unmounting.check_log(volume)
    _check_mirror(boot, source)
    bitmap = _bitmap(boot, volume)
    free = _few(free_runs(bitmap, boot.clusters))
    disposable = _claim_all(boot, volume, bitmap)
    runs = heapq.merge(free, sorted(disposable))
    return joined([(first * boot.cluster_size, count * boot.cluster_size) for first, count in runs])


def _check_mirror(boot: ntfs.BootSector, source: sleuthkit.Source) -> None:
    def records(cluster: int) -> list[bytes]:
        head = source.read(cluster * boot.cluster_size, _MIRRORED * boot.record_size)
        return [ntfs.without_fixups(record) for record in _cut(head, boot.record_size)]

    if records(boot.mft) != records(boot.mft_mirror):
        raise FileSystemCorruptError("$MFTMirr does not agree with $MFT")


def _bitmap(boot: ntfs.BootSector, volume: NtfsVolume) -> bytearray:
    """The whole of $Bitmap, at most MOST_CLUSTERS bits; NTFS gives it whole words of 64."""
    file = volume.file(filesystem.BITMAP)
    needed = -(-boot.clusters // 64) * 8
    if not file.is_plain or not needed <= file.size < needed + boot.cluster_size:
        raise FileSystemCorruptError(f"$Bitmap has {file.size} bytes for {boot.clusters} clusters")
    bitmap = bytearray(needed)
    for start in range(0, needed, _PIECE):
        length = min(_PIECE, needed - start)
        bitmap[start : start + length] = file.read(start, length)
    return bitmap


def _few(runs: Iterator[tuple[int, int]]) -> list[Run]:
    found: list[Run] = []
    for first, count in runs:
        if len(found) >= MOST_HOLES:
            raise FileSystemUnsupportedError(f"its free space lies in more than {MOST_HOLES} pieces: defragment it")
        found.append(Run(first, count))
    return found


def _claim_all(boot: ntfs.BootSector, volume: NtfsVolume, bitmap: bytearray) -> list[Run]:
    """Let every file claim its clusters.

    Args:
        boot: The geometry.
        volume: Whose files.
        bitmap: $Bitmap; it is used up.

    Returns:
        The clusters of the disposable files' contents.
    """
    disposable: list[Run] = []
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


def _base_records(boot: ntfs.BootSector, volume: NtfsVolume) -> Iterator[int]:
    """The numbers of the records that are files, from the heads of all that there are."""
    for first, records in volume.records(boot):
        for number, record in enumerate(_cut(records, boot.record_size), first):
            if ntfs.base_number(number, record) == number:
                yield number


def _is_disposable(file: NtfsFile) -> bool:
    """Whether its content need not be kept: each name that it has must say so."""
    names = file.root_names()
    if not names or not DISPOSABLE.issuperset(names):
        return False
    if unmounting.HIBERNATION_FILE in names:
        unmounting.check_hibernation(file)
    return file.is_plain


def _cut(records: bytes, size: int) -> list[bytes]:
    return [records[start : start + size] for start in range(0, len(records), size)]
