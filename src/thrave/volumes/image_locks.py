"""QEMU's image locks: QEMU starts no guest that writes to an image while it is read here, and the other way round.

A program that opens an image declares its use by read locks on single bytes of the file. Byte 100 + n: "I use
permission n"; byte 200 + n: "no other program may use permission n". It locks first and then checks for locks that
conflict, so of two programs that open an image at the same moment at least one detects the other. The bytes need not
exist, and nothing is written. The locks belong to the open file (fcntl(2), "open file description locks"): they end
when it is closed or the process ends. Programs that only read do not conflict, for example a guest that has the image
below an overlay.

The locks are one check of two and not sufficient (`base`: the caller makes sure that nothing writes). They do not
detect programs without QEMU's protocol, a guest with `locking=off`, a guest on another host if the file system does not
pass locks on, or a write to a block device through another node; libvirt makes a node of its own for each guest.

Source: QEMU 7.2, block/file-posix.c (raw_apply_lock_bytes, raw_check_lock_bytes), include/block/block-common.h.
"""

import errno
import fcntl
import os
import struct
from contextlib import suppress

from thrave.volumes.errors import VolumeInUseError, VolumeUnreadableError
from thrave.volumes.host_files import HostFile, describe_error

_USES, _FORBIDS = 100, 200  # RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3  # numbers of the bits of BLK_PERM_…

_OUR_BYTES = (_USES + _CONSISTENT_READ, _FORBIDS + _WRITE, _FORBIDS + _RESIZE)
_CONFLICTING_BYTES = (_FORBIDS + _CONSISTENT_READ, _USES + _WRITE, _USES + _RESIZE)

# struct flock, the same on x86_64 and aarch64: type, whence, start, length, process (0 for these locks).
_FLOCK = struct.Struct("@hhqqi4x")

# The file system or kernel has no such locks. Then QEMU does not lock either (or only with `locking=off`).
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_CONFLICT = frozenset({errno.EAGAIN, errno.EACCES})


class ImageLocks:
    """Locks on the files of one volume; none at first."""

    def __init__(self) -> None:
        self._files: list[HostFile] = []
        self._is_released = False

    def lock(self, file: HostFile) -> None:
        """Lock a file until `release`.

        A file system without locks (for example NFS without them) is not an error: the other check, by `compute`,
        still shows that the machine is off.

        Args:
            file: May be locked more than once. Its owner closes it, after `release`.

        Raises:
            VolumeInUseError: Another program may write to it.
            VolumeUnreadableError: It cannot be locked.
        """
        self._files.append(file)
        if self._is_released:  # by `Interruption`, from another thread
            raise VolumeUnreadableError(file.path, "reading was interrupted")
        try:
            is_locked = _lock(file.fd)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return
            raise VolumeUnreadableError(file.path, f"it cannot be locked: {describe_error(error)}") from error
        if not is_locked:
            raise VolumeInUseError(file.path)

    def release(self) -> None:
        """Unlock every file. May be called again."""
        self._is_released = True
        while self._files:
            file = self._files.pop()
            # Closing would not be enough: a program that inherited the open file keeps the locks until it ends.
            with suppress(OSError):
                fcntl.fcntl(file.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def _lock(fd: int) -> bool:
    """Set our locks; return False if another program has a lock that conflicts."""
    try:
        for byte in _OUR_BYTES:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in _CONFLICT:  # a write lock; QEMU sets none
            return False
        raise
    return not any(_is_locked(fd, byte) for byte in _CONFLICTING_BYTES)


def _is_locked(fd: int, byte: int) -> bool:
    """Return whether another open file has a lock of any kind on the byte."""
    result = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    kind: int = _FLOCK.unpack(result)[0]
    return kind != fcntl.F_UNLCK
