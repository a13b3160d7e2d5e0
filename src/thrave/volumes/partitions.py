"""Finds the partitions of a disk (MBR or GPT), and the kinds of their file systems.

Only consistent tables are accepted: a GPT must have correct checksums (its backup, if the first one is damaged), every
partition must be within the disk and overlap no other, and the chain of logical partitions must end. Dynamic disks and
Storage Spaces are refused, since their volumes are not partitions.

Sources: UEFI 2.10 chapter 5 (MBR, GPT); Microsoft, "PARTITION_INFORMATION_GPT" (the types).
"""

import struct
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import NamedTuple

from thrave.volumes import fat_format, ntfs_format
from thrave.volumes.base import Volume
from thrave.volumes.errors import FileSystemCorruptError, FileSystemUnsupportedError, SkipRefusedError

SECTOR = 512

SECTOR_SIZES = (512, 4096)
"""Bytes of a sector. Neither an MBR nor a GPT records it; a GPT's header is in the second sector."""

MAX_ENTRIES = 1024
"""Entries of a GPT; all programs create 128."""

MAX_LOGICAL = 256
"""Logical partitions in one extended partition; Linux supports no more."""

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

# Microsoft Reserved, and BIOS boot: never with a file system.
_WITHOUT_FILE_SYSTEM = {
    uuid.UUID("e3c9e316-0b5c-4db8-817d-f92df00215ae"),
    uuid.UUID("21686148-6449-6e6f-744e-656564454649"),
}


class Partition(NamedTuple):
    """A range of the disk, in bytes."""

    offset: int
    length: int


class FileSystem(StrEnum):
    """A kind of file system that can be checked for a clean shutdown."""

    NTFS = "NTFS"
    FAT = "FAT"
    EXFAT = "exFAT"


def read_bytes(volume: Volume, offset: int, length: int) -> bytes:
    """Return bytes of a volume; fewer at its end.

    Args:
        volume: The volume.
        offset: In bytes.
        length: In bytes; the caller must limit it, since all of them are kept in memory.

    Raises:
        VolumeError: The volume cannot be read.
    """
    buffer = bytearray(max(0, min(length, volume.size - offset)))
    volume.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def has_table(sector: bytes) -> bool:
    """Return whether a disk's first sector can be a partition table.

    The boot sector of a file system has the same two bytes at its end, but text or code where the entries would be.
    """
    entries = _entries(sector) if len(sector) >= SECTOR and sector[510:512] == _SIGNATURE else []
    return any(kind for _, kind, _, _ in entries) and all(active in (0x00, 0x80) for active, _, _, _ in entries)


def find_partitions(volume: Volume, is_known: Callable[[Partition], bool] = lambda _: False) -> list[Partition]:
    """Return the partitions of a disk with a partition table (`has_table`), in the order of their offsets.

    Args:
        volume: The disk.
        is_known: Whether a partition begins with a known file system. An MBR does not record the size of its sectors;
            this decides if both sizes are possible.

    Raises:
        FileSystemUnsupportedError: Dynamic disk, or Storage Spaces.
        FileSystemCorruptError: The table contradicts itself or the disk.
        VolumeError: The disk cannot be read.
    """
    entries = _entries(read_bytes(volume, 0, SECTOR))
    kinds = {kind for _, kind, _, _ in entries}
    if _DYNAMIC in kinds:
        raise FileSystemUnsupportedError("it is a dynamic disk")
    if _PROTECTIVE in kinds:
        return _read_protected(volume, entries)
    found: list[list[Partition]] = []
    refusals: list[FileSystemCorruptError | FileSystemUnsupportedError] = []
    for sector_size in SECTOR_SIZES:
        try:
            found.append(_read_mbr(volume, entries, sector_size))
        except (FileSystemCorruptError, FileSystemUnsupportedError) as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    # Both sizes are possible: use the one with more known file systems; 512 if they have the same number.
    return max(found, key=lambda partitions: sum(map(is_known, partitions)))


def _entries(sector: bytes) -> list[tuple[int, int, int, int]]:
    return [_MBR_ENTRY.unpack_from(sector, 446 + 16 * index) for index in range(4)]


def _read_mbr(volume: Volume, entries: Sequence[tuple[int, int, int, int]], sector_size: int) -> list[Partition]:
    primary = _checked(
        [Partition(first * sector_size, count * sector_size) for _, kind, first, count in entries if kind != _EMPTY],
        volume.size,
    )
    extended = {
        Partition(first * sector_size, count * sector_size) for _, kind, first, count in entries if kind in _EXTENDED
    }
    logical = [
        partition
        for outer in sorted(extended)
        for partition in _checked(list(_read_logical(volume, outer, sector_size)), volume.size)
    ]
    return sorted([partition for partition in primary if partition not in extended] + logical)


def _read_logical(volume: Volume, outer: Partition, sector_size: int) -> Iterator[Partition]:
    """Yield the logical partitions in an extended one: a chain of tables, each with a partition and the next offset."""
    offset, seen = outer.offset, set[int]()
    end = outer.offset + outer.length
    while offset not in seen:
        seen.add(offset)
        sector = read_bytes(volume, offset, SECTOR) if offset + SECTOR <= end else b""
        if sector[510:512] != _SIGNATURE or len(seen) > MAX_LOGICAL:
            raise FileSystemCorruptError(f"the chain of its logical partitions is broken at byte {offset}")
        following = None
        for _, kind, first, count in _entries(sector):
            if kind in _EXTENDED:
                following = following or outer.offset + first * sector_size
            elif kind == _DYNAMIC:
                raise FileSystemUnsupportedError("it is a dynamic disk")
            elif kind != _EMPTY:
                partition = Partition(offset + first * sector_size, count * sector_size)
                if partition.offset <= offset or partition.offset + partition.length > end:
                    raise FileSystemCorruptError(
                        f"the logical partition at byte {partition.offset} leaves the extended one"
                    )
                yield partition
        if following is None:
            return
        offset = following
    raise FileSystemCorruptError(f"the chain of its logical partitions returns to byte {offset}")


