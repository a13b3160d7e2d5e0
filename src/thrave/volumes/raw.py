"""A raw volume: a regular file or a block device, read directly.

Holes come from the file system (``lseek`` with SEEK_DATA and SEEK_HOLE, lseek(2)); one that does not know holes says
that everything is data, and a block device is one extent. No program is needed and nothing is cached here.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from thrave.volumes.base import Extent, merge_extents
from thrave.volumes.errors import VolumeUnreadableError
from thrave.volumes.host_files import HostFile, reason


class RawVolume:
    """Reads a file or block device.

    Args:
        file: The open file, whose owner closes it, or the path of one that is closed with this.

    Raises:
        VolumeUnreadableError: It cannot be opened, or is neither a regular file nor a block device.
    """

    def __init__(self, file: HostFile | Path) -> None:
        self._is_owner = not isinstance(file, HostFile)
        self._file = file if isinstance(file, HostFile) else HostFile(file)
        self._path, self._fd = self._file.path, self._file.fd
        # The kernel's read-ahead would read holes, too, and fill memory with them: readers say what they will read.
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._size = self._file.size

    @property
    def size(self) -> int:
        """Bytes; of a block device what the kernel says."""
        return self._size

    def extents(self) -> list[Extent]:
        """The runs that the file system has stored."""
        if self._file.is_device:
            return merge_extents([(0, self._size)])
        try:
            return merge_extents(list(self._runs()))
        except OSError as error:
            raise VolumeUnreadableError(self._path, reason(error)) from error

    def will_read(self, offset: int, length: int) -> None:
        """Have the kernel begin to read."""
        with suppress(OSError):  # a file system that cannot
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; a file that has become shorter meanwhile is an error, not zeros."""
        done = 0
        while done < len(buffer):
            done += self._read_some(offset + done, buffer[done:])

    def close(self) -> None:
        """Close the file, if it is this one's."""
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

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        try:
            count = os.preadv(self._fd, [buffer], offset)
        except OSError as error:
            raise VolumeUnreadableError(self._path, reason(error), offset=offset) from error
        if not count:
            raise VolumeUnreadableError(self._path, "the file ends here, too early", offset=offset)
        return count
