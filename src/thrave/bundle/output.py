"""The image file that opening a bundle makes.

It has a name of its own beside the target until everything about it has been checked; then it is flushed to the disk
and takes the target's name, in one step. On any failure it is removed and the target is as it was.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thrave.bundle.errors import OutputError

_GRAIN = 64 * 1024
_ZEROS = bytes(_GRAIN)


class ImageFile:
    """A sparse file that is being filled."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, offset: int, data: memoryview) -> None:
        """Write at an offset; stretches of 64 KiB that are all zeros stay holes."""
        for start in range(0, len(data), _GRAIN):
            piece = data[start : start + _GRAIN]
            if piece[0] or piece.tobytes() != _ZEROS[: len(piece)]:
                self._write_all(offset + start, piece)

    def _write_all(self, offset: int, piece: memoryview) -> None:
        while piece:
            written = os.pwrite(self._descriptor, piece, offset)
            offset, piece = offset + written, piece[written:]


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
