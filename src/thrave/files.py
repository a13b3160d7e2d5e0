"""Files that are whole or not there: created once, or replaced, and on the disk when the call returns.

What every room that keeps its state in files needs (the vault's key, the service's identity, buckets on a
disk). A reader never sees half a file, a crash never leaves one under its real name, and a new file is for
its owner's eyes alone (mode 0600). It never decides what stands in a file, and never makes the folder that
the file goes to.
"""

import os
import stat
import tempfile
from pathlib import Path


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
    written = _write_spool(path.parent, data)
    try:
        os.link(written, path)
    except FileExistsError:
        return False
    finally:
        written.unlink()
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
    written = _write_spool(spool, data)
    try:
        written.replace(path)
    except OSError:
        written.unlink()
        raise
    sync_folder(path.parent)


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


def _write_spool(folder: Path, data: bytes | memoryview) -> Path:
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        Path(name).unlink()
        raise
    return Path(name)
