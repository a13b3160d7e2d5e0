"""Writes an opened image to a file, which appears complete or not at all, or to a pipe, whose end is held back.

A file being written has no name if the file system supports that (``O_TMPFILE``), so nothing remains however the
process ends. Otherwise it has a temporary name next to the target and is deleted on an error. After the last check it
is flushed to the disk and gets its name in one step. Written data cannot be removed from a pipe. So the last data is
held back until the digest of the whole image is verified: a failed stream is always short, whether or not the reader
checks the exit status.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thrave.bundle.errors import OutputError, OutputExistsError
from thrave.bundle.tar_reader import ImageRun
from thrave.concurrency import random_hex

GRAIN = 64 * 1024
"""Bytes; holes are found in units of this size: whole pages of a file, and whole clusters of a qcow2 image."""


_ZERO_GRAIN = bytes(GRAIN)


_FIRST_BYTES = 512  # enough to tell most data from zeros without copying the rest


def skip_zeros(runs: Iterable[ImageRun]) -> Iterator[ImageRun]:
    """Yield the runs without aligned grains of zeros: a new image already reads as zeros there."""
    for run in runs:
        yield from _split_at_zeros(run)


def _split_at_zeros(run: ImageRun) -> Iterator[ImageRun]:
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
    first = grain[:_FIRST_BYTES].tobytes()
    return first == _ZERO_GRAIN[: len(first)] and grain.tobytes() == _ZERO_GRAIN[: len(grain)]


_NO_UNNAMED_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})


_COMPARED = 1024 * 1024


class NewFile:
    """A file that is being written.

    Attributes:
        descriptor: Of the open file.
        name: Path by which other programs of this user can open it while it is open here.
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
    """Open a sparse file for the image. It becomes `path` if the block ends without error.

    Args:
        path: Path of the image; a symbolic link is followed.
        size: Bytes of the image.
        replace: Whether an existing file may be replaced. If not, an existing file with the same contents is kept and
            is no error.

    Raises:
        OutputExistsError: Another file exists and may not be replaced.
        OutputError: It cannot be created, written or renamed, or the path is not a regular file.
    """
    path = resolve_links(path)
    is_same_size = not replace and path.is_file() and path.stat().st_size == size
    with new_file(path, replace=replace, is_same=_is_same if is_same_size else None) as file:
        os.truncate(file.descriptor, size)
        yield file


def resolve_links(path: Path) -> Path:
    """Resolve symbolic links. Raises OutputError if they form a loop."""
    loop = OutputError(f"cannot write {path}: its symbolic links form a loop, or cannot be read")
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: before Python 3.13
        raise loop from None
    try:
        resolved.stat()  # Python 3.13 returns a path with the loop in it
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise loop from None
    return resolved


@contextmanager
def new_file(path: Path, *, replace: bool, is_same: Callable[[int, Path], bool] | None = None) -> Iterator[NewFile]:
    """Open an empty file. It is flushed to the disk and becomes `path` if the block ends without error.

    Only its owner can read it (mode 0600): an image may contain secrets.

    Args:
        path: Final path; its folder must exist.
        replace: Whether an existing file is replaced at the end.
        is_same: Compares the new file (its descriptor) with an existing file that may not be replaced. If they are the
            same, the existing one is kept. Without it, an existing file is an error before anything is written.

    Raises:
        OutputExistsError: A file exists and may not be replaced.
        OutputError: It cannot be created, written or renamed, or the path is not a regular file.
    """
    try:
        _check_target(path, may_exist=replace or is_same is not None)
        with _create_temporary(path.parent) as (descriptor, name):
            yield NewFile(descriptor, name or Path(f"/proc/{os.getpid()}/fd/{descriptor}"))
            os.fsync(descriptor)
            _publish(descriptor, name, path, replace=replace, is_same=is_same)
        _sync(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from error


def _check_target(path: Path, *, may_exist: bool) -> None:
    if path.exists() and not path.is_file():
        # Renaming would replace a device or a FIFO by the image, not write to it.
        raise OutputError(f"cannot write {path}: it exists and is not a regular file")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {path.parent} does not exist")
    if not may_exist and os.path.lexists(path):
        raise OutputExistsError(path)


@contextmanager
def _create_temporary(folder: Path) -> Iterator[tuple[int, Path | None]]:
    """Yield the descriptor of a new file, and its path if the file system needs one."""
    descriptor, name = _create_unnamed(folder), None
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


def _create_unnamed(folder: Path) -> int | None:
    """Return the descriptor of a file without a name; None if unsupported, or if it could not get a name later."""
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
    # Only renaming replaces a file. If the process is killed between the two calls, the temporary name remains.
    other = name or _temporary_name(path.parent)
    if name is None:
        _link(descriptor, None, other)
    try:
        other.rename(path)
    finally:
        with suppress(FileNotFoundError):
            other.unlink()


def _link(descriptor: int, name: Path | None, path: Path) -> None:
    """Give the file a further name, which must not exist yet."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # With the folder's descriptor Python calls linkat, the only call that follows the link in /proc.
        source = name or Path(f"/proc/self/fd/{descriptor}")
        os.link(source, path.name, dst_dir_fd=folder, follow_symlinks=name is None)
    except PermissionError:  # a file system without hard links, such as vfat
        if name is None or os.path.lexists(path):
            raise
        name.rename(path)
    finally:
        os.close(folder)


def _temporary_name(folder: Path) -> Path:
    return folder / f".image-{random_hex(8)}.partial"


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
    """An image that is written sequentially; holes are written as zeros."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._at = 0
        self._buffer = memoryview(bytearray())  # reused, as in `BufferPool`
        self._held_at, self._held = 0, self._buffer

    def write(self, offset: int, data: memoryview) -> None:
        """Hold the data back, and write the data held back before."""
        self._release()
        if len(data) > len(self._buffer):
            self._buffer = memoryview(bytearray(len(data)))
        self._held_at, self._held = offset, self._buffer[: len(data)]
        self._held[:] = data

    def finish(self, size: int) -> None:
        """Write the data held back, and zeros up to `size` bytes."""
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
    """Open an image of `size` bytes on a pipe, socket or file. Its end is written if the block ends without error.

    Raises:
        OutputError: It cannot be written, or the reader has closed the pipe.
    """
    stream = ImageStream(descriptor)
    try:
        yield stream
        stream.finish(size)
    except OSError as error:
        raise OutputError(f"cannot write the image: {os.strerror(error.errno or 0)}") from error
