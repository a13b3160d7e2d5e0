"""Buckets on the local disk: `ROOT/BUCKET/KEY`, a key's slashes being folders.

For one machine without an object store, and for tests. What lies there is plain files that any tool can read; what a
bucket is besides, stands in two hidden folders that no bucket can be named like: `ROOT/.owners/BUCKET` holds the
owner's account id, `ROOT/.spool` the objects that are just being written. A folder that somebody put into ROOT without
an owner file belongs to NOBODY, so that no account gets hold of it by naming it.

It never reaches outside its root: a key that would (`../x`), and a way through a symbolic link, are refused. A disk
cannot hold every key of S3: none with empty, `.` or `..` segments, none of a segment over 255 bytes, and no two of
which one is the other's folder (`a` and `a/b`). Such keys are InvalidArgument.
"""

import errno
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import Self

from thrave import files
from thrave.buckets.base import MAX_KEY_BYTES, UNKNOWN_OWNER, ObjectHead, check_bucket_name
from thrave.buckets.errors import (
    BucketAlreadyExists,
    InternalError,
    InvalidArgument,
    InvalidBucketName,
    NoSuchBucket,
    NoSuchKey,
)
from thrave.buckets.upload_policy import UploadPolicy

_SEGMENT_BYTES = 255  # what Linux file systems take
_PUT_ATTEMPTS = 100  # a delete may prune the folder that a put has just made
_OWNER = re.compile(r"([0-9]{12})\n")
RESERVE = 16 << 20
"""Bytes of the file system that uploads leave free.

The database is usually on the same file system, and the parts of a task that failed are deleted only after the failure
was recorded there. SQLite needs 4 MiB for its write-ahead log, and room to write the log into the database.
"""


