"""A raw volume: a regular file or a block device, read directly. Starts no program and caches nothing.

Holes come from the file system (`lseek` with SEEK_DATA and SEEK_HOLE, lseek(2)). A file system without support for
holes reports everything as data; a block device is one extent.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from thrave.volumes.base import Extent, merge_extents
from thrave.volumes.errors import VolumeUnreadableError
from thrave.volumes.host_files import HostFile, describe_error


class RawVolume:
    """Reads a file or block device.

    Args:
        file: An open file, which its owner closes; or a path, whose file is closed with the volume.

    Raises:
        VolumeUnreadableError: It cannot be opened, or is neither a regular file nor a block device.
    """

    def __init__(self, file: HostFile | Path) -> None:
        self._is_owner = not isinstance(file, HostFile)
        self._file = file if isinstance(file, HostFile) else HostFile(file)
        self._path, self._fd = self._file.path, self._file.fd
        # The kernel's read-ahead would also read holes and fill memory with them; callers use `prefetch` instead.
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._size = self._file.size

    @property
    def size(self) -> int:
        """Size in bytes; of a block device as the kernel reports it."""
        return self._size

    def extents(self) -> list[Extent]:
        """Return the runs that the file system has stored."""
        if self._file.is_device:
            return merge_extents([(0, self._size)])
        try:
            return merge_extents(list(self._runs()))
        except OSError as error:
            raise VolumeUnreadableError(self._path, describe_error(error)) from error

    def prefetch(self, offset: int, length: int) -> None:
        """Start reading these bytes into the kernel's page cache."""
        with suppress(OSError):  # the file system does not support it
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`. A file that was shortened is an error, not zeros."""
        while buffer:
            try:
                count = os.preadv(self._fd, [buffer], offset)
            except OSError as error:
                raise VolumeUnreadableError(self._path, describe_error(error), offset=offset) from error
            if not count:
                raise VolumeUnreadableError(self._path, "the file ends here, too early", offset=offset)
            buffer, offset = buffer[count:], offset + count

    def close(self) -> None:
        """Close the file if the volume opened it."""
        if self._is_owner:
            self._file.close()

    def _runs(self) -> Iterator[tuple[int, int]]:
        end = 0
        while (start := self._next_data(end)) is not None:
            end = min(os.lseek(self._fd, start, os.SEEK_HOLE), self._size)
            yield start, end - start

    def _next_data(self, offset: int) -> int | None:
        try:
            start = os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end
                return None
            raise
        return start if start < self._size else None
