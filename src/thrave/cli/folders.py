"""The folder that holds the files of a bundle: on the disk, in a bucket or on a web server, with one interface.

`remote_folders` implements buckets and web servers. File names come from a manifest, which has been checked to contain
names without a folder. File contents are untrusted until `thrave.bundle` has verified them, so each read has a limit.

    FolderError             a file cannot be read, written or removed
    ├── FileMissingError    the file does not exist
    └── FolderRefusedError  access denied
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from thrave import files
from thrave.bundle.base import MAX_PART_BYTES, read_regular_file
from thrave.bundle.errors import OutputError, PartDamagedError, PartMissingError
from thrave.bundle.image_output import new_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from thrave.bundle.manifest import Manifest

_MAX_READ_AHEAD = 8  # parts that are requested from a remote folder at once
_MAX_READ_AHEAD_BYTES = 128 << 20  # of these parts in memory, if they are as long as the manifest says


class FolderError(Exception):
    """A file cannot be read, written or removed; the message has its name and the reason."""


class FileMissingError(FolderError):
    """The file, its folder or its bucket does not exist."""


class FolderRefusedError(FolderError):
    """Access denied."""


@dataclass(frozen=True)
class ListedFile:
    """A file in the listing of a folder."""

    name: str
    size: int
    """Bytes."""
    modified: datetime
    """When it was written to this folder, by the clock of the store or disk."""


class Folder(Protocol):
    """Reads the files of bundles. Thread-safe. Every failure is a FolderError."""

    is_remote: bool
    """Whether each read has a network latency, so that several reads at once are faster."""

    def display_name(self, filename: str) -> str:
        """Return the path or URL of a file, as the user writes it on the command line."""
        ...

    def read(self, filename: str, max_bytes: int) -> bytes:
        """Return the content of a file; of a longer file, the first `max_bytes` + 1 bytes.

        Raises:
            FileMissingError: The file does not exist.
        """
        ...

    def size(self, filename: str) -> int | None:
        """Return the size of a file in bytes; None if the file does not exist."""
        ...


@runtime_checkable
class WritableFolder(Folder, Protocol):
    """Reads and writes the files of bundles."""

    def list_files(self, start: str) -> list[ListedFile]:
        """Return the files of this folder whose names begin with `start`, without those of folders in it.

        Raises:
            FileMissingError: The folder or its bucket does not exist.
        """
        ...

    def write(self, filename: str, data: bytes) -> None:
        """Write a file atomically, replacing an existing one; the file is durable on return."""
        ...

    def remove(self, filenames: Iterable[str]) -> None:
        """Remove these files; files that do not exist are ignored."""
        ...


class LocalFolder:
    """A folder on the disk.

    Args:
        path: The folder; created by the first write.
        manifest: Name of the file that the user has named; only this file may be a pipe, whose writer is waited for.
    """

    is_remote = False

    def __init__(self, path: Path, manifest: str = "") -> None:
        self._path = path
        self._manifest = manifest

    def display_name(self, filename: str) -> str:
        """See Folder."""
        return str(self._path / filename)

    def read(self, filename: str, max_bytes: int) -> bytes:
        """See Folder."""
        path = self._path / filename
        with _translate_os_errors("read", path):
            if filename != self._manifest:
                return read_regular_file(path, max_bytes)
            with path.open("rb") as file:
                return file.read(max_bytes + 1)

    def size(self, filename: str) -> int | None:
        """See Folder."""
        path = self._path / filename
        with _translate_os_errors("read", path):
            return path.stat().st_size if path.exists() else None

    def list_files(self, start: str) -> list[ListedFile]:
        """See WritableFolder."""
        found = []
        with _translate_os_errors("read", self._path), os.scandir(self._path) as entries:
            for entry in entries:
                if entry.name.startswith(start) and entry.is_file():
                    status = entry.stat()
                    found.append(ListedFile(entry.name, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC)))
        return found

    def write(self, filename: str, data: bytes) -> None:
        """See WritableFolder."""
        with _translate_os_errors("write to", self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            try:
                with new_file(self._path / filename, replace=True) as file:
                    file.write(0, memoryview(data))
            except OutputError as error:
                raise FolderError(str(error)) from error

    def remove(self, filenames: Iterable[str]) -> None:
        """See WritableFolder."""
        if not self._path.exists():
            return
        with _translate_os_errors("remove from", self._path):
            for filename in filenames:
                (self._path / filename).unlink(missing_ok=True)
            files.sync_folder(self._path)


class FolderParts:
    """The parts of a bundle in a folder: a `thrave.bundle` SizedPartSource.

    Only a file that does not exist is a missing part; other failures stay a FolderError.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def read(self, filename: str) -> bytes:
        """See PartSource."""
        try:
            data = self._folder.read(filename, MAX_PART_BYTES)
        except FileMissingError as error:
            raise PartMissingError(filename, str(error)) from error
        if len(data) > MAX_PART_BYTES:
            raise PartDamagedError(filename, f"more than {MAX_PART_BYTES} bytes")
        return data

    def size(self, filename: str) -> int:
        """See SizedPartSource."""
        size = self._folder.size(filename)
        if size is None:
            raise PartMissingError(filename, f"{self._folder.display_name(filename)} does not exist")
        return size


def read_ahead(folder: Folder, manifest: Manifest) -> int | None:
    """Return how many parts to request at once; None for a folder on the disk, whose default is in `thrave.bundle`.

    For a remote folder: as many as hide the latency, limited by memory. A part that is longer than the manifest says is
    refused when it arrives; no part is longer than `MAX_PART_BYTES`.
    """
    if not folder.is_remote:
        return None
    part_size = manifest.bundled_size // len(manifest.parts) + 1
    return max(2, min(_MAX_READ_AHEAD, _MAX_READ_AHEAD_BYTES // part_size))


@contextmanager
def _translate_os_errors(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileMissingError(f"{path} does not exist") from error
    except PermissionError as error:
        raise FolderRefusedError(f"cannot {action} {path}: {error.strerror}") from error
    except OSError as error:
        raise FolderError(f"cannot {action} {path}: {error.strerror}") from error
