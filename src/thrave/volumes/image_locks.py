"""QEMU's image locks: while an image is read here QEMU starts no guest that writes to it, and none that does is read.

Whoever opens an image says what it does with it by read locks on single bytes of the file: byte 100 + n, "I do this";
byte 200 + n, "nobody else may", where n is the number of a permission. It locks first and then looks for locks that
contradict its own, so of two that come at the same moment at least one sees the other. The bytes need not exist, and
nothing is written. These locks belong to the open file (fcntl(2), "open file description locks"): they end when it is
closed, and with the process, whatever way it ends. Programs that only read, a guest that has the image below an overlay
among them, are not in the way.

It is one proof of two, and cannot be the only one (`volume.py`: who opens a volume has made sure). It does not see
programs that do not know QEMU's protocol, a guest that is run with `locking=off`, one on another host whose file system
passes no locks on, and a block device that is written to through another node, as libvirt gives each guest its own.

Source: QEMU 7.2, block/file-posix.c (raw_apply_lock_bytes, raw_check_lock_bytes), include/block/block-common.h.
"""

import errno
import fcntl
import os
import struct
from contextlib import suppress

from thrave.volumes.errors import VolumeInUseError, VolumeUnreadableError
from thrave.volumes.host_files import HostFile, reason

_DOES, _FORBIDS = 100, 200  # RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3  # numbers of the bits of BLK_PERM_…

_OURS = (_DOES + _CONSISTENT_READ, _FORBIDS + _WRITE, _FORBIDS + _RESIZE)
_CONTRADICTING = (_FORBIDS + _CONSISTENT_READ, _DOES + _WRITE, _DOES + _RESIZE)

# struct flock, the same on x86_64 and aarch64: type, whence, start, length, process (0 for these locks).
_FLOCK = struct.Struct("@hhqqi4x")

# A file system or kernel that has no such locks. QEMU then locks nothing either, or was told not to (`locking=off`).
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_TAKEN = frozenset({errno.EAGAIN, errno.EACCES})


class ImageLocks:
    """Locks on the files of one volume; none at first."""

    def __init__(self) -> None:
        self._files: list[HostFile] = []
        self._is_closed = False

    def take(self, file: HostFile) -> None:
        """Lock a file, for as long as these locks are not closed.

        On a file system that has no locks (NFS without them, say) nothing is locked, and that is no error: there is
        still compute's proof that the machine is off.

        Args:
            file: May be taken more than once. Its owner closes it, after these locks.

        Raises:
            VolumeInUseError: Something may write to it.
            VolumeUnreadableError: It cannot be locked.
        """
        self._files.append(file)
        if self._is_closed:  # from another thread: see `interruption`
            raise VolumeUnreadableError(file.path, "nobody waits for it any more")
        try:
            free = _lock(file.fd)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            raise VolumeUnreadableError(file.path, f"it cannot be locked: {reason(error)}") from error
        if not free:
            raise VolumeInUseError(file.path)

    def close(self) -> None:
        """Unlock all of them. May be said again."""
        self._is_closed = True
        while self._files:
            file = self._files.pop()
            # A program that was given the open file has it for a moment longer, and with it the locks.
            with suppress(OSError):
                fcntl.fcntl(file.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def _lock(file: int) -> bool:
    """Take our locks; whether nobody contradicts them."""
    try:
        for byte in _OURS:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in _TAKEN:  # for writing, which QEMU never does
            return False
        raise
    return not any(_is_held(file, byte) for byte in _CONTRADICTING)


def _is_held(file: int, byte: int) -> bool:
    """Whether anybody else has locked the byte, in whatever way."""
    answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
