"""Where the partitions of a disk lie, read from its MBR or GPT.

Only what can be believed is told: a GPT's checksums must hold, every partition must lie within the disk and overlap no
other. Dynamic disks and Storage Spaces are refused, since their volumes are not their partitions. Logical partitions,
those in an extended one, are not looked for. Nothing here looks into a partition.

Sources: UEFI 2.10 chapter 5 (MBR, GPT); Microsoft, "PARTITION_INFORMATION_GPT" (the types).
"""

import struct
import uuid
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from thrave.volumes.errors import FileSystemCorruptError, FileSystemUnsupportedError
from thrave.volumes.volume import Volume

SECTOR = 512
GPT_SECTORS = (512, 4096)
"""Bytes of a sector; a GPT's header says nothing of it, and stands in the second one."""

MOST_ENTRIES = 1024
"""Of a GPT; every program makes 128."""

_SIGNATURE = b"\x55\xaa"
_MBR_ENTRY = struct.Struct("<B3xB3xII")  # active, type, first sector, sectors
_GPT_HEADER = struct.Struct("<8sIIII4Q16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQ")
_PROTECTIVE, _DYNAMIC, _EMPTY, _EXTENDED = 0xEE, 0x42, 0x00, (0x05, 0x0F, 0x85)

_UNSUPPORTED_TYPES = {
    uuid.UUID("5808c8aa-7e8f-42e0-85d2-e1e90434cfb3"): "it is a dynamic disk",
    uuid.UUID("af9b60a0-1431-4f62-bc68-3311714a69ad"): "it is a dynamic disk",
    uuid.UUID("e75caf8f-f680-4cee-afa3-b001e56efc2d"): "it belongs to Storage Spaces",
}


class Partition(NamedTuple):
    """A run of the disk, in bytes."""

    offset: int
    length: int


def read(volume: Volume, offset: int, length: int) -> bytes:
    """What stands there, at most to the volume's end.

    Args:
        volume: What to read.
        offset: In bytes.
        length: In bytes; the caller has made sure that it is small.

    Raises:
        VolumeError: It cannot be read.
    """
    buffer = bytearray(max(0, min(length, volume.size - offset)))
    volume.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def find_partitions(volume: Volume) -> list[Partition]:
    """The partitions in the order of their offsets; none if the disk has no partition table.

    Raises:
        FileSystemUnsupportedError: Dynamic disk, or Storage Spaces.
        FileSystemCorruptError: The table contradicts itself or the disk.
        VolumeError: It cannot be read.
    """
    sector = read(volume, 0, SECTOR)
    if sector[510:512] != _SIGNATURE:
        return []
    entries = [_MBR_ENTRY.unpack_from(sector, 446 + 16 * index) for index in range(4)]
    kinds = {kind for _, kind, _, _ in entries}
    if _DYNAMIC in kinds:
        raise FileSystemUnsupportedError("it is a dynamic disk")
    if _PROTECTIVE in kinds:
        return _checked(list(_of_gpt(volume)), volume.size)
    primary = [entry for entry in entries if entry[1] not in (_EMPTY, *_EXTENDED)]
    return _checked([Partition(first * SECTOR, count * SECTOR) for _, _, first, count in primary], volume.size)


def _of_gpt(volume: Volume) -> Iterator[Partition]:
    sector_size, header = _gpt_header(volume)
    entries_at, count, size, checksum = header[10:14]
    if count > MOST_ENTRIES or size not in (128, 256, 512):
        raise FileSystemCorruptError(f"its GPT claims {count} entries of {size} bytes")
    table = read(volume, entries_at * sector_size, count * size)
    if len(table) != count * size or zlib.crc32(table) != checksum:
        raise FileSystemCorruptError("the entries of its GPT do not have their checksum")
    for index in range(count):
        kind, _, first, last = _GPT_ENTRY.unpack_from(table, index * size)
        if reason := _UNSUPPORTED_TYPES.get(uuid.UUID(bytes_le=kind)):
            raise FileSystemUnsupportedError(reason)
        if any(kind):
            yield Partition(first * sector_size, (last - first + 1) * sector_size)


def _gpt_header(volume: Volume) -> tuple[int, tuple[int, ...]]:
    """The sector's size in bytes, and the header's fields as `_GPT_HEADER` has them."""
    for sector_size in GPT_SECTORS:
        sector = read(volume, sector_size, SECTOR)
        if not sector.startswith(b"EFI PART"):
            continue
        fields = _GPT_HEADER.unpack_from(sector)
        length, checksum = fields[2:4]
        covered = sector[:16] + bytes(4) + sector[20:length]
        if not _GPT_HEADER.size <= length <= SECTOR or zlib.crc32(covered) != checksum:
            raise FileSystemCorruptError("its GPT header does not have its checksum")
        return sector_size, fields
    raise FileSystemCorruptError("its MBR says that there is a GPT, and there is none")


def _checked(partitions: Sequence[Partition], disk_size: int) -> list[Partition]:
    end = 0
    for offset, length in sorted(partitions):
        if offset < max(end, SECTOR) or length <= 0 or offset + length > disk_size:
            raise FileSystemCorruptError(f"the partition at byte {offset} overlaps another or leaves the disk")
        end = offset + length
    return sorted(partitions)
