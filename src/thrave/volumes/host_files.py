"""Files and block devices of the host that belong to a volume. Each is opened once and then used by its descriptor.

A name can be given to another file at any moment, and can lead through links to any folder. So a name is resolved once.
Its identity, its real path and whether it may be read are checked on the open file. QEMU's programs get the open files
(`/proc/self/fd/N`), never a name. At the end the file is compared with its first state: size, times of change, and
whether its name still leads to it.
"""

import fcntl
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from thrave.concurrency import sleep, wall_time
from thrave.volumes.errors import VolumeChangedError, VolumeUnreadableError

# Two changes within one tick of the kernel's clock have the same time; a tick has at most 10 ms.
_TICK = 0.02  # seconds
_MAX_TICKS = 50

_MIN_FD = 10
_MAX_OFFSET = (1 << 63) - 1  # off_t
_STATISTICS = "/sys/dev/block/{}:{}/stat"
_WRITE_COUNTERS = (4, 6, 11)  # writes, sectors written, discards (kernel: Documentation/block/stat.rst)


class FileId(NamedTuple):
    """The identity of a file: two names of one file, or two nodes of one block device, have the same."""

    device: int
    inode: int


class _State(NamedTuple):
    """What is compared to detect a change. Times in nanoseconds.

    A program can set back the time of the last change of content (mtime), but not that of the last change of status
    (ctime), which changes with it. A block device has no times; the kernel counts its writes instead. A write that does
    not go through this host's node of the device is not counted.
    """

    size: int
    mtime: int
    ctime: int
    writes: tuple[int, ...]


@dataclass(frozen=True)
class AllowedFolders:
    """Folders in which files may be that an image refers to.

    Attributes:
        folder: The folder of the topmost image, without its subfolders; None if the image is a block device.
        directories: Folders from the operator's settings, with their subfolders.
    """

    folder: Path | None
    directories: Sequence[Path] = ()

    def is_allowed(self, real_path: Path) -> bool:
        """Return whether a file with this real path may be read."""
        is_below = (real_path.is_relative_to(directory.resolve()) for directory in self.directories)
        return real_path.parent == self.folder or any(is_below)


