"""Locks between processes, and files that are written completely or not at all.

A lock is a flock(2) on a file of its own, which the kernel releases when its process ends in any way. Two opens of the
file exclude each other also within one process, so locks work between threads too. Lock files are empty and are never
removed: removing one while another process waits for it would let two processes in.

A file is created once or replaced, and it is on the disk when the call returns. A reader never sees half a file, a
crash never leaves one under its final name, and a new file has mode 0600 (`replace` can give it another one). Nothing
here creates the folder of a file.
"""

import fcntl
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thrave.concurrency import monotonic, sleep

LOCK_TIMEOUT = 30.0  # seconds
_MIN_RETRY_INTERVAL, _MAX_RETRY_INTERVAL = 0.001, 0.1  # seconds
_TEMPORARY_PREFIX = ".new-"


@contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock for the length of the block.

    Args:
        path: The lock file. The file and its folder are created if they do not exist.
        wait: Wait up to `LOCK_TIMEOUT` seconds, or give up at once. There is a timeout because the holder may hang in
            a file system or a hypervisor that does not respond.

    Raises:
        BlockingIOError: Another process or thread has the lock.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(descriptor, LOCK_TIMEOUT if wait else 0.0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, timeout: float) -> None:
    deadline = monotonic() + timeout
    interval = _MIN_RETRY_INTERVAL
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() >= deadline:
                raise
            sleep(interval)
            interval = min(2 * interval, _MAX_RETRY_INTERVAL)
        else:
            return


class NotPrivateError(PermissionError):
    """Other users may access a file or folder that only its owner should; the message has the command to change it."""


def create_exclusive(path: Path, data: bytes) -> bool:
    """Create a file with its content, unless the name is taken.

    If several processes do this at once, exactly one creates the file, and the others find its whole content.

    Args:
        path: The file; its folder must exist.
        data: The whole content.

    Returns:
        True if this call created the file; False if the file existed, which is not changed.

    Raises:
        OSError: The file cannot be written.
    """
    if path.exists():
        return False
    with _temporary_file(path.parent, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    sync_folder(path.parent)
    return True


def replace(path: Path, data: bytes | memoryview, *, spool: Path, mode: int = 0o600) -> None:
    """Write a file, and replace an existing one.

    Args:
        path: The file; its folder must exist.
        data: The whole content.
        spool: A folder of the same file system, in which the file is written before it gets its name.
        mode: Permissions of the file.

    Raises:
        OSError: The file cannot be written; an existing file is not changed.
    """
    with _temporary_file(spool, data) as temporary:
        temporary.chmod(mode)
        temporary.replace(path)
    sync_folder(path.parent)


def remove_stale(spool: Path) -> None:
    """Remove the temporary files of dead processes from a spool folder. Files of running processes are locked."""
    for path in spool.glob(f"{_TEMPORARY_PREFIX}*"):
        with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def read_private(path: Path) -> bytes:
    """Read a file that holds a secret.

    A file that other users may access is refused, as OpenSSH does with private keys: the secret may be known.

    Raises:
        NotPrivateError: Users other than the owner may read or write the file.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise NotPrivateError(
                f"{path} is accessible to users other than its owner (mode {mode:04o}). Run: chmod 600 {path}"
            )
        return file.read()


def restrict_to_owner(path: Path) -> None:
    """Remove all permissions of group and others from a file or folder, if it exists.

    Raises:
        NotPrivateError: Other users may access it, and this user may not change the permissions.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return
    try:
        if mode & 0o077:
            path.chmod(mode & ~0o077)
    except FileNotFoundError:  # SQLite removes its -wal and -shm when the last connection is closed
        return
    except PermissionError:
        raise NotPrivateError(
            f"{path} is accessible to users other than its owner (mode {mode:04o}), and user {user_name()} may not "
            f"change that. Run: sudo chmod go= {path}"
        ) from None


def user_name() -> str:
    """Return the name of the user that this process runs as, or the user id if it has no name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # in a container, for example
        return str(os.geteuid())


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes that call this for the length of the block. Waits for them."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # No timeout: another process may be upgrading a large database there. Signals end the wait.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class ProcessLock:
    """A lock file that one process holds until it ends, with a line of text about the process.

    The kernel releases the lock at the end of the process, also after kill -9.

    Raises:
        ProcessLockedError: Another process holds it.
        OSError: It cannot be opened or created.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = self._file.read()
            self._file.close()
            raise ProcessLockedError(text) from None
        self.write(f"process {os.getpid()}")

    def write(self, text: str) -> None:
        """Replace the line of text."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()


class ProcessLockedError(Exception):
    """Another process holds the lock file; the message is the text that the process has written to it."""


def sync_folder(folder: Path) -> None:
    """Write the changes of names in a folder (new, renamed, removed) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _temporary_file(folder: Path, data: bytes | memoryview) -> Iterator[Path]:
    """Yield a file with this content under a temporary name, locked against `remove_stale` for the block."""
    descriptor, path = _new_file(folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            yield path
    finally:
        path.unlink(missing_ok=True)


def _new_file(folder: Path) -> tuple[int, Path]:
    while True:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=_TEMPORARY_PREFIX)
        fcntl.flock(
            descriptor, fcntl.LOCK_EX
        )  # no timeout: only `remove_stale` may have the lock, which does not wait for anything
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # `remove_stale` removed it before it was locked
