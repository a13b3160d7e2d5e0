"""`image_file` creates a complete file under its name, or no file."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from support.bundles.sample_bundles import MemoryImage, bundle_of, private_key
from thrave.bundle import image_output
from thrave.bundle.errors import OutputError, OutputExistsError, WrongKeyError
from thrave.bundle.image_output import image_file
from thrave.bundle.opener import open_bundle

KIB = 1024


@pytest.fixture(params=["unnamed", "named"], autouse=True)
def temporary_file(request, monkeypatch):
    """Run each test with unnamed and with named temporary files; some file systems have no unnamed ones."""
    if request.param == "named":
        monkeypatch.setattr(image_output, "_create_unnamed", lambda _: None)
    return request.param


def write(path, size, *runs):
    with image_file(path, size) as image:
        for offset, data in runs:
            image.write(offset, memoryview(data))


def test_unwritten_range_is_a_hole(tmp_path):
    write(tmp_path / "image", 10_000_001, (4096, b"data"))
    data = (tmp_path / "image").read_bytes()
    assert data == bytes(4096) + b"data" + bytes(10_000_001 - 4100)
    assert (tmp_path / "image").stat().st_blocks * 512 <= 8 * KIB


def test_output_is_readable_by_owner_only(tmp_path):
    write(tmp_path / "image", 1)
    assert (tmp_path / "image").stat().st_mode & 0o777 == 0o600


def test_existing_file_is_unchanged_until_end(tmp_path):
    (tmp_path / "image").write_text("old")
    with image_file(tmp_path / "image", 3) as image:
        image.write(0, memoryview(b"new"))
        assert (tmp_path / "image").read_text() == "old"
    assert (tmp_path / "image").read_text() == "new"


def test_output_has_no_name_before_end(tmp_path, temporary_file):
    with image_file(tmp_path / "image", 3, replace=False) as image:
        assert len(list(tmp_path.iterdir())) == (temporary_file == "named")
        assert image.name.stat().st_size == 3
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_file_created_by_other_process_is_not_replaced(tmp_path):
    with pytest.raises(OutputExistsError), image_file(tmp_path / "image", 3, replace=False):
        (tmp_path / "image").write_text("old")
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    assert (tmp_path / "image").read_text() == "old"


@pytest.mark.parametrize(
    ("existing", "is_kept"), [(b"\0\0a", True), (b"\0\0b", False), (b"\0\0a\0", False), (b"", False)]
)
def test_protected_file_with_same_content_is_kept(tmp_path, existing, is_kept):
    (tmp_path / "image").write_bytes(existing)
    context = nullcontext() if is_kept else pytest.raises(OutputExistsError)
    with context, image_file(tmp_path / "image", 3, replace=False) as image:
        image.write(2, memoryview(b"a"))
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    assert (tmp_path / "image").read_bytes() == existing


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_failure_keeps_existing_file_and_removes_output(tmp_path, error):
    (tmp_path / "image").write_text("old")
    with pytest.raises(error), image_file(tmp_path / "image", 3):
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    assert (tmp_path / "image").read_text() == "old"


@pytest.mark.parametrize("size", [1 << 60, (1 << 63) - 1])
def test_impossible_size_raises_output_error(tmp_path, size):
    with pytest.raises(OutputError, match="cannot write"):
        write(tmp_path / "image", size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["no/such/folder/image", "."])
def test_impossible_target_raises_output_error(tmp_path, target):
    with pytest.raises(OutputError):
        write(tmp_path / target, 1)
    assert list(tmp_path.iterdir()) == []


def test_device_or_fifo_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(OutputError, match="not a regular file"):
            write(target, 1)
        assert not target.is_file()


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "disks").mkdir()
    (tmp_path / "link").symlink_to("disks/image")
    write(tmp_path / "link", 3, (0, b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disks" / "image").read_bytes() == b"new"


def test_wrong_key_creates_no_output(tmp_path):
    bundle = bundle_of(MemoryImage(b"x" * 512))
    before = tmp_path.stat().st_mtime_ns
    with pytest.raises(WrongKeyError):
        open_bundle(bundle.manifest, bundle, private_key("wrong"), tmp_path / "image")
    assert tmp_path.stat().st_mtime_ns == before
