"""The files and block devices of the host that a volume lies in: each is opened once, and known by its descriptor.

A name can be given to another file at any moment, and can lead through links to any other folder. So a name is followed
once; which file that led to, where it lies, and whether it may be read is asked of the open file; and QEMU's programs
are given the open files (`/proc/self/fd/N`), never a name. Afterwards the file is compared with what it was: size,
times of change, and whether its name still leads to it.
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
_MOST_TICKS = 50

_FIRST_NUMBER = 10
_LAST_OFFSET = (1 << 63) - 1  # off_t
_STATISTICS = "/sys/dev/block/{}:{}/stat"
_WRITING = (4, 6, 11)  # the numbers of writes, of sectors written, of discards (kernel: Documentation/block/stat.rst)


class FileId(NamedTuple):
    """Which file it is, whatever it is called: two names of one file, and two nodes of one device, have the same."""

    device: int
    inode: int


class _State(NamedTuple):
    """What tells whether a file has changed. Times are in nanoseconds.

    The time of the last change of status (ctime) cannot be set back, so it betrays who writes and then sets back the
    time of the last change of content (mtime). For a block device the kernel counts the writes instead, and there are
    no times; a write that does not go through this host's node of the device is not counted.
    """

    size: int
    mtime: int
    ctime: int
    writes: tuple[int, ...]


@dataclass(frozen=True)
class AllowedFolders:
    """Where files may lie that an image refers to.

    Attributes:
        folder: The folder of the topmost image; None if that is a block device, which has none of its own.
        directories: Folders that the operator has named; files may also lie in folders below them.
    """

    folder: Path | None
    directories: Sequence[Path] = ()

    def hold(self, real: Path) -> bool:
        """Whether a file may be read, by its real path."""
        return real.parent == self.folder or any(real.is_relative_to(one.resolve()) for one in self.directories)


class HostFile:
    """A regular file or block device, open for reading.

    Args:
        path: Its name; symbolic links are followed, once.
        places: Where it may lie, links or not; None if anywhere.
        to_compare: It is to be compared later (`check_unchanged`). Opening it then takes up to a second while
            something writes to it.

    Attributes:
        path: The name, absolute.
        real: Where it lies.
        fd: The file descriptor; programs that are started do not inherit it, unless they are given it.
        size: Bytes, when it was opened.
        is_device: It is a block device.

    Raises:
        VolumeUnreadableError: It cannot be opened, is something else, or lies where it may not.
    """

    def __init__(self, path: Path, places: AllowedFolders | None = None, *, to_compare: bool = True) -> None:
        self.path = Path(path).absolute()
        self.fd = -1
        try:
            handle = os.open(self.path, os.O_PATH | os.O_CLOEXEC)  # nothing happens to what the name leads to
        except (OSError, ValueError) as error:
            raise VolumeUnreadableError(path, reason(error)) from error
        try:
            self._open(handle, places)
            self._begun = self._settled() if to_compare else self._state()
        except OSError as error:
            self.close()
            raise VolumeUnreadableError(path, reason(error)) from error
        except VolumeUnreadableError:
            self.close()
            raise
        finally:
            os.close(handle)
        self.size = self._begun.size

    def __enter__(self) -> Self:
        """Give itself; it is closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    @property
    def id(self) -> FileId:
        """Which file it is."""
        return _id(os.fstat(self.fd))

    @property
    def name_for_programs(self) -> str:
        """What a program opens that has inherited the descriptor: this file, whatever its name leads to by then."""
        return f"/proc/self/fd/{self.fd}"

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from an offset on; fewer at the file's end.

        Raises:
            VolumeUnreadableError: The system does not give them.
        """
        if offset > _LAST_OFFSET - length:  # a stranger's number
            return b""
        try:
            return os.pread(self.fd, length, offset)
        except OSError as error:
            raise VolumeUnreadableError(self.path, reason(error), offset=offset) from error

    def check_unchanged(self) -> None:
        """Compare the file with what it was when it was opened.

        Raises:
            VolumeChangedError: It was written to, cut, extended or replaced.
            VolumeUnreadableError: It cannot be told.
        """
        try:
            now = self._state()
            there = _id(self.path.stat())
        except FileNotFoundError:
            raise VolumeChangedError(self.path, "it was removed or renamed") from None
        except OSError as error:
            raise VolumeUnreadableError(self.path, reason(error)) from error
        if now.size != self._begun.size:
            raise VolumeChangedError(self.path, f"it had {self._begun.size} bytes, and has {now.size}")
        if now != self._begun:
            raise VolumeChangedError(self.path, "something wrote to it")
        if there != self.id:
            raise VolumeChangedError(self.path, "another file has its name now")

    def close(self) -> None:
        """Close the file. May be said again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _open(self, handle: int, places: AllowedFolders | None) -> None:
        mode = os.fstat(handle).st_mode
        self.is_device = stat.S_ISBLK(mode)
        if not (stat.S_ISREG(mode) or self.is_device):
            raise VolumeUnreadableError(self.path, "neither a regular file nor a block device")
        self.real = Path(f"/proc/self/fd/{handle}").readlink()
        if places is not None and not places.hold(self.real):
            raise VolumeUnreadableError(
                self.path,
                f"it lies in {self.real.parent}, neither the image's own folder nor one of the image directories",
                files=(self.real.parent,),
            )
        self.fd = inheritable_number(os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))

    def _state(self) -> _State:
        status = os.fstat(self.fd)
        if self.is_device:
            return _State(os.lseek(self.fd, 0, os.SEEK_END), 0, 0, _writes(status.st_rdev))
        return _State(status.st_size, status.st_mtime_ns, status.st_ctime_ns, ())

    def _settled(self) -> _State:
        """Its state, once whatever is written from now on has a later time, or is counted."""
        if self.is_device:
            os.fsync(self.fd)  # what was written before, and is in memory still
        for _ in range(_MOST_TICKS):
            state = self._state()
            if self.is_device or abs(wall_time() - state.ctime / 1e9) > _TICK:
                break
            sleep(_TICK)
        return state


class HostFiles:
    """The files of one volume; none at first."""

    def __init__(self) -> None:
        self.opened: list[HostFile] = []

    def open(self, path: Path, places: AllowedFolders | None = None, *, to_compare: bool = True) -> HostFile:
        """Open a file, as `HostFile`."""
        file = HostFile(path, places, to_compare=to_compare)
        self.opened.append(file)
        return file

    def check_unchanged(self) -> None:
        """Compare each with what it was. Raises as `HostFile.check_unchanged`."""
        for file in self.opened:
            file.check_unchanged()

    def close(self) -> None:
        """Close all of them. May be said again."""
        for file in self.opened:
            file.close()


def inheritable_number(fd: int) -> int:
    """The same open file under a number that a program can inherit: 3 is a server's socket (sd_listen_fds(3))."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_NUMBER)
    finally:
        os.close(fd)


def reason(error: OSError | ValueError) -> str:
    """The system's words, without the file's name."""
    if isinstance(error, OSError):
        return os.strerror(error.errno or 0)
    return "no file has such a name"


def _id(status: os.stat_result) -> FileId:
    if stat.S_ISBLK(status.st_mode):
        return FileId(-1, status.st_rdev)
    return FileId(status.st_dev, status.st_ino)


def _writes(device: int) -> tuple[int, ...]:
    """How often the kernel has written to a block device; nothing if it does not tell."""
    try:
        numbers = Path(_STATISTICS.format(os.major(device), os.minor(device))).read_text("ascii").split()
    except OSError:
        return ()
    return tuple(int(numbers[at]) for at in _WRITING if at < len(numbers))
