"""Files that are whole or not there: created once, or replaced, and on the disk when the call returns.

What every room that keeps its state in files needs (the vault's key, the service's identity, buckets on a
disk). A reader never sees half a file, a crash never leaves one under its real name, and a new file is for
its owner's eyes alone (mode 0600). It never decides what stands in a file, and never makes the folder that
the file goes to.
"""

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NEW = ".new-"


def create_once(path: Path, data: bytes) -> bool:
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


def sweep(spool: Path) -> None:
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
        PermissionError: Somebody besides the owner may read or write the file.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise PermissionError(f"{path} is open to others than its owner (mode {mode:04o}); chmod 600 it")
        return file.read()


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
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # swept in the moment before it was locked
