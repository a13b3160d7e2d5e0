"""Whether a FAT or exFAT volume was unmounted. Pure: bytes in, answers out; the bytes are the guest's claims.

Only the flags are read that say so, never a folder or a file.

Sources: Microsoft, "FAT: General Overview of On-Disk Format" 1.03 (boot sector, FAT[0], FAT[1], the types by the number
of clusters) and "exFAT file system specification" (boot sector, VolumeFlags); Linux, fs/fat (the state byte).
"""

import struct
from typing import NamedTuple

BOOT_SIZE = 512
"""Bytes of a boot sector that are read."""

HEAD_SIZE = 8
"""Bytes of the first FAT that are read: its first two entries."""

_EXFAT = b"EXFAT   "
_BPB = struct.Struct("<11xHBHBHHBH8xII")  # up to the size of FAT32's table
_FAT12_CLUSTERS, _FAT16_CLUSTERS = 4085, 65525
_STATE_DIRTY = 0x01
_CLEAN = {16: 0x8000, 32: 0x08000000}  # bits of FAT[1]
_EXFAT_DIRTY, _EXFAT_FAILED = 0x0002, 0x0004


class FatVolume(NamedTuple):
    """The geometry of a FAT volume.

    Attributes:
        bits: Of an entry: 12, 16 or 32.
        table: Where the first FAT begins, in bytes from the volume's beginning.
        media: The media byte, which is the first byte of the FAT as well.
        is_marked: Whether the boot sector says that the volume is in use.
    """

    bits: int
    table: int
    media: int
    is_marked: bool


def is_exfat(sector: bytes) -> bool:
    """Whether a volume's first sector is exFAT's: the name, and zeros where FAT has its geometry."""
    return sector[3:11] == _EXFAT and not any(sector[11:64])


def is_exfat_dirty(sector: bytes) -> bool:
    """Whether an exFAT volume says that it was not unmounted, or that its medium has failed."""
    flags = struct.unpack_from("<H", sector, 106)[0]
    return bool(flags & (_EXFAT_DIRTY | _EXFAT_FAILED))


def fat_volume(sector: bytes, size: int) -> FatVolume | None:
    """The geometry in a first sector; None if it is not FAT's, or of no volume that fits.

    Args:
        sector: The first BOOT_SIZE bytes.
        size: Bytes of the place that the volume is in.
    """
    if len(sector) < BOOT_SIZE or sector[0] not in (0xEB, 0xE9):
        return None
    each, cluster, reserved, tables, entries, small, media, length, large, long = _BPB.unpack_from(sector)
    length, sectors = length or long, small or large
    if each not in (512, 1024, 2048, 4096) or not cluster or cluster & (cluster - 1) or not reserved or not length:
        return None
    if not 1 <= tables <= 4 or (media != 0xF0 and media < 0xF8) or not sectors or sectors * each > size:
        return None
    clusters = (sectors - reserved - tables * length - -(-32 * entries // each)) // cluster
    if clusters <= 0:
        return None
    bits = 12 if clusters < _FAT12_CLUSTERS else 16 if clusters < _FAT16_CLUSTERS else 32
    # FAT32 has no fixed root folder, and FAT12 and FAT16 always have one.
    if (bits == 32) == bool(entries):
        return None
    return FatVolume(bits, reserved * each, media, bool(sector[65 if bits == 32 else 37] & _STATE_DIRTY))


def is_fat_head(volume: FatVolume, head: bytes) -> bool:
    """Whether a FAT begins with these bytes, as one of this volume does."""
    return len(head) == HEAD_SIZE and head[0] == volume.media


def is_fat_dirty(volume: FatVolume, head: bytes) -> bool:
    """Whether a volume says that it was not unmounted: in its boot sector, or in the second entry of its FAT."""
    if volume.is_marked or volume.bits == 12:
        return volume.is_marked
    second = int.from_bytes(head[2:4] if volume.bits == 16 else head[4:8], "little")
    return not second & _CLEAN[volume.bits]
