"""Where the parts of a bundle are read from.

Names arrive here checked to be bare; still, only regular files are opened, and no more is read than a part may have.
What a part holds is verified elsewhere.
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
    """A disk image that nobody writes while it is being read."""

    @property
    def size(self) -> int:
        """Apparent size in bytes."""
        ...

    def extents(self) -> Sequence[Span]:
        """Return (offset, length) of the data in bytes: ascending, not overlapping, within the size."""
        ...

    def will_read(self, offset: int, length: int) -> None:
        """Hear what is read soon, to have it ready by then; never waits, never raises."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer from the offset on, or raise."""
        ...


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


MAX_PART_BYTES = 64 * 1024 * 1024
"""Every known bundler cuts parts of 10 MiB. A part is held in memory until its digest is known to be right."""


class PartSource(Protocol):
    """Gives the parts of one bundle by name, to several threads at once."""

    def read(self, filename: str) -> bytes:
        """Return a part's bytes.

        Raises:
            PartMissingError: it is not there or cannot be read.
            PartDamagedError: it has more than ``MAX_PART_BYTES``.
        """
        ...


class DirectoryParts:
    """The parts that lie in a folder, beside their manifest."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, filename: str) -> bytes:
        """Return a part's bytes; see ``PartSource``."""
        try:
            data = read_regular_file(self._directory / filename, MAX_PART_BYTES)
        except OSError as error:
            raise PartMissingError(filename, str(error.strerror)) from error
        if len(data) > MAX_PART_BYTES:
            raise PartDamagedError(filename, f"it has more than {MAX_PART_BYTES} bytes")
        return data


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Return a file's bytes, one more than ``max_bytes`` if it has more than that.

    Raises:
        OSError: it cannot be read, or is no regular file: a FIFO by that name must not make anybody wait.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - of a descriptor
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return file.read(min(status.st_size, max_bytes) + 1)
