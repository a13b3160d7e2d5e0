"""Waits for what another thread or process does. The limit is generous: no test asserts a duration with it."""

import time
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


def eventually(
    condition: Callable[[], _Result],
    description: str = "the condition",
    *,
    until: Callable[[_Result], object] = bool,
    ignore: type[Exception] | tuple[type[Exception], ...] = (),
    details: Callable[[], object] | None = None,
    timeout: float = 120,
    interval: float = 0.02,
) -> _Result:
    """Call `condition()` until its result is accepted, and return that result.

    Args:
        condition: Must be safe to repeat. An assertion in it ends the wait, for example when a process has died.
        description: What is waited for; it stands in the error.
        until: Whether a result is accepted; by default, whether it is true. See also `one_of`.
        ignore: Exceptions of `condition` that mean "not yet"; all others are raised at once.
        details: Called when the time is up, for what else belongs into the error: a log, for example.
        timeout: Seconds; a safety net, long enough for a busy machine and shorter than the limit of a test (300 s).
        interval: Seconds between two calls.

    Raises:
        AssertionError: No result was accepted within `timeout` seconds. The message has the last result or exception.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            result = condition()
        except ignore as error:
            last = f"last exception: {error!r}"
        else:
            if until(result):
                return result
            last = f"last result: {result!r}"
        if time.monotonic() > deadline:
            more = "" if details is None else f"\n{details()}"
            raise AssertionError(f"not within {timeout:g} s: {description}; {last}{more}")
        time.sleep(interval)


def one_of(*values: object) -> Callable[[object], bool]:
    """For `until`: accepts a result that is equal to one of the values."""
    return lambda result: result in values
