"""The files that opening a bundle makes: whole, or not there at all.

A file that is being written has no name where the file system allows that (``O_TMPFILE``), so nothing remains of it
however the process ends. Elsewhere it has a name of its own beside the target, and is removed when the block fails.
Only after the last check it is flushed to the disk and gets the target's name, in one step.
"""

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from thrave.bundle.errors import OutputError, OutputExistsError

_NO_UNNAMED_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
_COMPARED = 1024 * 1024


class ImageTarget(Protocol):
    """An image that is being written, wherever it goes."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write at an offset, which ascends from call to call. What is never written reads as zeros.

        The data's memory is used for other data as soon as this returns.

        Raises:
            OSError: it cannot be written; so may whatever error the target calls its own.
        """
        ...


ImageMaker = Callable[[int], AbstractContextManager[ImageTarget]]
"""Makes an image of so many bytes: whole if the block ends well, after the last check, and otherwise nothing."""


class NewFile:
    """A file that is being written.

    Attributes:
        descriptor: Of the open file.
        name: A name by which other programs of this user can open it while it is open here.
    """

    def __init__(self, descriptor: int, name: Path) -> None:
        self.descriptor = descriptor
        self.name = name

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of the data at an offset in bytes."""
        while data:
            written = os.pwrite(self.descriptor, data, offset)
            offset, data = offset + written, data[written:]


@contextmanager
def image_file(path: Path, size: int, *, replace: bool = True) -> Iterator[NewFile]:
    """Give a sparse file to write the image to, which becomes ``path`` if the block ends well.

    Args:
        path: Where the image goes; a symbolic link is followed.
        size: Bytes of the image.
        replace: Whether a file that is there may be replaced. If not, one that holds just this image already is kept
            and is no error.

    Raises:
        OutputExistsError: Another file is there and may not be replaced.
        OutputError: It cannot be created, written or renamed, or something else than a file is there.
    """
    path = followed(path)
    is_same_size = not replace and path.is_file() and path.stat().st_size == size
    with new_file(path, replace=replace, is_same=_is_same if is_same_size else None) as file:
        os.truncate(file.descriptor, size)
        yield file


def followed(path: Path) -> Path:
    """The file that a path leads to through symbolic links. Raises OutputError if they lead in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: before Python 3.13, which returns the path
        raise OutputError(f"cannot write {path}: its symbolic links lead in a circle, or cannot be read") from None


@contextmanager
def new_file(path: Path, *, replace: bool, is_same: Callable[[int, Path], bool] | None = None) -> Iterator[NewFile]:
    """Give an empty file to fill, which is flushed to the disk and becomes ``path`` if the block ends well.

    It belongs to its owner alone (mode 0600): an image may hold secrets.

    Args:
        path: Where it goes; its folder must be there.
        replace: Whether a file that is there is replaced at the end.
        is_same: Compares the new file (its descriptor) with the one that is there and may not be replaced: if they are
            the same, that one is kept. Without it, a file that is there is an error before anything is written.

    Raises:
        OutputExistsError: A file is there and may not be replaced.
        OutputError: It cannot be created, written or renamed, or something else than a file is there.
    """
    try:
        _check_target(path, may_exist=replace or is_same is not None)
        with _created(path.parent) as (descriptor, name):
            yield NewFile(descriptor, name or Path(f"/proc/{os.getpid()}/fd/{descriptor}"))
            os.fsync(descriptor)
            _publish(descriptor, name, path, replace=replace, is_same=is_same)
        _sync(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from error


def _check_target(path: Path, *, may_exist: bool) -> None:
    if path.exists() and not path.is_file():
        # Renaming would put the image in the place of a device or a FIFO instead of writing to it.
        raise OutputError(f"cannot write {path}: it is there and is not a regular file")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {path.parent} does not exist")
    if not may_exist and os.path.lexists(path):
        raise OutputExistsError(path)


@contextmanager
def _created(folder: Path) -> Iterator[tuple[int, Path | None]]:
    """Give the descriptor of a new file, and its name if it has to have one."""
    descriptor, name = _unnamed_file(folder), None
    if descriptor is None:
        name = _temporary_name(folder)
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor, name
    finally:
        os.close(descriptor)
        if name is not None:
            with suppress(FileNotFoundError):
                name.unlink()


def _unnamed_file(folder: Path) -> int | None:
    """Return the descriptor of a file without a name; None where there are none, or where it could not get one."""
    if not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in _NO_UNNAMED_FILES:
            return None
        raise


def _publish(
    descriptor: int, name: Path | None, path: Path, *, replace: bool, is_same: Callable[[int, Path], bool] | None
) -> None:
    with suppress(FileExistsError):
        _link(descriptor, name, path)
        return
    if not replace:
        if is_same is None or not path.is_file() or not is_same(descriptor, path):
            raise OutputExistsError(path)
        return
    # A name is replaced by renaming another one only. A process that is killed between the two calls leaves it.
    other = name or _temporary_name(path.parent)
    if name is None:
        _link(descriptor, None, other)
    try:
        other.rename(path)
    finally:
        with suppress(FileNotFoundError):
            other.unlink()


def _link(descriptor: int, name: Path | None, path: Path) -> None:
    """Give the file another name, which is not there yet."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # The folder's descriptor has Python call linkat, which alone follows the link in /proc.
        source = name or Path(f"/proc/self/fd/{descriptor}")
        os.link(source, path.name, dst_dir_fd=folder, follow_symlinks=name is None)
    except PermissionError:  # a file system without links: vfat, for instance
        if name is None or os.path.lexists(path):
            raise
        name.rename(path)
    finally:
        os.close(folder)


def _temporary_name(folder: Path) -> Path:
    return folder / f".image-{secrets.token_hex(8)}.partial"


def _is_same(descriptor: int, path: Path) -> bool:
    with path.open("rb", buffering=0) as there:
        offset = 0
        while data := os.pread(descriptor, _COMPARED, offset):
            if os.pread(there.fileno(), len(data), offset) != data:
                return False
            offset += len(data)
        return not os.pread(there.fileno(), 1, offset)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
