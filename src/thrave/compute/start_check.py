"""The check that is made right before a machine is started: whether the caller may still do so.

A start may first wait for a machine that is just going down, for a minute or more. Meanwhile another host may have
taken the instance over and started it, and a second machine would write to the same disk. So the drivers make the check
once more after the wait. It is that of the current thread, and of the thread that asks the hypervisor for it, so that
it need not be passed on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


def _pass() -> None:
    """Allow everything."""


_current: ContextVar[Callable[[], None]] = ContextVar("check_of_the_start", default=_pass)


@contextmanager
def start_allowed_by(check: Callable[[], None]) -> Iterator[None]:
    """Make the check now, and have the drivers make it right before they start a machine within the block.

    Args:
        check: Raises if this process may not start the machine.
    """
    check()
    token = _current.set(check)
    try:
        yield
    finally:
        _current.reset(token)


def check_start() -> None:
    """Make the check of whoever is starting a machine in this thread. Raises what the check raises."""
    _current.get()()
