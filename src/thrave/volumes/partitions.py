"""Where the partitions of a disk lie, read from its MBR or GPT.

Only what is consistent is returned: a GPT's checksums must hold (those of its backup, if the first is damaged), every
partition must lie within the disk and overlap no other, and the chain of logical partitions must end. Dynamic disks and
Storage Spaces are refused, since their volumes are not their partitions. Nothing here reads what is in a partition.

Sources: UEFI 2.10 chapter 5 (MBR, GPT); Microsoft, "PARTITION_INFORMATION_GPT" (the types).

Where the file systems of a disk are: in its partitions, or, if it has none, the whole of it; and which they are.
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
"""Bytes of a sector; neither an MBR nor a GPT states it. A GPT's header stands in the second one."""


MOST_ENTRIES = 1024
"""Of a GPT; every program makes 128."""


MOST_LOGICAL = 256
"""Logical partitions of one extended one; Linux takes no more."""


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


# Reserved by Microsoft, and the BIOS's boot code: raw space by definition.
_WITHOUT_FILE_SYSTEM = {
    uuid.UUID("e3c9e316-0b5c-4db8-817d-f92df00215ae"),
    uuid.UUID("21686148-6449-6e6f-744e-656564454649"),
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


def has_table(sector: bytes) -> bool:
    """Whether a disk's first sector can be that of a partition table, by what every program writes there.

    A boot sector of a file system ends in the same two bytes, and has text or code where the entries would be.
    """
    entries = _entries(sector) if len(sector) >= SECTOR and sector[510:512] == _SIGNATURE else []
    return any(kind for _, kind, _, _ in entries) and all(active in (0x00, 0x80) for active, _, _, _ in entries)


def find_partitions(volume: Volume, is_known: Callable[[Partition], bool] = lambda _: False) -> list[Partition]:
    """The partitions of a disk that has a partition table (`has_table`), in the order of their offsets.

    Args:
        volume: The disk.
        is_known: Whether a known file system begins there. An MBR does not state the size of its sectors; this decides
            between sizes that are both possible.

    Raises:
        FileSystemUnsupportedError: Dynamic disk, or Storage Spaces.
        FileSystemCorruptError: The table contradicts itself or the disk.
        VolumeError: It cannot be read.
    """
    entries = _entries(read(volume, 0, SECTOR))
    kinds = {kind for _, kind, _, _ in entries}
    if _DYNAMIC in kinds:
        raise FileSystemUnsupportedError("it is a dynamic disk")
    if _PROTECTIVE in kinds:
        return _of_protected(volume, entries)
    found: list[list[Partition]] = []
    refusals: list[FileSystemCorruptError | FileSystemUnsupportedError] = []
    for sector_size in SECTOR_SIZES:
        try:
            found.append(_of_mbr(volume, entries, sector_size))
        except (FileSystemCorruptError, FileSystemUnsupportedError) as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    # Of two readings the one in which more file systems begin where they should; 512 if that does not tell.
    return max(found, key=lambda partitions: sum(map(is_known, partitions)))


def _entries(sector: bytes) -> list[tuple[int, int, int, int]]:
    return [_MBR_ENTRY.unpack_from(sector, 446 + 16 * index) for index in range(4)]


def _of_mbr(volume: Volume, entries: Sequence[tuple[int, int, int, int]], sector_size: int) -> list[Partition]:
    primary = _checked(
        [Partition(first * sector_size, count * sector_size) for _, kind, first, count in entries if kind != _EMPTY],
        volume.size,
    )
    extended = {
        Partition(first * sector_size, count * sector_size) for _, kind, first, count in entries if kind in _EXTENDED
    }
    logical = [
        one for outer in sorted(extended) for one in _checked(list(_logical(volume, outer, sector_size)), volume.size)
    ]
    return sorted([one for one in primary if one not in extended] + logical)


def _logical(volume: Volume, outer: Partition, sector_size: int) -> Iterator[Partition]:
    """The logical partitions in an extended one: a chain of tables, each with a partition and the next one's place."""
    at, seen = outer.offset, set[int]()
    end = outer.offset + outer.length
    while at not in seen:
        seen.add(at)
        sector = read(volume, at, SECTOR) if at + SECTOR <= end else b""
        if sector[510:512] != _SIGNATURE or len(seen) > MOST_LOGICAL:
            raise FileSystemCorruptError(f"the chain of its logical partitions breaks off at byte {at}")
        following = None
        for _, kind, first, count in _entries(sector):
            if kind in _EXTENDED:
                following = following or outer.offset + first * sector_size
            elif kind == _DYNAMIC:
                raise FileSystemUnsupportedError("it is a dynamic disk")
            elif kind != _EMPTY:
                place = Partition(at + first * sector_size, count * sector_size)
                if place.offset <= at or place.offset + place.length > end:
                    raise FileSystemCorruptError(
                        f"the logical partition at byte {place.offset} leaves the extended one"
                    )
                yield place
        if following is None:
            return
        at = following
    raise FileSystemCorruptError(f"the chain of its logical partitions comes back to byte {at}")


def _of_protected(volume: Volume, entries: Sequence[tuple[int, int, int, int]]) -> list[Partition]:
    """Those of a GPT. An MBR that names others beside the protective one (hybrid) mostly repeats some of them."""
    sector_size, partitions = _of_gpt(volume)
    places = {Partition(first * sector_size, count * sector_size)
              for _, kind, first, count in entries if kind not in (_EMPTY, _PROTECTIVE, *_EXTENDED)}  # fmt: skip
    return _checked([*partitions, *(places - {*partitions})], volume.size)


def _of_gpt(volume: Volume) -> tuple[int, list[Partition]]:
    """Its sector size in bytes, and its partitions, by the backup at the disk's end if the first one is damaged."""
    refusal = FileSystemCorruptError("its MBR says that there is a GPT, and there is none")
    for from_end in (False, True):
        for sector_size in SECTOR_SIZES:
            at = volume.size // sector_size * sector_size - sector_size if from_end else sector_size
            sector = read(volume, at, SECTOR) if at > 0 else b""
            if not sector.startswith(b"EFI PART"):
                continue
            try:
                return sector_size, list(_of_header(volume, sector, sector_size))
            except FileSystemCorruptError as error:
                refusal = refusal if from_end else error
    raise refusal


def _of_header(volume: Volume, sector: bytes, sector_size: int) -> Iterator[Partition]:
    fields = _GPT_HEADER.unpack_from(sector)
    length, header_checksum = fields[2:4]
    covered = sector[:16] + bytes(4) + sector[20:length]
    if not _GPT_HEADER.size <= length <= SECTOR or zlib.crc32(covered) != header_checksum:
        raise FileSystemCorruptError("its GPT header does not have its checksum")
    entries_at, count, size, checksum = fields[10:14]
    if count > MOST_ENTRIES or size not in (128, 256, 512):
        raise FileSystemCorruptError(f"its GPT claims {count} entries of {size} bytes")
    table = read(volume, entries_at * sector_size, count * size)
    if len(table) != count * size or zlib.crc32(table) != checksum:
        raise FileSystemCorruptError("the entries of its GPT do not have their checksum")
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


class FileSystem(StrEnum):
    """A kind of file system whose condition can be read."""

    NTFS = "NTFS"
    FAT = "FAT"
    EXFAT = "exFAT"


def find_volumes(volume: Volume) -> list[Partition]:
    """Where a file system may begin.

    A disk without a partition table is one place. A first sector can be read as a boot sector and as a partition table:
    the table counts if it is consistent, else the file system, if there is a known one.

    Raises:
        SkipRefusedError: It cannot be told for certain.
        VolumeError: The disk cannot be read.
    """
    whole = Partition(0, volume.size)
    if not has_table(read(volume, 0, SECTOR)):
        return [whole]
    try:
        return find_partitions(volume, lambda place: _is_known(volume, place))
    except FileSystemCorruptError:
        if _is_known(volume, whole):
            return [whole]
        raise


def kind_of(volume: Volume, place: Partition) -> FileSystem | None:
    """Which file system is at a place of the disk; None if it is none of those.

    Raises:
        FileSystemUnsupportedError: BitLocker or ReFS.
        VolumeError: The disk cannot be read.
    """
    with about(place):
        sector = read(volume, place.offset, min(ntfs_format.BOOT_SIZE, place.length))
        if ntfs_format.is_ntfs(sector):
            return FileSystem.NTFS
        if fat_format.is_exfat(sector):
            return FileSystem.EXFAT
        found = fat_format.fat_volume(sector, place.length)
        is_fat = found is not None and fat_format.is_fat_head(found, fat_head(volume, place, found))
        return FileSystem.FAT if is_fat else None


def fat_head(volume: Volume, place: Partition, found: fat_format.FatVolume) -> bytes:
    """The beginning of a FAT volume's first table. Raises VolumeError."""
    return read(volume, place.offset + found.table, fat_format.HEAD_SIZE)


def is_ntfs(volume: Volume, place: Partition) -> bool:
    """Whether there is an NTFS volume at a place of the disk. Raises as `kind_of`."""
    return kind_of(volume, place) is FileSystem.NTFS


def _is_known(volume: Volume, place: Partition) -> bool:
    try:
        return kind_of(volume, place) is not None
    except FileSystemUnsupportedError:
        return True


@contextmanager
def about(place: Partition) -> Iterator[None]:
    """Say which of the disk's volumes a refusal is about."""
    try:
        yield
    except SkipRefusedError as refusal:
        raise type(refusal)(of(place, refusal.reason)) from refusal


def of(place: Partition, reason: str) -> str:
    """Something said of one of the disk's volumes."""
    return f"of the volume at byte {place.offset}, {reason}"