def _read_protected(volume: Volume, entries: Sequence[tuple[int, int, int, int]]) -> list[Partition]:
    """Return the partitions of a GPT, and those that only its MBR has.

    A hybrid MBR names partitions in addition to the protective one; mostly they are in the GPT, too.
    """
    sector_size, partitions = _read_gpt(volume)
    hybrid = {
        Partition(first * sector_size, count * sector_size)
        for _, kind, first, count in entries
        if kind not in (_EMPTY, _PROTECTIVE, *_EXTENDED)
    }
    return _checked([*partitions, *(hybrid - {*partitions})], volume.size)


def _read_gpt(volume: Volume) -> tuple[int, list[Partition]]:
    """Return sector size in bytes and partitions; from the backup at the end of the disk if the first is damaged."""
    refusal = FileSystemCorruptError("its MBR announces a GPT, but there is none")
    for from_end in (False, True):
        for sector_size in SECTOR_SIZES:
            offset = volume.size // sector_size * sector_size - sector_size if from_end else sector_size
            sector = read_bytes(volume, offset, SECTOR) if offset > 0 else b""
            if not sector.startswith(b"EFI PART"):
                continue
            try:
                return sector_size, list(_read_gpt_entries(volume, sector, sector_size))
            except FileSystemCorruptError as error:
                refusal = refusal if from_end else error
    raise refusal


def _read_gpt_entries(volume: Volume, sector: bytes, sector_size: int) -> Iterator[Partition]:
    fields = _GPT_HEADER.unpack_from(sector)
    length, header_checksum = fields[2:4]
    covered = sector[:16] + bytes(4) + sector[20:length]
    if not _GPT_HEADER.size <= length <= SECTOR or zlib.crc32(covered) != header_checksum:
        raise FileSystemCorruptError("the checksum of its GPT header is wrong")
    entries_at, count, size, checksum = fields[10:14]
    if count > MAX_ENTRIES or size not in (128, 256, 512):
        raise FileSystemCorruptError(f"its GPT claims {count} entries of {size} bytes")
    table = read_bytes(volume, entries_at * sector_size, count * size)
    if len(table) != count * size or zlib.crc32(table) != checksum:
        raise FileSystemCorruptError("the checksum of its GPT entries is wrong")
    for index in range(count):
        kind, _, first, last = _GPT_ENTRY.unpack_from(table, index * size)
        if reason := _UNSUPPORTED_TYPES.get(uuid.UUID(bytes_le=kind)):
            raise FileSystemUnsupportedError(reason)
        if any(kind) and uuid.UUID(bytes_le=kind) not in _WITHOUT_FILE_SYSTEM:
            yield Partition(first * sector_size, (last - first + 1) * sector_size)


def _checked(partitions: Sequence[Partition], disk_size: int) -> list[Partition]:
    end = 0
    for offset, length in sorted(partitions):
        if offset < max(end, SECTOR) or length <= 0 or offset + length > disk_size:
            raise FileSystemCorruptError(f"the partition at byte {offset} overlaps another or leaves the disk")
        end = offset + length
    return sorted(partitions)


def find_volumes(volume: Volume) -> list[Partition]:
    """Return where file systems may begin: the partitions, or the whole disk if it has no partition table.

    A first sector can look like both a boot sector and a partition table. Then the table is used if it is consistent,
    otherwise a known file system.

    Raises:
        SkipRefusedError: The partitions cannot be determined reliably.
        VolumeError: The disk cannot be read.
    """
    whole = Partition(0, volume.size)
    if not has_table(read_bytes(volume, 0, SECTOR)):
        return [whole]
    try:
        return find_partitions(volume, lambda partition: _is_known(volume, partition))
    except FileSystemCorruptError:
        if _is_known(volume, whole):
            return [whole]
        raise


def detect_file_system(volume: Volume, partition: Partition) -> FileSystem | None:
    """Return the kind of file system in a partition; None for another kind or none.

    Raises:
        FileSystemUnsupportedError: BitLocker or ReFS.
        VolumeError: The disk cannot be read.
    """
    with located_errors(partition):
        sector = read_bytes(volume, partition.offset, min(ntfs_format.BOOT_SIZE, partition.length))
        if ntfs_format.is_ntfs(sector):
            return FileSystem.NTFS
        if fat_format.is_exfat(sector):
            return FileSystem.EXFAT
        fat = fat_format.parse_fat(sector, partition.length)
        is_fat = fat is not None and fat_format.is_fat_head(fat, read_fat_head(volume, partition, fat))
        return FileSystem.FAT if is_fat else None


def read_fat_head(volume: Volume, partition: Partition, fat: fat_format.FatVolume) -> bytes:
    """Return the first fat_format.HEAD_SIZE bytes of a FAT volume's first table. Raises VolumeError."""
    return read_bytes(volume, partition.offset + fat.table, fat_format.HEAD_SIZE)


def _is_known(volume: Volume, partition: Partition) -> bool:
    try:
        return detect_file_system(volume, partition) is not None
    except FileSystemUnsupportedError:
        return True


@contextmanager
def located_errors(partition: Partition) -> Iterator[None]:
    """Add the location of the volume to a SkipRefusedError."""
    try:
        yield
    except SkipRefusedError as refusal:
        raise type(refusal)(locate(partition, refusal.reason)) from refusal


def locate(partition: Partition, reason: str) -> str:
    """Return a message about one volume of a disk."""
    return f"volume at byte {partition.offset}: {reason}"
