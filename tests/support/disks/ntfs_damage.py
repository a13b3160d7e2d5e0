"""Ways to damage a Windows-like disk: each function returns a function that changes a `Damage`."""

import struct
import uuid
import zlib
from collections.abc import Callable
from typing import Any

from support.disks.ntfs_disk import CLUSTER, HIBERNATION, Damage

Harm = Callable[[Damage], object]

DYNAMIC = uuid.UUID("af9b60a0-1431-4f62-bc68-3311714a69ad")
STORAGE_SPACES = uuid.UUID("e75caf8f-f680-4cee-afa3-b001e56efc2d")
RESERVED = uuid.UUID("e3c9e316-0b5c-4db8-817d-f92df00215ae")
BASIC = uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")


def flags(value: int) -> Harm:
    """Set the flags of the volume."""
    return lambda damage: damage.set_flags(value)


def log(*pages: bytes) -> Harm:
    """Replace the beginning of $LogFile."""
    return lambda damage: damage.put(damage.content(2), b"".join(pages))


def hibernation_head(head: bytes) -> Harm:
    """Replace the beginning of hiberfil.sys."""
    return lambda damage: damage.put(damage.disk.find(HIBERNATION * 2) - CLUSTER, head)


def boot(offset: int, layout: str, *values: object) -> Harm:
    """Replace a field of the boot sector."""
    return lambda damage: damage.put(damage.at + offset, struct.pack(layout, *values))


def partition_entry(index: int, kind: int, first: int, count: int) -> Harm:
    """Replace an entry of the MBR; in sectors."""
    return lambda damage: damage.put(446 + 16 * index, struct.pack("<B3xB3xII", 0, kind, first, count))


def gpt(
    *entries: tuple[uuid.UUID, int, int],
    sector_size: int = 512,
    mangle: Callable[[bytearray, bytearray], object] = lambda _header, _table: None,
) -> Harm:
    """Replace the MBR by a GPT with these (type, first byte, bytes)."""

    def write(damage: Damage) -> None:
        table = bytearray(128 * 128)
        for index, (kind, start, length) in enumerate(entries):
            first, last = start // sector_size, (start + length) // sector_size - 1
            struct.pack_into("<16s16sQQ", table, 128 * index, kind.bytes_le, uuid.uuid4().bytes_le, first, last)
        fields: list[Any] = [b"EFI PART", 0x10000, 92, 0, 0, 1, 0, 0, 0, bytes(16), 2, 128, 128, zlib.crc32(table)]
        fields[3] = zlib.crc32(struct.pack("<8s4I4Q16sQ3I", *fields))
        header = bytearray(struct.pack("<8s4I4Q16sQ3I", *fields))
        mangle(header, table)
        damage.put(446, struct.pack("<B3xB3xII", 0, 0xEE, 1, 0xFFFFFFFF) + bytes(48))
        damage.put(sector_size, header)
        damage.put(2 * sector_size, table)

    return write