class DirectoryStore:
    """The Buckets of one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._owners = self._root / ".owners"
        self._spool = self._root / ".spool"
        self._lock = threading.Lock()
        self._claimed = 0  # bytes of the uploads that are being written
        with _disk_faults():
            for folder in (self._owners, self._spool):
                folder.mkdir(parents=True, exist_ok=True)
            files.remove_stale(self._spool)

    def on_behalf_of(self, _access_key_id: str) -> Self:
        """See Buckets."""
        return self

    def owner(self, bucket: str) -> str | None:
        """See Buckets."""
        try:
            folder = self._folder(bucket)
        except InvalidBucketName:
            return None
        exists = os.path.lexists(folder)  # before its owner is asked: a bucket gets its owner first
        try:
            match = _OWNER.fullmatch((self._owners / bucket).read_text("ascii", errors="replace"))
        except FileNotFoundError:
            return UNKNOWN_OWNER if exists else None
        return match[1] if match else UNKNOWN_OWNER

    def create(self, bucket: str, owner: str, *, probe: str | None = None) -> bool:  # noqa: ARG002 (see Buckets)
        """See Buckets."""
        folder, made = self._folder(bucket), False
        with _disk_faults():
            if self.owner(bucket) is None:
                made = files.create_exclusive(self._owners / bucket, f"{owner}\n".encode())
            if self.owner(bucket) != owner:
                raise BucketAlreadyExists
            _make_folders(folder)
        return made

    def remove(self, bucket: str, owner: str) -> bool:
        """See Buckets. The folder goes before the file with its owner, or it would be nobody's in between."""
        folder, found = self._folder(bucket), self.owner(bucket)
        if found != owner:
            return found is None
        with _disk_faults():
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass  # an earlier attempt was cut off
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    return False
                raise
            files.sync_folder(self._root)
            (self._owners / bucket).unlink(missing_ok=True)
            files.sync_folder(self._owners)
        return True

    def put(self, bucket: str, key: str, data: bytes | memoryview, *, policy: UploadPolicy | None = None) -> str | None:
        """See Buckets. Files have no ETag. An upload leaves RESERVE bytes free; the service itself may use them."""
        path, size = self._path(bucket, key), memoryview(data).nbytes
        if policy is not None:
            policy.check_upload(bucket, key, content_length=size, now=datetime.now(UTC))
        self._require(bucket)
        with _disk_faults(), nullcontext() if policy is None else self._room(size):
            try:
                self._write(path, data)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                raise InvalidArgument(
                    f"On a disk the key {key} cannot be stored beside one that is its folder or lies within it"
                ) from None
        return None

    def head(self, bucket: str, key: str) -> ObjectHead | None:
        """See Buckets."""
        try:
            with _disk_faults(), _open_object(self._path(bucket, key)) as file:
                return ObjectHead(size=os.fstat(file.fileno()).st_size)
        except NoSuchKey:
            return None

    def get(self, bucket: str, key: str) -> bytes:
        """See Buckets."""
        path = self._path(bucket, key)
        self._require(bucket)
        with _disk_faults(), _open_object(path) as file:
            return file.read()

    def get_range(self, bucket: str, key: str, start: int, length: int) -> bytes:
        """See Buckets."""
        path = self._path(bucket, key)
        self._require(bucket)
        with _disk_faults(), _open_object(path) as file:
            file.seek(start)
            return file.read(min(length, os.fstat(file.fileno()).st_size))  # room is made for what is asked

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """See Buckets. Symbolic links are not objects and not followed."""
        folder = self._folder(bucket)
        self._require(bucket)
        _refuse_links([folder])
        return _walk(folder, prefix)

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """See Buckets. Folders that are empty then are removed."""
        paths = [self._path(bucket, key) for key in keys]
        with _disk_faults():
            for path in paths:
                _remove_file(path)
            for folder in sorted({path.parent for path in paths}, reverse=True):
                self._prune(folder, self._root / bucket)

    def _folder(self, bucket: str) -> Path:
        check_bucket_name(bucket)
        return self._root / bucket

    def _path(self, bucket: str, key: str) -> Path:
        segments = _segments(key)
        path = self._folder(bucket).joinpath(*segments)
        _refuse_links([*path.parents][: len(segments)])
        return path

    def _require(self, bucket: str) -> None:
        if self.owner(bucket) is None:
            raise NoSuchBucket("The specified bucket does not exist")

    @contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Claim room for an upload while it is written; OSError (ENOSPC) if less than RESERVE would remain."""
        with self._lock:
            # A file that is half written counts twice, so that no number of uploads at once uses the reserve.
            if self._free() - self._claimed - size < RESERVE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._claimed += size
        try:
            yield
        finally:
            with self._lock:
                self._claimed -= size

    def _free(self) -> float:
        """Free bytes of the file system, without those that only root may use."""
        status = os.statvfs(self._root)
        return status.f_bavail * status.f_frsize if status.f_blocks else float("inf")  # some know no size

    def _write(self, path: Path, data: bytes | memoryview) -> None:
        for attempt in range(_PUT_ATTEMPTS):
            try:
                _make_folders(path.parent)
                files.replace(path, data, spool=self._spool)
            except FileNotFoundError:
                if attempt == _PUT_ATTEMPTS - 1:
                    raise
            else:
                break

    def _prune(self, folder: Path, bucket: Path) -> None:
        while folder != bucket:
            try:
                with suppress(FileNotFoundError):  # gone already, and the crash came before its parent's turn
                    folder.rmdir()
            except OSError:  # not empty
                break
            folder = folder.parent
        with suppress(FileNotFoundError, NotADirectoryError):
            files.sync_folder(folder)


def _segments(key: str) -> list[str]:
    """A key as path segments; raises InvalidArgument for one that the disk cannot hold, or must not."""
    segments = key.split("/")
    try:
        fits = len(key.encode()) <= MAX_KEY_BYTES and all(
            len(segment.encode()) <= _SEGMENT_BYTES for segment in segments
        )
    except UnicodeEncodeError:
        fits = False
    if not fits or "\0" in key or not {"", ".", ".."}.isdisjoint(segments):
        raise InvalidArgument(
            f"A disk cannot hold a key like {key[:80]!r}: segments of 1 to {_SEGMENT_BYTES} bytes, none of them . or .."
        )
    return segments


def _refuse_links(folders: Iterable[Path]) -> None:
    if any(folder.is_symlink() for folder in folders):
        raise InvalidArgument("This leads through a symbolic link, and a bucket on a disk follows none")


def _make_folders(folder: Path) -> None:
    """Make a folder and those above it, durably."""
    if not folder.is_dir():
        _make_folders(folder.parent)
        with suppress(FileExistsError):  # another was quicker; if it is a file, what comes next says so
            folder.mkdir()
        files.sync_folder(folder.parent)


def _remove_file(path: Path) -> None:
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return  # no object has that key


def _walk(bucket: Path, prefix: str) -> Iterator[str]:
    # UTF-8 sorts as code points do, and a folder among files as its name with a slash.
    waiting = [""]
    while waiting:
        key = waiting.pop()
        if key and not key.endswith("/"):
            yield key
        else:
            waiting += sorted(_children(bucket, key, prefix), reverse=True)


def _children(bucket: Path, folder: str, prefix: str) -> Iterator[str]:
    try:
        with os.scandir(bucket / folder) as found:
            entries = [entry for entry in found if _is_utf8(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        key = folder + entry.name
        if entry.is_dir(follow_symlinks=False):
            key += "/"
        elif not entry.is_file(follow_symlinks=False):
            continue
        if key.startswith(prefix) or (key.endswith("/") and prefix.startswith(key)):
            yield key


def _is_utf8(name: str) -> bool:
    """Whether a file's name is text at all; nothing that was put here has another."""
    return name.encode(errors="replace") == os.fsencode(name)


def _open_object(path: Path) -> BufferedReader:
    """Open a plain file; whatever else has that name is no object."""
    if path.is_symlink() or not path.is_file():
        raise NoSuchKey("The specified key does not exist.")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise NoSuchKey("The specified key does not exist.") from None


@contextmanager
def _disk_faults() -> Iterator[None]:
    """Turn the operating system's errors into S3's."""
    try:
        yield
    except OSError as error:
        raise InternalError(f"The disk of the bucket refused: {error.strerror}") from error
