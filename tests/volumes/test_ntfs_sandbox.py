"""The confined process that scans NTFS: corrupt volumes, invalid messages, timeouts, errors."""

import random
import re
import stat
import struct
import sys

import pytest

from support.disks.ntfs_disk import CLUSTER, RECORD, Damage, make_windows_disk, ntfs_tool
from thrave.volumes import ntfs_sandbox, ntfs_scan
from thrave.volumes.errors import FileSystemCorruptError, SkipRefusedError, VolumeNotCleanError, VolumeUnreadableError
from thrave.volumes.partitions import Partition

MESSAGE = struct.Struct("<cQQ")


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    return make_windows_disk(tmp_path_factory.mktemp("windows") / "disk.raw").path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The content of a volume of 2 MiB with some files."""
    folder = tmp_path_factory.mktemp("small")
    path = folder / "volume.ntfs"
    path.write_bytes(bytes(2 << 20))
    ntfs_tool("mkntfs", "-F", "-Q", "-q", "-s", 512, "-p", 0, "-H", 255, "-S", 63, "-c", CLUSTER, path)
    source = random.Random(7)
    for name, size in (("a", 30_000), ("b", 90_000), ("pagefile.sys", 50_000), ("c", 300)):
        (folder / name).write_bytes(source.randbytes(size))
        ntfs_tool("ntfscp", "-q", path, folder / name, name)
    return path.read_bytes()


class Source:
    """A volume that is scanned in this process."""

    def __init__(self, data):
        self.data = data
        self.size = len(data)

    def read(self, offset, length):
        return bytes(self.data[offset : offset + length])


def clusters(extents):
    return {at for offset, length in extents for at in range(offset // CLUSTER, (offset + length) // CLUSTER)}


def whole(damage):
    return Partition(0, damage.size)


def corrupted(data, seed):
    """Replace some bytes in the boot sector, in an MFT record, in $Bitmap, or anywhere."""
    source = random.Random(seed)
    damage = Damage(bytearray(data), 0)
    records = [found.start() for found in re.finditer(b"FILE0", data)]
    start, length = source.choice(
        [
            (0, 90),
            (source.choice(records), RECORD),
            (source.choice(records), 50),
            (damage.content(6), 70),
            (0, len(data)),
        ]
    )
    for _ in range(source.choice([1, 1, 2, 8, 40])):
        place = start + source.randrange(length)
        value = source.choice([b"\0", b"\xff", bytes([source.randrange(256)]), source.randbytes(4)])
        damage.put(min(place, len(data) - 4), value)
    return damage


def test_scan_of_corrupt_volume_never_skips_used_clusters(small):
    """The volume is refused, or only clusters are skipped that were unused before. Any other error fails the test."""
    unused = clusters(ntfs_scan.find_unused(Source(small)))
    refused = 0
    for seed in range(400):
        try:
            assert clusters(ntfs_scan.find_unused(Source(corrupted(small, seed).disk))) <= unused, seed
        except SkipRefusedError:
            refused += 1
    assert 50 < refused < 400


def test_check_of_corrupt_volume_never_fails(small):
    """The scan reports a problem, refuses the volume, or finds nothing. Any other error fails the test."""
    assert list(ntfs_scan.find_problems(Source(small))) == []
    reported = refused = 0
    for seed in range(400):
        try:
            reported += bool(list(ntfs_scan.find_problems(Source(corrupted(small, seed).disk))))
        except SkipRefusedError:
            refused += 1
    assert 0 < reported + refused < 400


def test_scan_process_survives_corrupt_volumes(small):
    """The result in the child process is the same as in this process."""
    for seed in range(1000, 1012):
        damage = corrupted(small, seed)
        assert outcome(ntfs_sandbox.scan_unused, damage, whole(damage)) == outcome(
            ntfs_scan.find_unused, Source(damage.disk)
        ), seed


def outcome(scan, *arguments):
    try:
        return scan(*arguments)
    except SkipRefusedError as refusal:
        return type(refusal), refusal.reason


def test_scan_raises_read_errors_of_the_volume(windows):
    damage = Damage.to(windows)

    def fail(offset, buffer):
        raise VolumeUnreadableError(windows, "the disk is broken", offset=offset)

    damage.read_into = fail
    with pytest.raises(VolumeUnreadableError, match="the disk is broken"):
        ntfs_sandbox.scan_unused(damage, Partition(damage.at, damage.size - damage.at))


def test_scan_ends_at_its_timeout(windows, monkeypatch):
    monkeypatch.setattr(ntfs_sandbox, "SCAN_TIMEOUT", 0.01)
    with pytest.raises(FileSystemCorruptError, match=r"too long.*Killed"):
        ntfs_sandbox.scan_unused(Damage.to(windows), Partition(1 << 20, 63 << 20))


def message(kind, first=0, second=0):
    return MESSAGE.pack(kind, first, second)


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (b"", "exit status 0"),
        (b"half a message", "exit status 0"),
        (message(b"?"), "invalid message"),
        (message(b"r", 0, 1 << 40), "invalid message"),
        (message(b"r", 1 << 63, 512), "invalid message"),
        (message(b"r", (1 << 20) - 100, 512), "invalid message"),
        (message(b"u", 1 << 20, 1), "invalid message"),
        (message(b"u", 0, 0), "invalid message"),
        (message(b"u", 4096, 4096) + message(b"u", 0, 4096), "invalid message"),
        (message(b"u", 0, 4096) + message(b"u", 2048, 4096), "invalid message"),
        (message(b"x", 99, 3) + b"boo", "invalid message"),
        (message(b"x", 0, 1 << 40), "invalid message"),
        (message(b"x", 0, 5) + b"bo", "exit status 0"),
        (message(b"x", 0, 3) + b"b\xffo", "b\ufffdo"),
        (message(b"r", 0, 512), "exit status 0"),
    ],
)
def test_scan_validates_messages_of_its_process(output, text, tmp_path, monkeypatch):
    """As if the guest controlled the process that reads the file system."""
    (tmp_path / "output").write_bytes(output)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nexec cat '{tmp_path / 'output'}'\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(program))
    damage = Damage(bytearray(1 << 20), 0)
    with pytest.raises(FileSystemCorruptError, match=text):
        ntfs_sandbox.scan_unused(damage, whole(damage))


def test_scan_returns_offsets_of_the_disk(tmp_path, monkeypatch):
    (tmp_path / "output").write_bytes(message(b"u", 0, 4096) + message(b"u", 8192, 512) + message(b"."))
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nexec cat '{tmp_path / 'output'}'\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(program))
    damage = Damage(bytearray(1 << 20), 0)
    assert ntfs_sandbox.scan_unused(damage, Partition(65536, 1 << 18)) == [(65536, 4096), (65536 + 8192, 512)]


def test_scan_raises_refusals_of_its_process(windows):
    damage = Damage.to(windows)
    damage.set_flags(1)
    with pytest.raises(VolumeNotCleanError, match="have Windows check it"):
        ntfs_sandbox.scan_unused(damage, Partition(damage.at, damage.size - damage.at))
