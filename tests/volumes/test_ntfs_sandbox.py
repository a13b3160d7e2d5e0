"""The process that reads a guest's file system: what it cannot do, and what its parent does not believe."""

import os
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
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    return make_windows_disk(tmp_path_factory.mktemp("windows") / "disk.raw").path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a volume of 2 MiB with some files."""
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
    """A volume for the survey, without a process between."""

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
    """Some bytes, bits or words are others: in the boot sector, in an MFT record, in $Bitmap, or anywhere."""
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
    """Refused, or nothing is left out that would not have been. Whatever else is raised fails the test."""
    unused = clusters(ntfs_scan.find_unused(Source(small)))
    refused = 0
    for seed in range(400):
        try:
            assert clusters(ntfs_scan.find_unused(Source(corrupted(small, seed).disk))) <= unused, seed
        except SkipRefusedError:
            refused += 1
    assert 50 < refused < 400


def test_check_of_corrupt_volume_never_fails(small):
    """It says something, refuses, or finds nothing; whatever else is raised fails the test."""
    assert list(ntfs_scan.find_problems(Source(small))) == []
    said = refused = 0
    for seed in range(400):
        try:
            said += bool(list(ntfs_scan.find_problems(Source(corrupted(small, seed).disk))))
        except SkipRefusedError:
            refused += 1
    assert 0 < said + refused < 400


def test_scan_process_survives_corrupt_volumes(small):
    """It ends as the survey does here, and in no other way."""
    for seed in range(1000, 1012):
        damage = corrupted(small, seed)
        assert outcome(ntfs_sandbox.scan_unused, damage, whole(damage)) == outcome(
            ntfs_scan.find_unused, Source(damage.disk)
        ), seed


def outcome(look, *where):
    try:
        return look(*where)
    except SkipRefusedError as refusal:
        return type(refusal), refusal.reason


def test_read_error_of_the_volume_is_raised_unchanged(windows):
    damage = Damage.to(windows)

    def fail(offset, buffer):
        raise VolumeUnreadableError(windows, "the disk is broken", offset=offset)

    damage.read_into = fail
    with pytest.raises(VolumeUnreadableError, match="the disk is broken"):
        ntfs_sandbox.scan_unused(damage, Partition(damage.at, damage.size - damage.at))


def test_slow_scan_is_ended(windows, monkeypatch):
    monkeypatch.setattr(ntfs_sandbox, "SCAN_TIMEOUT", 0.01)
    with pytest.raises(FileSystemCorruptError, match=r"too long.*Killed"):
        ntfs_sandbox.scan_unused(Damage.to(windows), Partition(1 << 20, 63 << 20))


def message(kind, first=0, second=0):
    return MESSAGE.pack(kind, first, second)


@pytest.mark.parametrize(
    ("said", "words"),
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
def test_output_of_the_scan_is_validated(said, words, tmp_path, monkeypatch):
    """A surveyor that the guest has taken over: it says what it likes."""
    (tmp_path / "said").write_bytes(said)
    evil = tmp_path / "evil"
    evil.write_text(f"#!/bin/sh\nexec cat '{tmp_path / 'said'}'\n")
    evil.chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(evil))
    damage = Damage(bytearray(1 << 20), 0)
    with pytest.raises(FileSystemCorruptError, match=words):
        ntfs_sandbox.scan_unused(damage, whole(damage))


def test_extents_of_the_scan_are_offsets_of_the_disk(tmp_path, monkeypatch):
    (tmp_path / "said").write_bytes(message(b"u", 0, 4096) + message(b"u", 8192, 512) + message(b"."))
    evil = tmp_path / "evil"
    evil.write_text(f"#!/bin/sh\nexec cat '{tmp_path / 'said'}'\n")
    evil.chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(evil))
    damage = Damage(bytearray(1 << 20), 0)
    assert ntfs_sandbox.scan_unused(damage, Partition(65536, 1 << 18)) == [(65536, 4096), (65536 + 8192, 512)]


def test_refusals_of_the_scan_are_passed_on(windows):
    damage = Damage.to(windows)
    damage.set_flags(1)
    with pytest.raises(VolumeNotCleanError, match="have Windows check it"):
        ntfs_sandbox.scan_unused(damage, Partition(damage.at, damage.size - damage.at))
