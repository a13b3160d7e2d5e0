"""An object store in a folder of the local disk: object KEY is the file `ROOT/BUCKET/KEY`.

For one machine without an object store, and for tests. Objects are plain files. `ROOT/.owners/BUCKET` has the owner's
account id, and `ROOT/.spool` has objects that are being written; no bucket can have these names. A folder without an
owner file belongs to UNKNOWN_OWNER, so that no account can claim it. Nothing outside ROOT is read or written: keys such
as `../x` and symbolic links are refused.
"""

# A disk cannot store every key of S3: no empty, `.` or `..` segment, no segment over 255 bytes, and no two keys of
# which one is the folder of the other (`a` and `a/b`). These keys are InvalidArgument.

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
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
from thrave.concurrency import new_lock, utc_now

MIN_FREE = 16 << 20
"""Bytes of the file system that uploads keep free.

The database is usually on the same file system, and a failed task's parts are deleted only after the failure is
recorded there. SQLite needs 4 MiB for its write-ahead log, and space to write the log into the database.
"""

_MAX_SEGMENT_BYTES = 255  # limit of Linux file systems
_MAX_PUT_ATTEMPTS = 100  # a delete may remove the folder that a put has just created
_OWNER = re.compile(r"([0-9]{12})\n")


class DirectoryStore:
    """An ObjectStore in one folder.

    Args:
        root: The folder; created if it does not exist.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._owners = self._root / ".owners"
        self._spool = self._root / ".spool"
        self._lock = new_lock()
        self._reserved = 0  # bytes of uploads that are being written
        with _convert_os_errors():
            for folder in (self._owners, self._spool):
                folder.mkdir(parents=True, exist_ok=True)
            files.remove_stale(self._spool)

    def on_behalf_of(self, _access_key_id: str) -> Self:
        """See ObjectStore."""
        return self

    def owner(self, bucket: str) -> str | None:
        """See ObjectStore."""
        try:
            folder = self._folder(bucket)
        except InvalidBucketName:
            return None
        # Checked before the owner file is read: `create` writes the owner file before it creates the folder.
        exists = os.path.lexists(folder)
        try:
            match = _OWNER.fullmatch((self._owners / bucket).read_text("ascii", errors="replace"))
        except FileNotFoundError:
            return UNKNOWN_OWNER if exists else None
        return match[1] if match else UNKNOWN_OWNER

    def create(self, bucket: str, owner: str, *, probe: str | None = None) -> bool:  # noqa: ARG002 (see ObjectStore)
        """See ObjectStore."""
        folder, is_created = self._folder(bucket), False
        with _convert_os_errors():
            if self.owner(bucket) is None:
                is_created = files.create_exclusive(self._owners / bucket, f"{owner}\n".encode())
            if self.owner(bucket) != owner:
                raise BucketAlreadyExists
            _create_folders(folder)
        return is_created

    def remove(self, bucket: str, owner: str) -> bool:
        """See ObjectStore."""
        folder, current_owner = self._folder(bucket), self.owner(bucket)
        if current_owner != owner:
            return current_owner is None
        with _convert_os_errors():
            # The folder is removed before its owner file; otherwise its owner would be unknown in between.
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass  # an earlier call was interrupted
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    return False
                raise
            files.sync_folder(self._root)
            (self._owners / bucket).unlink(missing_ok=True)
            files.sync_folder(self._owners)
        return True

    def put(self, bucket: str, key: str, data: bytes | memoryview, *, policy: UploadPolicy | None = None) -> str | None:
        """See ObjectStore. Files have no ETag. Uploads keep MIN_FREE bytes free; the service itself may use them."""
        path, size = self._path(bucket, key), memoryview(data).nbytes
        if policy is not None:
            policy.check_upload(bucket, key, content_length=size, now=utc_now())
        self._check_exists(bucket)
        with _convert_os_errors(), nullcontext() if policy is None else self._reserve_space(size):
            try:
                self._write(path, data)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                raise InvalidArgument(
                    f"On a disk the key {key} cannot be stored together with a key that is its folder or is in it"
                ) from None
        return None

    def head(self, bucket: str, key: str) -> ObjectHead | None:
        """See ObjectStore."""
        try:
            with _convert_os_errors(), _open_object(self._path(bucket, key)) as file:
                return ObjectHead(size=os.fstat(file.fileno()).st_size)
        except NoSuchKey:
            return None

    def get(self, bucket: str, key: str) -> bytes:
        """See ObjectStore."""
        path = self._path(bucket, key)
        self._check_exists(bucket)
        with _convert_os_errors(), _open_object(path) as file:
            return file.read()

    def get_range(self, bucket: str, key: str, start: int, length: int) -> bytes:
        """See ObjectStore."""
        path = self._path(bucket, key)
        self._check_exists(bucket)
        with _convert_os_errors(), _open_object(path) as file:
            file.seek(start)
            return file.read(min(length, os.fstat(file.fileno()).st_size))  # `read` allocates the requested length

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """See ObjectStore. Symbolic links are not objects and not followed."""
        folder = self._folder(bucket)
        self._check_exists(bucket)
        _refuse_links([folder])
        return _walk(folder, prefix)

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """See ObjectStore. Folders that are then empty are removed."""
        paths = [self._path(bucket, key) for key in keys]
        with _convert_os_errors():
            for path in paths:
                _remove_file(path)
            for folder in sorted({path.parent for path in paths}, reverse=True):
                self._remove_empty_folders(folder, self._root / bucket)

    def _folder(self, bucket: str) -> Path:
        check_bucket_name(bucket)
        return self._root / bucket

    def _path(self, bucket: str, key: str) -> Path:
        segments = _split_key(key)
        path = self._folder(bucket).joinpath(*segments)
        _refuse_links([*path.parents][: len(segments)])
        return path

    def _check_exists(self, bucket: str) -> None:
        if self.owner(bucket) is None:
            raise NoSuchBucket("The specified bucket does not exist")

    @contextmanager
    def _reserve_space(self, size: int) -> Iterator[None]:
        """Reserve space while an upload is written.

        Raises:
            OSError: ENOSPC: fewer than MIN_FREE bytes would remain.
        """
        with self._lock:
            # The written half of a file counts twice, so that no number of parallel uploads uses the last MIN_FREE.
            if self._free() - self._reserved - size < MIN_FREE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._reserved += size
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= size

    def _free(self) -> float:
        """Free bytes of the file system, without those reserved for root."""
        status = os.statvfs(self._root)
        return status.f_bavail * status.f_frsize if status.f_blocks else float("inf")  # some report no size

    def _write(self, path: Path, data: bytes | memoryview) -> None:
        for attempt in range(_MAX_PUT_ATTEMPTS):
            try:
                _create_folders(path.parent)
                files.replace(path, data, spool=self._spool)
            except FileNotFoundError:
                if attempt == _MAX_PUT_ATTEMPTS - 1:
                    raise
            else:
                break

    def _remove_empty_folders(self, folder: Path, bucket: Path) -> None:
        while folder != bucket:
            try:
                with suppress(FileNotFoundError):  # an earlier call removed it and crashed before its parent
                    folder.rmdir()
            except OSError:  # not empty
                break
            folder = folder.parent
        with suppress(FileNotFoundError, NotADirectoryError):
            files.sync_folder(folder)


def _split_key(key: str) -> list[str]:
    """Split a key into path segments.

    Raises:
        InvalidArgument: The disk cannot store that key, or must not.
    """
    segments = key.split("/")
    try:
        is_valid = len(key.encode()) <= MAX_KEY_BYTES and all(
            len(segment.encode()) <= _MAX_SEGMENT_BYTES for segment in segments
        )
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid or "\0" in key or not {"", ".", ".."}.isdisjoint(segments):
        raise InvalidArgument(
            f"A disk cannot store a key like {key[:80]!r}: "
            f"segments of 1 to {_MAX_SEGMENT_BYTES} bytes, none of them . or .."
        )
    return segments


def _refuse_links(folders: Iterable[Path]) -> None:
    if any(folder.is_symlink() for folder in folders):
        raise InvalidArgument("The path of the key has a symbolic link; a bucket on a disk does not follow links")


def _create_folders(folder: Path) -> None:
    """Create a folder and its parents durably."""
    if not folder.is_dir():
        _create_folders(folder.parent)
        with suppress(FileExistsError):  # another call created it; if it is a file, the next operation fails
            folder.mkdir()
        files.sync_folder(folder.parent)


def _remove_file(path: Path) -> None:
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return  # no object has that key


def _walk(bucket: Path, prefix: str) -> Iterator[str]:
    # UTF-8 has the order of code points. A folder is sorted by its name with a slash.
    stack = [""]
    while stack:
        key = stack.pop()
        if key and not key.endswith("/"):
            yield key
        else:
            stack += sorted(_children(bucket, key, prefix), reverse=True)


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
    """Whether a file's name is valid UTF-8, as the name of every stored object is."""
    return name.encode(errors="replace") == os.fsencode(name)


def _open_object(path: Path) -> BufferedReader:
    """Open a regular file; anything else with that name is not an object."""
    if path.is_symlink() or not path.is_file():
        raise NoSuchKey("The specified key does not exist.")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise NoSuchKey("The specified key does not exist.") from None


@contextmanager
def _convert_os_errors() -> Iterator[None]:
    """Turn the operating system's errors into S3's."""
    try:
        yield
    except OSError as error:
        raise InternalError(f"The disk of the bucket refused: {error.strerror}") from error
