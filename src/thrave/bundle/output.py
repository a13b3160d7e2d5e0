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

        The data's memory is used for other data as soon as this returns.

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
    """Give a sparse file to write the image to, which becomes ``path`` if the block ends well; see ``new_file``.

    Args:
        path: where the image goes.
        size: bytes of the image.

    Raises:
        OutputError: it cannot be created, written or renamed, or something else than a file is there.
    """
    with new_file(path) as temporary:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.truncate(descriptor, size)
            yield ImageFile(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give an empty file to fill, which is flushed to the disk and becomes ``path`` if the block ends well.

    It belongs to its owner alone (mode 0600): an image may hold secrets.

    Args:
        path: where it goes; a file that is there is replaced at the end, one that a link leads to likewise.

    Raises:
        OutputError: it cannot be created, written or renamed, or something else than a file is there.
    """
    path = path.resolve()
    temporary = path.with_name(f".image-{secrets.token_hex(8)}.partial")
    try:
        _create(path, temporary)
        try:
            yield temporary
            _sync(temporary, os.O_RDWR)
            temporary.rename(path)
            _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from error


def _create(path: Path, temporary: Path) -> None:
    if path.exists() and not path.is_file():
        # Renaming would put the image in the place of a device or a FIFO instead of writing to it.
        raise OutputError(f"cannot write {path}: it is there and is not a regular file")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
