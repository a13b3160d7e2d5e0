"""Parses the NTFS structures that decide whether a volume can be trusted: boot sector, log restart pages, MFT records.

Only what pytsk3 does not report; `ntfs_reader` reads files, attributes and runs with pytsk3. The functions get bytes of
the guest, which are untrusted, and read no file. Values that do not fit are refused.

Sources: ntfs-3g 2022.10.3 (bootsect.c, logfile.c, volume.c, layout.h) and Linux 6.1, fs/ntfs.
"""

import struct
import uuid
from typing import NamedTuple

from thrave.volumes.errors import FileSystemCorruptError, FileSystemUnsupportedError, VolumeNotCleanError

MAX_CLUSTER = 64 << 10
"""Bytes. Windows 10 and later can format with larger clusters, which pytsk3 does not support."""

_MAX_WINDOWS_CLUSTER = 2 << 20  # bytes, the largest that Windows formats

BOOT_SIZE = 512
"""Bytes of a boot sector that are read."""

LOG_HEAD = 128 << 10
"""Bytes of $LogFile that are read: two restart pages of the maximum size."""

HIBERNATION_HEAD = 4096
"""Bytes of hiberfil.sys that are read, as ntfs-3g does."""

_NTFS = b"NTFS    "
# BitLocker To Go shows a FAT volume to systems that cannot decrypt, with this id in its boot sector.
_BITLOCKER_TO_GO = uuid.UUID("4967d63b-2e29-4ad8-8399-f6a339e3d001").bytes_le
_UNSUPPORTED = {b"-FVE-FS-": "it is encrypted with BitLocker", b"ReFS\0\0\0\0": "its file system is ReFS, not NTFS"}
_BOOT = struct.Struct("<11xHB26xQQQb")  # sector size, sectors per cluster, sectors, $MFT, $MFTMirr, record size
_RESTART = struct.Struct("<4s12xIIHHH")  # magic, system page, log page, restart area, minor, major version
_RESTART_AREA = struct.Struct("<Q4xHH")  # current LSN, clients in use, flags
_NO_CLIENT, _CLEAN = 0xFFFF, 0x0002
_DIRTY, _CHKDSK_UNDERWAY = 0x0001, 0x4000
_RECORD_NUMBER = (1 << 48) - 1  # bits of a reference to an MFT record; the others are its sequence number


class BootSector(NamedTuple):
    """The geometry of an NTFS volume. Sizes in bytes, addresses in clusters."""

    cluster_size: int
    clusters: int
    mft: int
    mft_mirror: int
    record_size: int


def is_ntfs(sector: bytes) -> bool:
    """Return whether a volume's first sector is NTFS's.

    Raises:
        FileSystemUnsupportedError: BitLocker or ReFS, which Windows uses in place of NTFS.
    """
    name = sector[3:11]
    if sector[424:440] == _BITLOCKER_TO_GO:
        raise FileSystemUnsupportedError(_UNSUPPORTED[b"-FVE-FS-"])
    if name in _UNSUPPORTED:
        raise FileSystemUnsupportedError(_UNSUPPORTED[name])
    return name == _NTFS


