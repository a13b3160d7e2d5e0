"""The image file that opening a bundle makes.

It has a name of its own beside the target until everything about it has been checked; then it is flushed to the disk
and takes the target's name, in one step. On any failure it is removed and the target is as it was.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from thrave.bundle.errors import OutputError


class ImageTarget(Protocol):
    """An image that is being written, wherever it goes."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write at an offset, which ascends from call to call. What is never written reads as zeros.

        Raises:
            OSError: it cannot be written; so may whatever error the target calls its own.
        """
        ...


ImageMaker = Callable[[int], AbstractContextManager[ImageTarget]]
"""Makes an image of so many bytes: whole if the block ends well, after the last check, and otherwise nothing."""


class ImageFile:
    """A sparse file that is being filled."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, offset: int, data: memoryview) -> None:
        """Write at an offset."""
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            offset, data = offset + written, data[written:]


@contextmanager
def image_file(path: Path, size: int) -> Iterator[ImageFile]:
    """Give a file to write the image to, which becomes ``path`` if the block ends well.

    It belongs to its owner alone (mode 0600): an image may hold secrets.

    Args:
        path: where the image goes; a file that is there is replaced at the end, one that a link leads to likewise.
        size: bytes of the image.

    Raises:
        OutputError: it cannot be created, written or renamed, or something else than a file is there.
    """
    path = path.resolve()
    temporary = path.with_name(f".image-{secrets.token_hex(8)}.partial")
    try:
        descriptor = _create(path, temporary, size)
        try:
            yield ImageFile(descriptor)
            os.fsync(descriptor)
            temporary.rename(path)
            _sync_folder(path.parent)
        finally:
            os.close(descriptor)
            with suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from error


def _create(path: Path, temporary: Path, size: int) -> int:
    if path.exists() and not path.is_file():
        # Renaming would put the image in the place of a device or a FIFO instead of writing to it.
        raise OutputError(f"cannot write {path}: it is there and is not a regular file")
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.truncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        temporary.unlink()
        raise
    return descriptor


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
