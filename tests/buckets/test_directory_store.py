"""Buckets on the local disk, in addition to the contract: no access outside the folder, and complete objects only."""

import os
import resource
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from support.eventually import eventually
from thrave.buckets import directory_store
from thrave.buckets.base import UNKNOWN_OWNER
from thrave.buckets.directory_store import MIN_FREE, DirectoryStore
from thrave.buckets.errors import BucketAlreadyExists, BucketError, InternalError, InvalidArgument, NoSuchKey

ALICE = "111111111111"
BUCKET = "alice-bundles"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "buckets"


@pytest.fixture
def buckets(root):
    buckets = DirectoryStore(root)
    buckets.create(BUCKET, ALICE)
    return buckets


def test_object_is_a_plain_file_named_by_its_key(buckets, root):
    buckets.put(BUCKET, "backups/win1.part.0", b"data")
    assert (root / BUCKET / "backups" / "win1.part.0").read_bytes() == b"data"


def test_object_of_another_process_is_found(buckets, root):
    buckets.put(BUCKET, "key", b"data")
    assert DirectoryStore(root).get(BUCKET, "key") == b"data"
    assert DirectoryStore(root).owner(BUCKET) == ALICE


OUTSIDE = ["../x", "a/../../x", "/etc/passwd", "a//b", "", "/", "a/", ".", "..", "a/./b", "nul\0", "\ud800", "x" * 256]


@pytest.mark.parametrize("key", [*OUTSIDE, "y/" * 512 + "y"], ids=repr)
def test_key_that_is_unsafe_on_disk_is_rejected_by_every_call(buckets, root, key):
    (root / "x").write_text("not a bucket's")
    for call in (
        lambda: buckets.put(BUCKET, key, b"evil"),
        lambda: buckets.get(BUCKET, key),
        lambda: buckets.head(BUCKET, key),
        lambda: buckets.delete(BUCKET, ["fine", key]),
    ):
        with pytest.raises(InvalidArgument):
            call()
    assert (root / "x").read_text() == "not a bucket's"
    assert [*buckets.list(BUCKET, "")] == []


@pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a"), ("a/b", "a/b/c/d"), ("a/b/c", "a/b")])
def test_key_that_is_the_folder_of_another_key_is_rejected(buckets, first, second):
    buckets.put(BUCKET, first, b"first")
    with pytest.raises(InvalidArgument, match="cannot be stored together"):
        buckets.put(BUCKET, second, b"second")
    assert [*buckets.list(BUCKET, "")] == [first]
    assert buckets.head(BUCKET, second) is None
    buckets.delete(BUCKET, [second])
    assert buckets.get(BUCKET, first) == b"first"