def parse_boot_sector(sector: bytes, size: int) -> BootSector:
    """Parse the geometry.

    Args:
        sector: The first BOOT_SIZE bytes of the volume.
        size: Bytes of the partition.

    Raises:
        FileSystemCorruptError: A volume of that size cannot have this geometry.
        FileSystemUnsupportedError: Its clusters are larger than MAX_CLUSTER.
    """
    sector_size, per_cluster, sectors, mft, mirror, record = _BOOT.unpack_from(sector)
    # Above 0x80 `per_cluster` is a negative exponent of 2; so is a negative `record`, for records below one cluster.
    cluster_size = sector_size * (per_cluster if per_cluster <= 0x80 else 1 << 256 - per_cluster)
    record_size = record * cluster_size if record > 0 else 1 << -record
    if MAX_CLUSTER < cluster_size <= _MAX_WINDOWS_CLUSTER:
        raise FileSystemUnsupportedError(
            f"its clusters have {cluster_size >> 10} KiB; at most {MAX_CLUSTER >> 10} KiB are supported"
        )
    boot = BootSector(cluster_size, sectors * sector_size // (cluster_size or 1), mft, mirror, record_size)
    if not _is_possible(boot, sector_size) or boot.clusters * cluster_size > size:
        raise FileSystemCorruptError("its boot sector does not describe a volume of its size")
    return boot


def _is_possible(boot: BootSector, sector_size: int) -> bool:
    powers = all(size and not size & (size - 1) for size in (sector_size, boot.cluster_size, boot.record_size))
    sizes = 256 <= sector_size <= 4096 and boot.cluster_size <= MAX_CLUSTER and 512 <= boot.record_size <= 4096
    return powers and sizes and max(boot.mft, boot.mft_mirror) < boot.clusters


def find_base_record(number: int, record: bytes) -> int | None:
    """Return the number of the file that an MFT record belongs to.

    Args:
        number: The record's own number, which is returned unless the record extends another one.
        record: As it is on the disk.

    Returns:
        The number; None if the record is not in use.

    Raises:
        FileSystemCorruptError: It is in use and not marked as a good record.
    """
    flags, base = struct.unpack_from("<H8xQ", record, 22)
    if record[:4] == bytes(4) or not flags & 1:  # not in use: the content is undefined
        return None
    if record[:4] != b"FILE":
        raise FileSystemCorruptError("an MFT record that is in use is marked as bad")
    return base & _RECORD_NUMBER if base else number


def undo_fixups(record: bytes) -> bytes:
    """Return an MFT record with its original bytes.

    To detect incomplete writes, NTFS replaces the last two bytes of each 512 by a number, and stores them elsewhere in
    the record.

    Raises:
        FileSystemCorruptError: A write was incomplete, or this is not a record.
    """
    original = bytearray(record)
    table, count = struct.unpack_from("<HH", record, 4)
    if count != len(record) // 512 + 1 or table + 2 * count > 510:
        raise FileSystemCorruptError("an MFT record has no update sequence")
    for index in range(1, count):
        end = 512 * index
        if original[end - 2 : end] != original[table : table + 2]:
            raise FileSystemCorruptError("an MFT record was written incompletely")
        original[end - 2 : end] = original[table + 2 * index : table + 2 * index + 2]
    original[table : table + 2 * count] = bytes(2 * count)
    return bytes(original)


def check_flags(flags: int) -> None:
    """Check the flags in $VOLUME_INFORMATION of $Volume.

    Raises:
        VolumeNotCleanError: Windows must check the volume first.
    """
    if flags & (_DIRTY | _CHKDSK_UNDERWAY):
        raise VolumeNotCleanError("it is marked as dirty: have Windows check it (chkdsk)")


def check_log(head: bytes) -> None:
    """Check that the log was closed; otherwise $Bitmap may be older than the log.

    An empty log, with all bits set, is clean. Of the two restart pages the one with the larger LSN is valid. Windows 8
    and later write version 2.0 when they keep metadata elsewhere (fast startup); a full shutdown writes 1.1 again. The
    rules are those of ntfs-3g: ntfs_is_logfile_clean, "Metadata kept in Windows cache".

    Args:
        head: The first LOG_HEAD bytes of $LogFile, or all of a smaller one.

    Raises:
        VolumeNotCleanError: The log was not closed.
        FileSystemCorruptError: The log has no restart page.
    """
    if head and head.count(0xFF) == len(head):
        return
    lsn, version, clients, flags = max(_parse_restart_pages(head))
    if version != (1, 1):
        raise VolumeNotCleanError(f"its log has version {version[0]}.{version[1]}: shut Windows down fully")
    if clients != _NO_CLIENT and not flags & _CLEAN:
        raise VolumeNotCleanError(f"its log was not closed (LSN {lsn}): shut Windows down properly")


def _parse_restart_pages(head: bytes) -> list[tuple[int, tuple[int, int], int, int]]:
    """Return (LSN, (major, minor version), clients in use, flags) of each valid page."""
    found, start = [], 0
    for _ in range(2):
        if len(head) < start + 512 or head[start : start + 4] not in (b"RSTR", b"CHKD"):
            break
        _, page, _, area, minor, major = _RESTART.unpack_from(head, start)
        if page & (page - 1) or not 512 <= page <= LOG_HEAD // 2 or not _RESTART.size <= area <= 480:
            break
        lsn, clients, flags = _RESTART_AREA.unpack_from(head, start + area)
        found.append((lsn, (major, minor), clients, flags))
        start = page  # the second page follows the first
    if not found:
        raise FileSystemCorruptError("its log has no restart page")
    return found


def check_hibernation(head: bytes) -> None:
    """Check that hiberfil.sys has no hibernated Windows, whose memory would not match the disk after a restart.

    Args:
        head: The first HIBERNATION_HEAD bytes of the file. They begin with zeros or `wake` if no Windows is hibernated.

    Raises:
        VolumeNotCleanError: Windows is hibernated, or the file is shorter: ntfs-3g treats that as the second disk of a
            hibernated machine.
    """
    if len(head) < HIBERNATION_HEAD:
        raise VolumeNotCleanError("its hiberfil.sys is cut short, as on the second disk of a hibernated machine")
    if head[:4].lower() in (b"hibr", b"rstr"):
        raise VolumeNotCleanError("Windows is hibernated on it (or shut down with fast startup): shut it down fully")
