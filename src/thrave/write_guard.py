"""Checks, right before a write, that this process may still write. Another host may have taken over in the meantime.

The code that decides to write sets the check for a block (`using`). The code that sends the bytes or gives the command
makes the check (`check`) after each wait. The check is stored in a context variable, so drivers need not pass it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

WriteCheck: TypeAlias = Callable[[], None]
"""Raises an error that is never retried if this process may not write any more."""


def _allow() -> None:
    """Allow everything."""


no_check: WriteCheck = _allow
"""The check of a process that cannot lose its right to write."""


class WriteGuard:
    """The check of the current thread for one kind of write."""

    def __init__(self, name: str) -> None:
        self._current: ContextVar[WriteCheck] = ContextVar(name, default=no_check)

    @contextmanager
    def using(self, check: WriteCheck) -> Iterator[None]:
        """Call `check` now. Until the block ends, every `WriteGuard.check()` in this thread calls it again."""
        check()
        token = self._current.set(check)
        try:
            yield
        finally:
            self._current.reset(token)

    def check(self) -> None:
        """Call the check of the current block of this thread. Raises the errors of that check."""
        self._current.get()()


store_guard = WriteGuard("store_guard")
"""Checked before each attempt of a call to the object store (`buckets/retrying_store.py`), and before each request and
each piece of a body (`buckets/s3_client.py`): an attempt over a slow connection may take long."""
command_guard = WriteGuard("command_guard")
"""Checked right before the hypervisor gets a command that starts or stops an instance, or changes its disk. The driver
may first wait a minute or more: for a hypervisor that hangs, or for a guest that is just powering off. A second machine
on the same disk would destroy it."""