def test_path_through_symbolic_link_is_rejected(buckets, root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("outside")
    (root / BUCKET / "link").symlink_to(outside)
    for call in (
        lambda: buckets.put(BUCKET, "link/new", b"evil"),
        lambda: buckets.get(BUCKET, "link/file"),
        lambda: buckets.head(BUCKET, "link/file"),
        lambda: buckets.delete(BUCKET, ["link/file"]),
    ):
        with pytest.raises(InvalidArgument, match="symbolic link"):
            call()
    assert [*buckets.list(BUCKET, "")] == []
    assert [path.name for path in outside.iterdir()] == ["file"]


def test_bucket_that_is_a_symbolic_link_is_rejected(buckets, root, tmp_path):
    (root / BUCKET).rmdir()
    (root / BUCKET).symlink_to(tmp_path)
    for call in (lambda: buckets.put(BUCKET, "evil", b"evil"), lambda: buckets.list(BUCKET, "")):
        with pytest.raises(InvalidArgument, match="symbolic link"):
            call()
    assert not (tmp_path / "evil").exists()


def test_symbolic_link_at_a_key_is_replaced_not_followed(buckets, root, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("outside")
    (root / BUCKET / "key").symlink_to(outside)
    assert buckets.head(BUCKET, "key") is None
    with pytest.raises(NoSuchKey):
        buckets.get(BUCKET, "key")
    buckets.put(BUCKET, "key", b"inside")
    assert (outside.read_text(), buckets.get(BUCKET, "key")) == ("outside", b"inside")


def test_special_file_is_not_an_object(buckets, root):
    os.mkfifo(root / BUCKET / "pipe")
    assert buckets.head(BUCKET, "pipe") is None
    assert [*buckets.list(BUCKET, "")] == []


def test_list_skips_file_names_that_are_not_utf_8(buckets, root):
    (root / BUCKET / os.fsdecode(b"\xff")).write_text("not ours")
    buckets.put(BUCKET, "key", b"data")
    assert [*buckets.list(BUCKET, "")] == ["key"]


def test_folder_without_owner_file_has_no_owner(buckets, root):
    (root / "found-here").mkdir()
    assert buckets.owner("found-here") == UNKNOWN_OWNER
    with pytest.raises(BucketAlreadyExists):
        buckets.create("found-here", ALICE)
    assert buckets.owner("found-here") == UNKNOWN_OWNER


@pytest.mark.parametrize("content", ["", "111", "111111111111", "x" * 12 + "\n", "1" * 13 + "\n", "ä"])
def test_damaged_owner_file_means_no_owner(buckets, root, content):
    (root / ".owners" / BUCKET).write_text(content)
    assert buckets.owner(BUCKET) == UNKNOWN_OWNER
    with pytest.raises(BucketAlreadyExists):
        buckets.create(BUCKET, ALICE)


def test_interrupted_create_is_completed_by_its_owner(buckets, root):
    (root / BUCKET).rmdir()
    assert buckets.owner(BUCKET) == ALICE
    buckets.create(BUCKET, ALICE)
    assert (root / BUCKET).is_dir()


def test_delete_removes_empty_folders_but_not_the_bucket(buckets, root):
    for key in ("a/b/one", "a/b/two", "a/three"):
        buckets.put(BUCKET, key, b"")
    buckets.delete(BUCKET, ["a/b/one", "a/b/two"])
    assert [*(root / BUCKET).iterdir()] == [root / BUCKET / "a"]
    assert [*(root / BUCKET / "a").iterdir()] == [root / BUCKET / "a" / "three"]
    buckets.delete(BUCKET, ["a/three"])
    assert [*(root / BUCKET).iterdir()] == []
    assert buckets.owner(BUCKET) == ALICE


def test_interrupted_delete_is_completed_when_repeated(buckets, root):
    buckets.put(BUCKET, "a/b/one", b"")
    (root / BUCKET / "a" / "b" / "one").unlink()
    (root / BUCKET / "a" / "b").rmdir()
    buckets.delete(BUCKET, ["a/b/one"])
    assert [*(root / BUCKET).iterdir()] == []


def test_failed_put_leaves_no_file(buckets, root):
    (root / ".spool").rmdir()
    with pytest.raises(InternalError):
        buckets.put(BUCKET, "key", b"data")
    assert [*(root / BUCKET).iterdir()] == []


def test_full_disk_is_an_internal_error_and_keeps_the_old_object(buckets, root):
    buckets.put(BUCKET, "key", b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InternalError, match="File too large"):
            buckets.put(BUCKET, "key", bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert buckets.get(BUCKET, "key") == b"before"
    assert [*(root / ".spool").iterdir()] == []


POLICY = SimpleNamespace(check_upload=lambda *arguments, **options: None)


def set_free(monkeypatch, free):
    """Set the free bytes that the file system reports; None: it reports no size."""
    blocks, free = (0, 0) if free is None else (1 << 20, free)
    status = SimpleNamespace(f_blocks=blocks, f_bavail=free, f_frsize=1)
    monkeypatch.setattr(directory_store.os, "statvfs", lambda path: status)


def test_put_of_an_upload_leaves_the_reserve_free(buckets, monkeypatch):
    set_free(monkeypatch, MIN_FREE + 3)
    with pytest.raises(InternalError, match="No space left on device"):
        buckets.put(BUCKET, "key", b"data", policy=POLICY)
    assert buckets.head(BUCKET, "key") is None
    buckets.put(BUCKET, "key", b"dat", policy=POLICY)


def test_put_without_a_policy_may_use_the_reserve(buckets, monkeypatch):
    set_free(monkeypatch, 4)
    buckets.put(BUCKET, "key", b"data")
    assert buckets.get(BUCKET, "key") == b"data"


def test_put_on_a_file_system_without_a_size_is_not_limited(buckets, monkeypatch):
    set_free(monkeypatch, None)
    buckets.put(BUCKET, "key", b"data", policy=POLICY)
    assert buckets.get(BUCKET, "key") == b"data"


def test_parallel_uploads_leave_the_reserve_free(buckets, monkeypatch):
    set_free(monkeypatch, MIN_FREE + 7)
    started, end = threading.Event(), threading.Event()
    write = buckets._write

    def slow_write(path, data):
        if path.name == "first":
            started.set()
            assert end.wait(60)
        write(path, data)

    monkeypatch.setattr(buckets, "_write", slow_write)
    first = threading.Thread(target=buckets.put, args=(BUCKET, "first", b"data"), kwargs={"policy": POLICY})
    first.start()
    try:
        assert started.wait(60)
        with pytest.raises(InternalError, match="No space left on device"):
            buckets.put(BUCKET, "second", b"data", policy=POLICY)
    finally:
        end.set()
        first.join()
    buckets.put(BUCKET, "second", b"data", policy=POLICY)
    assert sorted(buckets.list(BUCKET, "")) == ["first", "second"]


def test_spool_is_empty_after_each_call(buckets, root):
    buckets.put(BUCKET, "key", b"data")
    with pytest.raises(BucketError):
        buckets.put(BUCKET, "key/below", b"data")
    assert [*(root / ".spool").iterdir()] == []


def test_open_removes_files_of_a_killed_writer(root):
    (root / ".spool").mkdir(parents=True)
    (root / ".spool" / ".new-litter").touch()
    DirectoryStore(root)
    assert [*(root / ".spool").iterdir()] == []


WRITER = """
import sys
from pathlib import Path
from thrave.buckets.directory_store import DirectoryStore
buckets = DirectoryStore(Path(sys.argv[1]))
while True:
    for letter in b"ab":
        buckets.put(sys.argv[2], "folder/key", bytes([letter]) * 3_000_000)
"""


def test_killed_writer_leaves_complete_objects_only(buckets, root):
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", WRITER, root, BUCKET]) as writer:

            def is_stored(writer=writer):
                assert writer.poll() is None
                return buckets.head(BUCKET, "folder/key")

            eventually(is_stored, "the object is stored", interval=0)
            writer.kill()
        assert buckets.get(BUCKET, "folder/key") in (b"a" * 3_000_000, b"b" * 3_000_000)
        buckets.delete(BUCKET, ["folder/key"])


def test_object_is_readable_by_owner_only(buckets, root):
    buckets.put(BUCKET, "key", b"data")
    assert (root / BUCKET / "key").stat().st_mode & 0o077 == 0


def test_list_sorts_keys_by_bytes(buckets):
    keys = ["a-b", "a.b", "a/b", "a/c/d", "a0", "ab", "b", "ä", "￿", "\U0001f33e"]
    for key in keys:
        buckets.put(BUCKET, key, b"")
    assert [*buckets.list(BUCKET, "")] == sorted(keys, key=str.encode)
