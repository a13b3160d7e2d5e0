"""`thrave demo-disk`; test_demo_disk.py tests the disk itself."""

import hashlib
import json

from thrave.cli.exit_codes import Exit


def test_demo_disk_creates_ntfs_disk_of_given_size(thrave, tmp_path):
    disk = tmp_path / "disk.raw"
    status, stdout, _ = thrave("demo-disk", str(disk), "--size", "65MiB", "--output", "json")
    assert status == 0
    assert json.loads(stdout)["size"] == disk.stat().st_size == 65 << 20
    assert disk.read_bytes()[(1 << 20) + 3 : (1 << 20) + 7] == b"NTFS"


def test_demo_disk_does_not_overwrite_file(thrave, tmp_path):
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"the only copy of a machine")
    before = hashlib.sha256(disk.read_bytes()).digest()
    status, _, stderr = thrave("demo-disk", str(disk))
    assert status == Exit.REFUSED
    assert f"{disk} exists. Remove it, or name another file." in stderr
    assert hashlib.sha256(disk.read_bytes()).digest() == before


def test_demo_disk_rejects_too_small_size(thrave, tmp_path):
    status, _, stderr = thrave("demo-disk", str(tmp_path / "disk.raw"), "--size", "1MiB")
    assert status == Exit.USAGE
    assert "64 MiB" in stderr
    assert not (tmp_path / "disk.raw").exists()
