"""Finds what of an image's data need not be written: whoever writes an image begins with an empty one.

Only grains of 64 KiB, counted from the image's beginning, are left out: they are whole pages of a file, whole
clusters of a qcow2 image, and few enough to look at. What is written reads the same either way.

The files that opening a bundle makes: whole, or not there at all.

A file that is being written has no name where the file system allows that (``O_TMPFILE``), so nothing remains of it
however the process ends. Elsewhere it has a name of its own beside the target, and is removed when the block fails.
Only after the last check it is flushed to the disk and gets the target's name, in one step.

The image that opening a bundle gives to a pipe, from which nothing can be taken back.

Every byte is released only after the digest of its part (and with a certificate the signature) is known to hold; what
is left for the end is the digest of the whole. So the last of the image is held back until that has been checked, too:
a stream that failed is always short, whoever reads it and whether or not the exit status is looked at.
"""

import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thrave.bundle.errors import OutputError, OutputExistsError
from thrave.bundle.tar_reader import ImageRun

GRAIN = 64 * 1024
"""Bytes."""


_ZERO_GRAIN = bytes(GRAIN)


_GLANCE = 512  # bytes that tell most data from zeros, so that the rest of them need not be copied to be compared


def skip_zeros(runs: Iterable[ImageRun]) -> Iterator[ImageRun]:
    """Yield of the runs what is not zeros, in stretches as long as they come."""
    for run in runs:
        yield from _stretches(run)


def _stretches(run: ImageRun) -> Iterator[ImageRun]:
    offset, data = run
    begin = at = 0
    while at < len(data):
        end = min(at + GRAIN - (offset + at) % GRAIN, len(data))
        if _is_zeros(data[at:end]):
            if begin < at:
                yield ImageRun(offset + begin, data[begin:at])
            begin = end
        at = end
    if begin < at:
        yield ImageRun(offset + begin, data[begin:at])


def _is_zeros(grain: memoryview) -> bool:
    glance = grain[:_GLANCE].tobytes()
    return glance == _ZERO_GRAIN[: len(glance)] and grain.tobytes() == _ZERO_GRAIN[: len(grain)]


_NO_UNNAMED_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})


_COMPARED = 1024 * 1024


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


_ZEROS = bytes(1024 * 1024)


class ImageStream:
    """An image that is being written from its beginning to its end; holes are written as zeros."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._at = 0
        self._room = memoryview(bytearray())  # used over and over, as in `buffers.py`
        self._held_at, self._held = 0, self._room

    def write(self, offset: int, data: memoryview) -> None:
        """Hold data back, and write what was held back before."""
        self._release()
        if len(data) > len(self._room):
            self._room = memoryview(bytearray(len(data)))
        self._held_at, self._held = offset, self._room[: len(data)]
        self._held[:] = data

    def finish(self, size: int) -> None:
        """Write what was held back, and zeros up to the image's size (bytes)."""
        self._release()
        self._write_zeros(size)

    def _release(self) -> None:
        if self._held:
            self._write_zeros(self._held_at)
            self._write_all(self._held)

    def _write_zeros(self, end: int) -> None:
        while self._at < end:
            self._write_all(memoryview(_ZEROS)[: end - self._at])

    def _write_all(self, data: memoryview) -> None:
        while data:
            written = os.write(self._descriptor, data)
            self._at, data = self._at + written, data[written:]


@contextmanager
def image_stream(descriptor: int, size: int) -> Iterator[ImageStream]:
    """Give what writes an image of `size` bytes to an open pipe, socket or file; its end comes if the block ends well.

    Raises:
        OutputError: it cannot be written, or nobody reads it any more.
    """
    stream = ImageStream(descriptor)
    try:
        yield stream
        stream.finish(size)
    except OSError as error:
        raise OutputError(f"cannot write the image: {os.strerror(error.errno or 0)}") from error
