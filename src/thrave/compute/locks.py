"""Locks between processes that end with their holder, however it ends: flock(2) on a file of its own.

Two opens of the file exclude each other also within one process, so they work between threads too. Lock files hold
nothing and are never removed: removing one while another process waits for it would let two in.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_TIMEOUT = 30.0  # seconds
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1  # seconds between two attempts


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
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
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            return
