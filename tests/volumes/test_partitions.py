"""Search for volumes: MBR and GPT, logical partitions, both sector sizes, and disks without a partition table."""

import struct
import uuid
import zlib

import pytest

from support.disks.ntfs_disk import Damage
from thrave.volumes import fat_format, partitions
from thrave.volumes.errors import FileSystemCorruptError
from thrave.volumes.ntfs_volumes import Verdict, find_unclean
from thrave.volumes.partitions import MAX_LOGICAL, Partition, find_partitions

MIB = 1 << 20
BASIC = uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")


def blank(size=64 * MIB):
    return Damage(bytearray(size), 0)


def table(disk, *entries, at=0, active=0):
    """Write an MBR or one of the tables of logical partitions: (type, first sector, sectors)."""
    packed = b"".join(struct.pack("<B3xB3xII", active, *entry) for entry in entries)
    disk.put(at + 446, packed.ljust(64, b"\0") + b"\x55\xaa")


def fat16(disk, at=0, *, size=40 * MIB, second=0xFFFF, state=0, text=True, sector=512):
    """A FAT16 volume, whose boot code has a message where a partition table would be."""
    boot = bytearray(512)
    boot[:11] = b"\xeb\x3c\x90MSDOS5.0"
    geometry = (sector, 4 * 512 // sector or 1, 1, 2, 512, 0, 0xF8, 80, 63, 255, 0, size // sector)
    struct.pack_into("<HBHBHHBHHHII", boot, 11, *geometry)
    boot[36:39] = bytes([0x80, state, 0x29])
    if text:
        words = b"This disk cannot start a machine.\r\nRemove it and press any key\r\n"
        boot[506 - len(words) : 506] = words
    boot[510:] = b"\x55\xaa"
    disk.put(at, boot)
    disk.put(at + sector, struct.pack("<HH", 0xFFF8, second))


def fat32(disk, at=0, *, second=0x0FFFFFFF, state=0):
    boot = bytearray(512)
    boot[:11] = b"\xeb\x58\x90MSDOS5.0"
    struct.pack_into("<HBHBHHBHHHII", boot, 11, 512, 1, 32, 2, 0, 0, 0xF8, 0, 63, 255, 0, 60 * MIB // 512)
    struct.pack_into("<I", boot, 36, 900)
    boot[65] = state
    boot[510:] = b"\x55\xaa"
    disk.put(at, boot)
    disk.put(at + 32 * 512, struct.pack("<II", 0x0FFFFFF8, second))


def exfat(disk, at=0, *, flags=0):
    boot = bytearray(512)
    boot[:11] = b"\xeb\x76\x90EXFAT   "
    struct.pack_into("<H", boot, 106, flags)
    boot[510:] = b"\x55\xaa"
    disk.put(at, boot)


def gpt(disk, *entries, at, sector, entries_at, mangle=False):
    """Write a GPT header and its table; entries in sectors."""
    packed = bytearray(128 * 128)
    for index, (first, last) in enumerate(entries):
        struct.pack_into("<16s16sQQ", packed, 128 * index, BASIC.bytes_le, bytes(16), first, last)
    fields = [b"EFI PART", 0x10000, 92, 0, 0, 1, 0, 0, 0, bytes(16), entries_at, 128, 128, zlib.crc32(packed)]
    fields[3] = zlib.crc32(struct.pack("<8s4I4Q16sQ3I", *fields))
    disk.put(at * sector, struct.pack("<8s4I4Q16sQ3I", *fields))
    if mangle:
        disk.put(at * sector + 20, b"\xff")
    disk.put(entries_at * sector, packed)


def test_logical_partitions_are_found():
    disk = blank()
    table(disk, (0x07, 2048, 2048), (0x0F, 8192, 100_000))
    table(disk, (0x07, 2048, 4096), (0x05, 16384, 20000), at=8192 * 512)
    table(disk, (0x07, 63, 1000), (0x05, 40000, 20000), at=(8192 + 16384) * 512)
    table(disk, (0x07, 63, 1000), at=(8192 + 40000) * 512)
    assert find_partitions(disk) == [
        Partition(first * 512, count * 512)
        for first, count in ((2048, 2048), (8192 + 2048, 4096), (8192 + 16384 + 63, 1000), (8192 + 40000 + 63, 1000))
    ]


@pytest.mark.parametrize("back_to", [0, 1000])
def test_cyclic_chain_of_logical_partitions_is_refused(back_to):
    disk = blank()
    table(disk, (0x05, 2048, 100_000))
    table(disk, (0x07, 63, 100), (0x05, 1000, 100), at=2048 * 512)
    table(disk, (0x07, 63, 100), (0x05, back_to, 100), at=(2048 + 1000) * 512)
    with pytest.raises(FileSystemCorruptError, match="returns to"):
        find_partitions(disk)


def test_long_chain_of_logical_partitions_is_refused():
    disk = blank()
    table(disk, (0x05, 2048, 100_000))
    for index in range(MAX_LOGICAL + 2):
        table(disk, (0x07, 1, 1), (0x05, 4 * (index + 1), 4), at=(2048 + 4 * index) * 512)
    with pytest.raises(FileSystemCorruptError, match="is broken at"):
        find_partitions(disk)


@pytest.mark.parametrize(
    ("logical", "words"),
    [
        ([(0x07, 2048, 200_000)], "leaves the extended one"),
        ([(0x07, 0, 10)], "leaves the extended one"),
        ([(0x07, 63, 10), (0x05, 200_000, 10)], "is broken at"),
        ([(0x07, 63, 10), (0x05, 500, 10)], "is broken at"),  # there is no table
        ([(0x07, 63, 10), (0x07, 64, 10)], "overlaps"),
    ],
)
def test_contradictory_chain_of_logical_partitions_is_refused(logical, words):
    disk = blank()
    table(disk, (0x05, 2048, 100_000))
    table(disk, *logical, at=2048 * 512)
    with pytest.raises(FileSystemCorruptError, match=words):
        find_partitions(disk)


def test_dirty_volume_in_logical_partition_is_unclean():
    disk = blank()
    table(disk, (0x0F, 2048, 120_000))
    table(disk, (0x06, 63, 40 * MIB // 512), at=2048 * 512)
    fat16(disk, (2048 + 63) * 512, second=0x7FFF)
    ((verdict, message),) = find_unclean(disk)
    assert verdict is Verdict.UNCLEAN
    assert message.startswith(f"volume at byte {(2048 + 63) * 512}: its FAT is marked as in use")


def test_mbr_with_4096_byte_sectors_is_read():
    disk = blank()
    table(disk, (0x07, 256, 2560), (0x05, 4096, 4096))
    table(disk, (0x07, 256, 2560), at=4096 * 4096)
    for first in (256, 4096 + 256):
        exfat(disk, first * 4096)
    places = partitions.find_volumes(disk)
    assert places == [Partition(first * 4096, 2560 * 4096) for first in (256, 4096 + 256)]


def test_mbr_has_512_byte_sectors_unless_file_systems_differ():
    disk = blank()
    table(disk, (0x07, 256, 2560))
    assert partitions.find_volumes(disk) == [Partition(256 * 512, 2560 * 512)]


@pytest.mark.parametrize("sector", [512, 4096])
def test_backup_gpt_is_used_if_the_primary_is_damaged(sector):
    disk = blank()
    last = disk.size // sector - 1
    first = MIB // sector
    table(disk, (0xEE, 1, 0xFFFFFFFF))
    gpt(disk, (first, first + 99), at=1, sector=sector, entries_at=2, mangle=True)
    with pytest.raises(FileSystemCorruptError, match="checksum of its GPT header"):
        find_partitions(disk)
    gpt(disk, (first, first + 99), at=last, sector=sector, entries_at=last - 128 * 128 // sector)
    assert find_partitions(disk) == [Partition(MIB, 100 * sector)]
    disk.put(sector, bytes(512))  # wiped
    assert find_partitions(disk) == [Partition(MIB, 100 * sector)]


def test_hybrid_mbr_adds_partitions_that_the_gpt_lacks():
    disk = blank()
    table(disk, (0xEE, 1, 2047), (0x07, 2048, 2048), (0x0C, 8192, 2048))
    gpt(disk, (2048, 4095), (4096, 8191), at=1, sector=512, entries_at=2)
    assert find_partitions(disk) == [Partition(first * 512, 512 * count) for first, count in
                                     ((2048, 2048), (4096, 4096), (8192, 2048))]  # fmt: skip


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("make", [fat16, lambda disk, text: fat32(disk), lambda disk, text: exfat(disk)])
def test_clean_disk_without_partitions_is_clean(make, text):
    disk = blank()
    make(disk, text=text)
    assert find_unclean(disk) == []


def test_fat_whose_table_names_itself_is_one_volume():
    disk = blank()
    fat16(disk, text=False)
    disk.put(446, struct.pack("<B3xB3xII", 0x80, 0x06, 0, 81920))  # mkfs.fat --mbr
    assert partitions.find_volumes(disk) == [Partition(0, disk.size)]


def test_partition_table_takes_precedence_over_remains_of_a_boot_sector():
    disk = blank()
    fat16(disk, text=False)
    table(disk, (0x07, 2048, 2048))
    assert partitions.find_volumes(disk) == [Partition(2048 * 512, 2048 * 512)]


@pytest.mark.parametrize(
    "make",
    [
        lambda disk: fat16(disk, second=0x7FFF),
        lambda disk: fat16(disk, state=1),
        lambda disk: fat32(disk, second=0x07FFFFFF),
        lambda disk: fat32(disk, state=1),
        lambda disk: fat16(disk, size=1 * MIB, state=1),  # FAT12
        lambda disk: exfat(disk, flags=2),
        lambda disk: exfat(disk, flags=4),
    ],
)
def test_volume_that_was_not_unmounted_is_unclean(make):
    disk = blank()
    make(disk)
    ((verdict, message),) = find_unclean(disk)
    assert verdict is Verdict.UNCLEAN
    assert "marked as in use" in message


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (11, b"\0\0"),
        (13, b"\0"),
        (13, b"\3"),
        (14, b"\0\0"),
        (16, b"\0"),
        (21, b"\x10"),
        (22, b"\0\0"),
        (32, b"\xff" * 4),
    ],
)
def test_boot_sector_with_impossible_values_is_not_fat(offset, value):
    disk = blank()
    fat16(disk)
    disk.put(offset, value)
    assert fat_format.parse_fat(bytes(disk.disk[:512]), disk.size) is None or offset == 22
    ((verdict, _),) = find_unclean(disk)
    assert verdict is Verdict.NOT_CHECKED
