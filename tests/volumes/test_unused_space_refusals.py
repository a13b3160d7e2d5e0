"""`skip_unused` on disks that must be refused, and on unusual disks that must be accepted."""

import random
import struct
from pathlib import Path

import pytest

from support.disks.ntfs_damage import (
    BASIC,
    DYNAMIC,
    STORAGE_SPACES,
    boot,
    flags,
    gpt,
    hibernation_head,
    log,
    partition_entry,
)
from support.disks.ntfs_disk import CLUSTER, HIBERNATION, Damage, make_windows_disk, restart_page
from thrave.volumes import ntfs_sandbox, ntfs_scan
from thrave.volumes.base import Extent
from thrave.volumes.errors import (
    FileSystemCorruptError,
    FileSystemUnsupportedError,
    NoFileSystemError,
    SkipRefusedError,
    VolumeNotCleanError,
)
from thrave.volumes.ntfs_volumes import exclude_unused
from thrave.volumes.partitions import read_bytes


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    return make_windows_disk(tmp_path_factory.mktemp("windows") / "disk.raw")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Scan in this process; test_ntfs_sandbox.py tests the confined process."""
    monkeypatch.setattr(ntfs_sandbox, "scan_unused", unused_in_this_process)


def unused_in_this_process(volume, place):
    return [Extent(place.offset + offset, length) for offset, length in ntfs_scan.find_unused(Source(volume, place))]


class Source:
    """A partition as the source of a scan."""

    def __init__(self, volume, place):
        self.size = place.length
        self.read = lambda offset, length: read_bytes(volume, place.offset + offset, length)


@pytest.fixture
def damage(windows):
    return Damage.to(windows.path)


def unused_of(damage):
    """Number of bytes that `skip_unused` leaves out."""
    return damage.size - sum(length for _, length in exclude_unused(damage, Path("disk.raw")).extents())


def free_a_used_cluster(damage):
    """Mark a cluster of pagefile.sys as free in $Bitmap."""
    at, mask = damage.bits(58961920 // CLUSTER + 9)
    damage.disk[at] &= ~mask


def share_a_cluster(windows):
    one, other = (file for file in windows.files if file.path.endswith(("ntoskrnl.exe", "update09.cab")))

    def link(damage):
        record = damage.record_at_cluster(one.runs[0].offset // CLUSTER)
        _, place, size = damage.first_run(record)
        damage.put(place, (other.runs[0].offset // CLUSTER).to_bytes(size, "little"))

    return link


def change_the_mirror(damage):
    damage.put(damage.mirror() + 200, b"X")


def cut_a_write(damage):
    for place in (damage.mirror(), damage.record(0)):
        damage.put(place + 510, b"\xaa\x55")


def mark_as_bad(damage):
    damage.put(damage.record_at_cluster(58961920 // CLUSTER), b"BAAD")  # pagefile.sys


def shrink_the_bitmap(damage):
    attribute = damage.attribute(damage.record(6), 0x80)
    damage.put(attribute + 48, struct.pack("<Q", 100))


@pytest.mark.parametrize(
    ("harm", "error", "text"),
    [
        (flags(0x0001), VolumeNotCleanError, "dirty.*chkdsk"),
        (flags(0x4000), VolumeNotCleanError, "dirty"),
        (log(restart_page(clients=0)), VolumeNotCleanError, "log was not closed"),
        (log(restart_page(clients=0, flags=2), restart_page(clients=0, lsn=6)), VolumeNotCleanError, "not closed"),
        (log(restart_page(version=(2, 0))), VolumeNotCleanError, "version 2.0: shut Windows down fully"),
        (log(bytes(4096)), FileSystemCorruptError, "no restart page"),
        (hibernation_head(b"hibr"), VolumeNotCleanError, "hibernated"),
        (hibernation_head(b"HIBR"), VolumeNotCleanError, "hibernated"),
        (hibernation_head(b"RSTR"), VolumeNotCleanError, "hibernated"),
        (boot(3, "8s", b"-FVE-FS-"), FileSystemUnsupportedError, "BitLocker"),
        (boot(3, "8s", b"ReFS"), FileSystemUnsupportedError, "ReFS"),
        (boot(3, "8s", b"MSDOS5.0"), NoFileSystemError, "no NTFS"),
        (boot(11, "<H", 0), FileSystemCorruptError, "boot sector"),
        (boot(11, "<H", 513), FileSystemCorruptError, "boot sector"),
        (boot(13, "<B", 3), FileSystemCorruptError, "boot sector"),
        (boot(13, "<B", 0x81), FileSystemCorruptError, "boot sector"),
        (boot(40, "<Q", 1 << 62), FileSystemCorruptError, "boot sector"),
        (boot(48, "<Q", 1 << 40), FileSystemCorruptError, "boot sector"),
        (boot(64, "<b", -128), FileSystemCorruptError, "boot sector"),
        (boot(64, "<b", 0), FileSystemCorruptError, "boot sector"),
        (change_the_mirror, FileSystemCorruptError, "MFTMirr"),
        (cut_a_write, FileSystemCorruptError, "it cannot be read"),
        (mark_as_bad, FileSystemCorruptError, "marked as bad"),
        (shrink_the_bitmap, FileSystemCorruptError, "Bitmap has 100 bytes"),
        (free_a_used_cluster, FileSystemCorruptError, "not its own"),
        (partition_entry(1, 0x42, 0, 0), FileSystemUnsupportedError, "dynamic"),
        (partition_entry(1, 0x07, 2048, 1), FileSystemCorruptError, "overlaps"),
        (partition_entry(1, 0x07, 1 << 31, 1), FileSystemCorruptError, "leaves the disk"),
        (partition_entry(3, 0x0F, 131072 - 100, 1 << 31), FileSystemCorruptError, "leaves the disk"),
        (partition_entry(0, 0xEE, 1, 1), FileSystemCorruptError, "there is none"),
        (partition_entry(0, 0x00, 0, 0), NoFileSystemError, "no NTFS"),
        (gpt((DYNAMIC, 1 << 20, 63 << 20)), FileSystemUnsupportedError, "dynamic"),
        (gpt((STORAGE_SPACES, 1 << 20, 63 << 20)), FileSystemUnsupportedError, "Storage Spaces"),
        (gpt((BASIC, 1 << 20, 64 << 20)), FileSystemCorruptError, "leaves the disk"),
        (gpt((BASIC, 1 << 20, -512)), FileSystemCorruptError, "leaves the disk"),
        (gpt((BASIC, 1 << 20, 63 << 20), mangle=lambda header, _: header.__setitem__(30, 1)),
         FileSystemCorruptError, "checksum of its GPT header"),
        (gpt((BASIC, 1 << 20, 63 << 20), mangle=lambda _, table: table.__setitem__(60, 1)),
         FileSystemCorruptError, "checksum of its GPT entries"),
    ],
)  # fmt: skip
def test_scan_refuses_volume_with_reason(damage, harm, error, text):
    harm(damage)
    with pytest.raises(SkipRefusedError, match=text) as refused:
        unused_of(damage)
    assert type(refused.value) is error
    assert "disk.raw: cannot leave out what is unused: " in str(refused.value)


def test_scan_refuses_files_that_share_clusters(windows, damage):
    share_a_cluster(windows)(damage)
    with pytest.raises(FileSystemCorruptError, match="not its own"):
        unused_of(damage)


@pytest.mark.parametrize("size", [100, 4096], ids="{} bytes".format)
def test_scan_refuses_truncated_hibernation_file(damage, windows, size):
    """As ntfs-3g does. With 4096 bytes the header is complete, and here it has zeros."""
    record = damage.record_at_cluster((damage.disk.find(HIBERNATION * 2) - CLUSTER - damage.at) // CLUSTER)
    attribute = damage.attribute(record, 0x80)
    damage.put(attribute + 48, struct.pack("<QQ", size, size))
    if size == 4096:
        assert unused_of(damage)
        return
    with pytest.raises(VolumeNotCleanError, match="cut short"):
        unused_of(damage)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: None,
        flags(0x8000),  # chkdsk has finished after a repair
        log(restart_page()),
        log(restart_page(clients=0, flags=2)),  # as Windows XP and later: not closed, but marked as clean
        log(restart_page(clients=0), restart_page(lsn=6)),
        hibernation_head(b"wake"),
        hibernation_head(b"\0\0\0\0"),
        gpt((BASIC, 1 << 20, 63 << 20)),
        gpt((BASIC, 1 << 20, 63 << 20), sector_size=4096),
    ],
)
def test_scan_accepts_harmless_change(windows, damage, change):
    change(damage)
    assert unused_of(damage) == unused_of(Damage.to(windows.path))


def test_scan_refuses_disk_with_unclean_second_partition(damage):
    """The second partition is a copy of the first one, marked as dirty."""
    size = len(damage.disk) - damage.at
    damage.disk = bytearray(damage.disk[:]) + damage.disk[damage.at :]
    partition_entry(1, 0x07, (damage.at + size) // 512, size // 512)(damage)
    unused = unused_of(damage)
    assert unused % 2 == 0
    flags(1)(Damage(damage.disk, damage.at + size))
    with pytest.raises(VolumeNotCleanError, match=f"volume at byte {damage.at + size}: it is marked as dirty"):
        unused_of(damage)


def test_scan_accepts_volume_without_partition_table(damage):
    bare = Damage(bytearray(damage.disk[damage.at :]), 0)
    assert unused_of(bare) == unused_of(damage)
    flags(1)(bare)
    with pytest.raises(VolumeNotCleanError):
        unused_of(bare)


@pytest.mark.parametrize("size", [512, 1024, 1 << 20])
def test_scan_refuses_disk_without_ntfs(size):
    noise = bytearray(random.Random(size).randbytes(size))
    noise[510:512] = b"\0\0"
    with pytest.raises(NoFileSystemError):
        unused_of(Damage(noise))


@pytest.mark.parametrize("size", [0, 1, 511])
def test_scan_refuses_disk_smaller_than_a_sector(size):
    with pytest.raises(NoFileSystemError):
        unused_of(Damage(bytearray(size)))
