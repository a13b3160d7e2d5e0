"""Contracts of this package: the image that is sealed, the source of parts, the target of an opened image.

Also the parts of a local folder. Names of parts are validated elsewhere; nevertheless only regular files are opened,
and no more is read than a part may have. The contents of a part are verified in `thrave.bundle.verifier`.
"""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from thrave.bundle.errors import PartDamagedError, PartMissingError

Span = tuple[int, int]
"""Offset and length in bytes."""


class Image(Protocol):
    """A disk image. Nothing may write to it while it is read."""

    @property
    def size(self) -> int:
        """Apparent size in bytes."""
        ...

    def extents(self) -> Sequence[Span]:
        """Return (offset, length) of the data in bytes: ascending, without overlap, within the size."""
        ...

    def prefetch(self, offset: int, length: int) -> None:
        """Announce bytes that are read soon, for read-ahead. Does not wait and does not raise."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer with the bytes at the offset, or raise."""
        ...


class ImageTarget(Protocol):
    """An image that is being written."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write at an offset. Offsets ascend from call to call; bytes that are never written read as zeros.

        The caller reuses the memory of the data after this returns.

        Raises:
            OSError: The data cannot be written. A target may raise errors of its own.
        """
        ...


ImageMaker = Callable[[int], AbstractContextManager[ImageTarget]]
"""Creates an image of a size in bytes. The image is complete if the block ends without error; else nothing remains."""


MAX_PART_BYTES = 64 * 1024 * 1024
"""Maximum size of a part. Known bundlers cut parts of 10 MiB. A part is in memory until its digest is verified."""


class PartSource(Protocol):
    """The parts of one bundle by name. Safe to use from several threads."""

    def read(self, filename: str) -> bytes:
        """Return the bytes of a part.

        Raises:
            PartMissingError: The part does not exist or cannot be read.
            PartDamagedError: It has more than `MAX_PART_BYTES`.
        """
        ...


class DirectoryParts:
    """Parts in a local folder, next to their manifest."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, filename: str) -> bytes:
        """See `PartSource`."""
        try:
            data = read_regular_file(self._directory / filename, MAX_PART_BYTES)
        except OSError as error:
            raise PartMissingError(filename, str(error.strerror)) from error
        if len(data) > MAX_PART_BYTES:
            raise PartDamagedError(filename, f"more than {MAX_PART_BYTES} bytes")
        return data


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a file, or the first ``max_bytes + 1`` if it has more than `max_bytes`.

    Raises:
        OSError: It cannot be read, or is not a regular file.
    """
    # Without O_NONBLOCK, a FIFO of that name would block the caller.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - of a descriptor
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read(min(status.st_size, max_bytes) + 1)