class HostFile:
    """A regular file or block device, open for reading.

    Args:
        path: Its name; symbolic links are followed, once.
        folders: Where its real path must be; None if anywhere.
        detect_changes: Whether `check_unchanged` will be called. Opening the file then lasts up to a second while
            another program writes to it.

    Attributes:
        path: The name, absolute.
        real_path: The path without symbolic links.
        fd: The file descriptor. A child process inherits it only if it is passed.
        size: Bytes, when the file was opened.
        is_device: Whether it is a block device.

    Raises:
        VolumeUnreadableError: It cannot be opened, is neither file nor block device, or is outside the folders.
    """

    def __init__(self, path: Path, folders: AllowedFolders | None = None, *, detect_changes: bool = True) -> None:
        self.path = Path(path).absolute()
        self.fd = -1
        try:
            # O_PATH: opening a device or a named pipe for reading can have effects, so check first what it is.
            handle = os.open(self.path, os.O_PATH | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise VolumeUnreadableError(path, describe_error(error)) from error
        try:
            self._open(handle, folders)
            self._first_state = self._wait_for_comparable_state() if detect_changes else self._state()
        except OSError as error:
            self.close()
            raise VolumeUnreadableError(path, describe_error(error)) from error
        except VolumeUnreadableError:
            self.close()
            raise
        finally:
            os.close(handle)
        self.size = self._first_state.size

    def __enter__(self) -> Self:
        """Return the file; it is closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    @property
    def id(self) -> FileId:
        """The identity of the file."""
        return _id(os.fstat(self.fd))

    @property
    def fd_path(self) -> str:
        """A path for programs that inherit the descriptor: they open this file, whatever its name leads to by then."""
        return f"/proc/self/fd/{self.fd}"

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes from an offset on; fewer at the end of the file.

        Args:
            offset: Any number from an untrusted header.
            length: In bytes.

        Raises:
            VolumeUnreadableError: The read failed.
        """
        if offset > _MAX_OFFSET - length:
            return b""
        try:
            return os.pread(self.fd, length, offset)
        except OSError as error:
            raise VolumeUnreadableError(self.path, describe_error(error), offset=offset) from error

    def check_unchanged(self) -> None:
        """Compare the file with its state when it was opened.

        Raises:
            VolumeChangedError: It was written to, cut, extended or replaced.
            VolumeUnreadableError: Its state cannot be read.
        """
        try:
            state = self._state()
            id_of_name = _id(self.path.stat())
        except FileNotFoundError:
            raise VolumeChangedError(self.path, "it was removed or renamed") from None
        except OSError as error:
            raise VolumeUnreadableError(self.path, describe_error(error)) from error
        if state.size != self._first_state.size:
            raise VolumeChangedError(self.path, f"it had {self._first_state.size} bytes, and has {state.size}")
        if state != self._first_state:
            raise VolumeChangedError(self.path, "something wrote to it")
        if id_of_name != self.id:
            raise VolumeChangedError(self.path, "another file has its name now")

    def close(self) -> None:
        """Close the file. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _open(self, handle: int, folders: AllowedFolders | None) -> None:
        mode = os.fstat(handle).st_mode
        self.is_device = stat.S_ISBLK(mode)
        if not (stat.S_ISREG(mode) or self.is_device):
            raise VolumeUnreadableError(self.path, "neither a regular file nor a block device")
        self.real_path = Path(f"/proc/self/fd/{handle}").readlink()
        if folders is not None and not folders.is_allowed(self.real_path):
            folder = self.real_path.parent
            raise VolumeUnreadableError(
                self.path,
                f"it is in {folder}, neither the image's own folder nor one of the image directories",
                files=(folder,),
            )
        self.fd = to_inheritable_fd(os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))

    def _state(self) -> _State:
        status = os.fstat(self.fd)
        if self.is_device:
            return _State(os.lseek(self.fd, 0, os.SEEK_END), 0, 0, _count_writes(status.st_rdev))
        return _State(status.st_size, status.st_mtime_ns, status.st_ctime_ns, ())

    def _wait_for_comparable_state(self) -> _State:
        """Return the state when each later write is certain to change it: to have a later time, or to be counted."""
        if self.is_device:
            os.fsync(self.fd)  # count earlier writes that are still in the page cache now
        for _ in range(_MAX_TICKS):
            state = self._state()
            if self.is_device or abs(wall_time() - state.ctime / 1e9) > _TICK:
                break
            sleep(_TICK)
        return state


class HostFiles:
    """The open files of one volume; none at first."""

    def __init__(self) -> None:
        self.opened: list[HostFile] = []

    def open(self, path: Path, folders: AllowedFolders | None = None, *, detect_changes: bool = True) -> HostFile:
        """Open a file; arguments and errors as of `HostFile`."""
        file = HostFile(path, folders, detect_changes=detect_changes)
        self.opened.append(file)
        return file

    def check_unchanged(self) -> None:
        """Compare each file with its first state. Raises as `HostFile.check_unchanged`."""
        for file in self.opened:
            file.check_unchanged()

    def close(self) -> None:
        """Close every file. May be called again."""
        for file in self.opened:
            file.close()


def to_inheritable_fd(fd: int) -> int:
    """Move a descriptor to a number that a child process can inherit: 3 is a server's socket (sd_listen_fds(3))."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _MIN_FD)
    finally:
        os.close(fd)


def describe_error(error: OSError | ValueError) -> str:
    """Return the system's message, without the name of the file."""
    if isinstance(error, OSError):
        return os.strerror(error.errno or 0)
    return "no file has such a name"


def _id(status: os.stat_result) -> FileId:
    if stat.S_ISBLK(status.st_mode):
        return FileId(-1, status.st_rdev)
    return FileId(status.st_dev, status.st_ino)


def _count_writes(device: int) -> tuple[int, ...]:
    """Return the kernel's write counters of a block device; empty if the kernel has none."""
    try:
        numbers = Path(_STATISTICS.format(os.major(device), os.minor(device))).read_text("ascii").split()
    except OSError:
        return ()
    return tuple(int(numbers[index]) for index in _WRITE_COUNTERS if index < len(numbers))
