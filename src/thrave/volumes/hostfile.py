"""A file or block device of the host, opened for reading: what a volume lies in. Nothing else is ever opened by it."""

import os
import stat
from pathlib import Path

from thrave.volumes.errors import VolumeUnreadableError


def open_file(path: Path) -> tuple[int, int]:
    """Open a regular file or block device; symbolic links are followed.

    Returns:
        The file descriptor, not inherited by programs that are started, and the file's mode.

    Raises:
        VolumeUnreadableError: It cannot be opened, or is something else.
    """
    # O_NONBLOCK: opening a FIFO must not wait for a writer. It changes nothing for files and disks.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise VolumeUnreadableError(path, reason(error)) from error
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return fd, mode
    os.close(fd)
    raise VolumeUnreadableError(path, "neither a regular file nor a block device")


def reason(error: OSError) -> str:
    """The system's words, without the file's name."""
    return os.strerror(error.errno or 0)
