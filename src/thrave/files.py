"""Locks between processes that end with their holder, however it ends: flock(2) on a file of its own.

Two opens of the file exclude each other also within one process, so they work between threads too. Lock files hold
nothing and are never removed: removing one while another process waits for it would let two in.

Files that are whole or not there: created once, or replaced, and on the disk when the call returns.

What every room that keeps its state in files needs (the vault's key, the service's identity, buckets on a
disk). A reader never sees half a file, a crash never leaves one under its real name, and a new file is for
its owner's eyes alone (mode 0600). It never decides what stands in a file, and never makes the folder that
the file goes to.
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


_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1  # seconds between two attempts


@contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock for the length of the block.

    Args:
        path: The lock's file; it is made when it is not there, its folder too.
        wait: Wait until it is free, LOCK_TIMEOUT seconds at the most, or give up at once: whoever holds it may hang in
            a file system or a hypervisor that does not answer.

    Raises:
        BlockingIOError: Somebody else has it.
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
    pause = _FIRST_PAUSE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() >= deadline:
                raise
            sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            return


_NEW = ".new-"


class OpenToOthersError(PermissionError):
    """A file or folder that should be its owner's alone is not; the message has the command that closes it."""


def create_exclusive(path: Path, data: bytes) -> bool:
    """Create a file with its content, unless the name is taken.

    Of several processes that do this at once exactly one wins, and the others find its whole content.

    Args:
        path: The file; its folder is there already.
        data: The whole content.

    Returns:
        True if this call created the file, False if there was one (which is left as it is).

    Raises:
        OSError: The disk refused.
    """
    if path.exists():
        return False
    with _written(path.parent, data) as written:
        try:
            os.link(written, path)
        except FileExistsError:
            return False
    sync_folder(path.parent)
    return True


def replace(path: Path, data: bytes | memoryview, *, spool: Path) -> None:
    """Write a file, in the place of the one that may be there.

    Args:
        path: The file; its folder is there already.
        data: The whole content.
        spool: A folder of the same file system, where the file is written before it gets its name.

    Raises:
        OSError: The disk refused; what was there before is untouched.
    """
    with _written(spool, data) as written:
        written.replace(path)
    sync_folder(path.parent)


def remove_stale(spool: Path) -> None:
    """Remove the files that processes were writing in a spool folder when they died; not those of living ones."""
    for path in spool.glob(f"{_NEW}*"):
        with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def read_private(path: Path) -> bytes:
    """Read a file that holds a secret.

    As OpenSSH does with a private key, a file that others may read is refused rather than used: its secret is
    one no longer.

    Raises:
        OpenToOthersError: Somebody besides the owner may read or write the file.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise OpenToOthersError(f"{path} is open to others than its owner (mode {mode:04o}); chmod 600 it")
        return file.read()


def close_to_others(path: Path) -> None:
    """Take every right of group and others from a file or folder, if it is there.

    Raises:
        OpenToOthersError: It is open to others, and this user may not change that.
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
        raise OpenToOthersError(
            f"{path} is open to others than its owner (mode {mode:04o}), and user {user()} may not change that; "
            f"run: sudo chmod go= {path}"
        ) from None


def user() -> str:
    """The name of the user that this process runs as."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # in a container, for example
        return str(os.geteuid())


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Have a folder to ourselves among the processes that ask for the same; waits for the others."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # No timeout: another process may be upgrading a large database there. Signals end the wait.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class HeldFile:
    """A file that one process holds for as long as it lives, with a line of text about that process.

    The kernel releases it at the end of the process, also after kill -9.

    Raises:
        FileHeldError: Another process holds it.
        OSError: It cannot be opened or made.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = self._file.read()
            self._file.close()
            raise FileHeldError(text) from None
        self.write(f"process {os.getpid()}")

    def write(self, text: str) -> None:
        """Replace the line of text."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()


class FileHeldError(Exception):
    """Another process holds a file; the message is the text that it has written there."""


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: new, renamed and removed ones."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _written(folder: Path, data: bytes | memoryview) -> Iterator[Path]:
    """A file of this content under a passing name, locked against `sweep` until it has got its own."""
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
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=_NEW)
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # no timeout: only `sweep` may have it, which does not wait for anything
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # swept in the moment before it was locked
