"""The few structures of NTFS that decide whether a volume may be believed: boot sector, restart pages, record headers.

Files, attributes and runs are the library's business (`filesystem.py`). Here stands what it does not tell. Pure: bytes
in, answers out; everything in the bytes is a claim of the guest, and one that does not fit is refused.

Sources: ntfs-3g 2022.10.3 (bootsect.c, logfile.c, volume.c, layout.h) and Linux 6.1, fs/ntfs.
"""

import struct
import uuid
from typing import NamedTuple

from thrave.volumes.errors import FileSystemCorruptError, FileSystemUnsupportedError, VolumeNotCleanError

MAX_CLUSTER = 64 << 10
"""Bytes; Windows 10 and later can make larger clusters, which the library does not read."""

_MOST_CLUSTER = 2 << 20  # bytes, the largest that Windows makes

BOOT_SIZE = 512
"""Bytes of a boot sector that are looked at."""

LOG_HEAD = 128 << 10
"""Bytes of $LogFile that are looked at: two restart pages of the largest size."""

HIBERNATION_HEAD = 4096
"""Bytes of hiberfil.sys that are looked at, as ntfs-3g does."""

_NTFS = b"NTFS    "
# BitLocker To Go shows a FAT volume to systems that cannot decrypt, with this id in its boot sector.
_BITLOCKER_TO_GO = uuid.UUID("4967d63b-2e29-4ad8-8399-f6a339e3d001").bytes_le
_UNSUPPORTED = {b"-FVE-FS-": "it is encrypted with BitLocker", b"ReFS\0\0\0\0": "its file system is ReFS, not NTFS"}
_BOOT = struct.Struct("<11xHB26xQQQb")  # bytes a sector, sectors a cluster, sectors, $MFT, $MFTMirr, record size
_RESTART = struct.Struct("<4s12xIIHHH")  # magic, system page, log page, restart area, minor, major version
_RESTART_AREA = struct.Struct("<Q4xHH")  # current LSN, clients in use, flags
_NO_CLIENT, _CLEAN = 0xFFFF, 0x0002
_DIRTY, _CHKDSK_UNDERWAY = 0x0001, 0x4000
_NUMBER = (1 << 48) - 1  # of a reference to an MFT record; above it the record's sequence number


class BootSector(NamedTuple):
    """The geometry of an NTFS volume. Sizes in bytes, addresses in clusters."""

    cluster_size: int
    clusters: int
    mft: int
    mft_mirror: int
    record_size: int


def is_ntfs(sector: bytes) -> bool:
    """Whether a volume's first sector is NTFS's; False for all that is nothing of Windows' own.

    Raises:
        FileSystemUnsupportedError: BitLocker or ReFS, which stand where NTFS could.
    """
    name = sector[3:11]
    if sector[424:440] == _BITLOCKER_TO_GO:
        raise FileSystemUnsupportedError(_UNSUPPORTED[b"-FVE-FS-"])
    if name in _UNSUPPORTED:
        raise FileSystemUnsupportedError(_UNSUPPORTED[name])
    return name == _NTFS


