"""Checks that are made within one attempt of a call to a store: whether the caller may still write.

The code that retries a call (`retrying.py`) knows the check. The code that sends bytes (`transport.py`) makes it again
before each request and before each piece of a body, since an attempt over a slow line may take long. The check is that
of the current thread, so drivers need not pass it on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Check = Callable[[], None]
"""Raises an error that is no TransientError if nothing more may be sent."""


def _pass() -> None:
    """Allow everything."""


no_check: Check = _pass
"""The check of a process whose right to write cannot be lost."""

_current: ContextVar[Check] = ContextVar("check_of_the_attempt", default=no_check)


@contextmanager
def attempt(check: Check) -> Iterator[None]:
    """Begin an attempt: make the check now, and have `check_attempt` make it until the block ends."""
    check()
    token = _current.set(check)
    try:
        yield
    finally:
        _current.reset(token)


def check_attempt() -> None:
    """Make the check of the attempt that this thread is in. Raises what the check raises."""
    _current.get()()
