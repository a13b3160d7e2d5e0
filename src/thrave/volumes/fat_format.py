"""Detects whether a FAT or exFAT volume was unmounted. Parses bytes of the guest, which are untrusted; reads no file.

Only the flags that record the state are read, no folder and no file.

Sources: Microsoft, "FAT: General Overview of On-Disk Format" 1.03 (boot sector, FAT[0], FAT[1], the types by the number
of clusters) and "exFAT file system specification" (boot sector, VolumeFlags); Linux, fs/fat (the state byte).
"""

import struct
from typing import NamedTuple

BOOT_SIZE = 512
"""Bytes of a boot sector that the functions here need."""

HEAD_SIZE = 8
"""Bytes of the first FAT that the functions here need: its first two entries."""

_EXFAT = b"EXFAT   "
_BPB = struct.Struct("<11xHBHBHHBH8xII")  # up to the size of FAT32's table
_FAT12_CLUSTERS, _FAT16_CLUSTERS = 4085, 65525
_STATE_DIRTY = 0x01
_CLEAN = {16: 0x8000, 32: 0x08000000}  # bits of FAT[1]
_EXFAT_DIRTY, _EXFAT_FAILED = 0x0002, 0x0004


class FatVolume(NamedTuple):
    """The geometry of a FAT volume.

    Attributes:
        bits: Size of a FAT entry: 12, 16 or 32.
        table: Offset of the first FAT from the beginning of the volume, in bytes.
        media: The media byte, which is also the first byte of the FAT.
        is_in_use: Whether the boot sector is marked as in use.
    """

    bits: int
    table: int
    media: int
    is_in_use: bool


def is_exfat(sector: bytes) -> bool:
    """Return whether a volume's first sector is exFAT's: the name, and zeros where FAT has its geometry."""
    return sector[3:11] == _EXFAT and not any(sector[11:64])


def is_exfat_dirty(sector: bytes) -> bool:
    """Return whether an exFAT volume is marked as not unmounted, or its medium as failed."""
    flags = struct.unpack_from("<H", sector, 106)[0]
    return bool(flags & (_EXFAT_DIRTY | _EXFAT_FAILED))


def parse_fat(sector: bytes, size: int) -> FatVolume | None:
    """Parse the geometry in a first sector; None if the sector is not FAT's, or the volume would not fit.

    Args:
        sector: The first BOOT_SIZE bytes.
        size: Bytes of the partition that the volume is in.
    """
    if len(sector) < BOOT_SIZE or sector[0] not in (0xEB, 0xE9):
        return None
    sector_size, cluster, reserved, tables, entries, small, media, length, large, long = _BPB.unpack_from(sector)
    length, sectors = length or long, small or large
    if sector_size not in (512, 1024, 2048, 4096) or not cluster or cluster & (cluster - 1):
        return None
    if not reserved or not length or not 1 <= tables <= 4 or (media != 0xF0 and media < 0xF8) or not sectors:
        return None
    clusters = (sectors - reserved - tables * length - -(-32 * entries // sector_size)) // cluster
    if clusters <= 0 or sectors * sector_size > size:
        return None
    bits = 12 if clusters < _FAT12_CLUSTERS else 16 if clusters < _FAT16_CLUSTERS else 32
    # FAT32 has no fixed root folder; FAT12 and FAT16 always have one.
    if (bits == 32) == bool(entries):
        return None
    state = sector[65 if bits == 32 else 37]
    return FatVolume(bits, reserved * sector_size, media, bool(state & _STATE_DIRTY))


def is_fat_head(volume: FatVolume, head: bytes) -> bool:
    """Return whether these HEAD_SIZE bytes can be the beginning of the volume's FAT."""
    return len(head) == HEAD_SIZE and head[0] == volume.media


def is_fat_dirty(volume: FatVolume, head: bytes) -> bool:
    """Return whether a volume is marked as not unmounted, in its boot sector or in the second entry of its FAT."""
    if volume.is_in_use or volume.bits == 12:
        return volume.is_in_use
    second = int.from_bytes(head[2:4] if volume.bits == 16 else head[4:8], "little")
    return not second & _CLEAN[volume.bits]