def boot_sector(sector: bytes, size: int) -> BootSector:
    """Read the geometry.

    Args:
        sector: The first BOOT_SIZE bytes of the volume.
        size: Bytes that there are.

    Raises:
        FileSystemCorruptError: It is no geometry that a volume of that size can have.
        FileSystemUnsupportedError: Its clusters are larger than MAX_CLUSTER.
    """
    sector_size, per_cluster, sectors, mft, mirror, record = _BOOT.unpack_from(sector)
    # From 0x80 on these two are negative powers of two: of a cluster, and of a record that is no whole cluster.
    cluster_size = sector_size * (per_cluster if per_cluster <= 0x80 else 1 << 256 - per_cluster)
    record_size = record * cluster_size if record > 0 else 1 << -record
    if MAX_CLUSTER < cluster_size <= _MOST_CLUSTER:
        raise FileSystemUnsupportedError(
            f"its clusters have {cluster_size >> 10} KiB, and only those of up to {MAX_CLUSTER >> 10} KiB can be read"
        )
    boot = BootSector(cluster_size, sectors * sector_size // (cluster_size or 1), mft, mirror, record_size)
    if not _is_possible(boot, sector_size) or boot.clusters * cluster_size > size:
        raise FileSystemCorruptError("its boot sector describes no volume of its size")
    return boot


def _is_possible(boot: BootSector, sector_size: int) -> bool:
    powers = all(size and not size & (size - 1) for size in (sector_size, boot.cluster_size, boot.record_size))
    sizes = 256 <= sector_size <= 4096 and boot.cluster_size <= MAX_CLUSTER and 512 <= boot.record_size <= 4096
    return powers and sizes and max(boot.mft, boot.mft_mirror) < boot.clusters


def base_number(number: int, record: bytes) -> int | None:
    """The number of the file that an MFT record is part of: its own, unless it is the extension of another record.

    Args:
        number: The record's own.
        record: As it is on the disk.

    Returns:
        The number; None if the record is not in use.

    Raises:
        FileSystemCorruptError: It is in use and not marked as a good record.
    """
    flags, base = struct.unpack_from("<H8xQ", record, 22)
    if record[:4] == bytes(4) or not flags & 1:  # such a one may hold anything
        return None
    if record[:4] != b"FILE":
        raise FileSystemCorruptError("an MFT record that is in use is marked as bad")
    return base & _NUMBER if base else number


def without_fixups(record: bytes) -> bytes:
    """A record as it is in memory: NTFS keeps the last two bytes of each 512 elsewhere, to notice torn writes.

    Raises:
        FileSystemCorruptError: A write was torn, or it is no record.
    """
    mended = bytearray(record)
    at, count = struct.unpack_from("<HH", record, 4)
    if count != len(record) // 512 + 1 or at + 2 * count > 510:
        raise FileSystemCorruptError("an MFT record has no update sequence")
    for index in range(1, count):
        end = 512 * index
        if mended[end - 2 : end] != mended[at : at + 2]:
            raise FileSystemCorruptError("an MFT record was not written to its end")
        mended[end - 2 : end] = mended[at + 2 * index : at + 2 * index + 2]
    mended[at : at + 2 * count] = bytes(2 * count)
    return bytes(mended)


def check_flags(flags: int) -> None:
    """See what $Volume says of itself.

    Args:
        flags: Of its $VOLUME_INFORMATION.

    Raises:
        VolumeNotCleanError: It must be checked first.
    """
    if flags & (_DIRTY | _CHKDSK_UNDERWAY):
        raise VolumeNotCleanError("it is marked as dirty: have Windows check it (chkdsk)")


def check_log(head: bytes) -> None:
    """See whether the journal was closed: else $Bitmap may lag behind it.

    An empty journal, all bits set, is a clean one. Of the two restart pages the one with the larger LSN counts. A log
    of version 2.0 is what Windows 8 and later leave when they keep metadata elsewhere (fast startup); a full shutdown
    takes it back to 1.1. The rules are ntfs-3g's: ntfs_is_logfile_clean, "Metadata kept in Windows cache".

    Args:
        head: The first LOG_HEAD bytes of $LogFile, or all of a smaller one.

    Raises:
        VolumeNotCleanError: It was not closed.
        FileSystemCorruptError: It has no restart page.
    """
    if head and head.count(0xFF) == len(head):
        return
    lsn, version, clients, flags = max(_restart_pages(head))
    if version != (1, 1):
        raise VolumeNotCleanError(f"its log is of version {version[0]}.{version[1]}: shut Windows down fully")
    if clients != _NO_CLIENT and not flags & _CLEAN:
        raise VolumeNotCleanError(f"its log was not closed (LSN {lsn}): shut Windows down properly")


def _restart_pages(head: bytes) -> list[tuple[int, tuple[int, int], int, int]]:
    """(LSN, (major, minor version), clients in use, flags) of the valid ones; the first says where the second is."""
    found, start = [], 0
    for _ in range(2):
        if len(head) < start + 512 or head[start : start + 4] not in (b"RSTR", b"CHKD"):
            break
        _, page, _, area, minor, major = _RESTART.unpack_from(head, start)
        if page & (page - 1) or not 512 <= page <= LOG_HEAD // 2 or not _RESTART.size <= area <= 480:
            break
        lsn, clients, flags = _RESTART_AREA.unpack_from(head, start + area)
        found.append((lsn, (major, minor), clients, flags))
        start = page
    if not found:
        raise FileSystemCorruptError("its log has no restart page")
    return found


def check_hibernation(head: bytes) -> None:
    """See whether Windows sleeps in hiberfil.sys: it would wake up to a disk that is not the one it left.

    Args:
        head: The first HIBERNATION_HEAD bytes of the file. Zeros or `wake` mean that it is of no use any more.

    Raises:
        VolumeNotCleanError: It does, or the file is shorter: ntfs-3g takes that for the sign of another volume's sleep.
    """
    if len(head) < HIBERNATION_HEAD:
        raise VolumeNotCleanError("its hiberfil.sys is cut short, as that of a hibernated machine's second disk is")
    if head[:4].lower() in (b"hibr", b"rstr"):
        raise VolumeNotCleanError("Windows is hibernated on it (or shut down with fast startup): shut it down fully")
