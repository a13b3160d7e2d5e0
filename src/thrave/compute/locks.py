"""Locks between processes that end with their holder, however it ends: flock(2) on a file of its own.

Two opens of the file exclude each other also within one process, so they work between threads too. Lock files hold
nothing and are never removed: removing one while another process waits for it would let two in.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock for the length of the block.

    Args:
        path: The lock's file; it is made when it is not there, its folder too.
        wait: Wait until it is free, or give up at once.

    Raises:
        BlockingIOError: Somebody else has it, and `wait` is false.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
