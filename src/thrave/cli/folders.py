"""Where the files of bundles lie: a folder of a disk, of a bucket or of a web server, all read in the same way.

File names come from manifests, checked to be bare; a folder never leads to another one. What is read is hostile until
`thrave.bundle` has verified it, and never more of it is held than was asked for.

    FolderError             a file cannot be read, written or removed
    ├── FileMissingError    it is not there
    └── FolderRefusedError  who asks may not
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from thrave import files
from thrave.bundle.base import MAX_PART_BYTES, read_regular_file
from thrave.bundle.errors import OutputError, PartDamagedError, PartMissingError
from thrave.bundle.image_output import new_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from thrave.bundle.manifest import Manifest

_FAR_AHEAD = 8
_FAR_BYTES = (
    128 << 20
)  # of parts that are on their way or wait for their turn, if they are as long as the manifest says


class FolderError(Exception):
    """A file cannot be read, written or removed; the message says which and why."""


class FileMissingError(FolderError):
    """The file, its folder or its bucket is not there."""


class FolderRefusedError(FolderError):
    """Who asks may not."""


class Folder(Protocol):
    """Reads the files of bundles, for several threads at once. Every failure is a FolderError."""

    is_far: bool
    """Whether each answer takes a way that is worth asking for several at once."""

    def where(self, filename: str) -> str:
        """A file's whole name, for people and for the command line."""
        ...

    def read(self, filename: str, most: int) -> bytes:
        """Return a file's bytes; of one that has more than `most`, one more than that.

        Raises:
            FileMissingError: It is not there.
        """
        ...

    def size(self, filename: str) -> int | None:
        """A file's size in bytes; None if it is not there."""
        ...


@runtime_checkable
class WritableFolder(Folder, Protocol):
    """Writes them, too."""

    def write(self, filename: str, data: bytes) -> None:
        """Write a file whole, in the place of the one that may be there; it is durable when this returns."""
        ...

    def remove(self, filenames: Iterable[str]) -> None:
        """Remove exactly these files; one that is not there is fine."""
        ...


class LocalFolder:
    """A folder of the disk.

    Args:
        path: The folder; made when it is first written to.
        manifest: The one file in it that the user has named: it may be a pipe, and is waited for.
    """

    is_far = False

    def __init__(self, path: Path, manifest: str = "") -> None:
        self._path = path
        self._manifest = manifest

    def where(self, filename: str) -> str:
        """See Folder."""
        return str(self._path / filename)

    def read(self, filename: str, most: int) -> bytes:
        """See Folder."""
        path = self._path / filename
        with _faults("read", path):
            if filename != self._manifest:
                return read_regular_file(path, most)
            with path.open("rb") as file:
                return file.read(most + 1)

    def size(self, filename: str) -> int | None:
        """See Folder."""
        path = self._path / filename
        with _faults("read", path):
            return path.stat().st_size if path.exists() else None

    def write(self, filename: str, data: bytes) -> None:
        """See WritableFolder."""
        with _faults("write to", self._path):
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
        with _faults("remove from", self._path):
            for filename in filenames:
                (self._path / filename).unlink(missing_ok=True)
            files.sync_folder(self._path)


class FolderParts:
    """The parts of a bundle in a folder; a `thrave.bundle` SizedPartSource. A folder that fails is no missing part."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def read(self, filename: str) -> bytes:
        """See PartSource."""
        try:
            data = self._folder.read(filename, MAX_PART_BYTES)
        except FileMissingError as error:
            raise PartMissingError(filename, str(error)) from error
        if len(data) > MAX_PART_BYTES:
            raise PartDamagedError(filename, f"it has more than {MAX_PART_BYTES} bytes")
        return data

    def size(self, filename: str) -> int:
        """See SizedPartSource."""
        size = self._folder.size(filename)
        if size is None:
            raise PartMissingError(filename, f"{self._folder.where(filename)} does not exist")
        return size


def parts_ahead(folder: Folder, manifest: Manifest) -> int | None:
    """How many parts to ask a folder for at once; None: as suits a disk.

    From afar as many as hide the way, as long as a few stay within the memory that they may take. A bundle whose parts
    are longer than its manifest says is refused at the first one; none is longer than `MAX_PART_BYTES`.
    """
    if not folder.is_far:
        return None
    part_size = manifest.bundled_size // len(manifest.parts) + 1
    return max(2, min(_FAR_AHEAD, _FAR_BYTES // part_size))


@contextmanager
def _faults(doing: str, path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileMissingError(f"{path} does not exist") from error
    except OSError as error:
        raise FolderError(f"cannot {doing} {path}: {error.strerror}") from error
