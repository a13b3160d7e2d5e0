"""Waits for something that another thread or process does. The limit is generous: it asserts no duration."""

import time
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


def eventually(
    condition: Callable[[], _Result], description: str = "the condition", *, timeout: float = 120
) -> _Result:
    """Return the first result of `condition()` that is true.

    Args:
        condition: Called again and again, every 50 ms. What it raises is raised.
        description: What is waited for; it is in the error.
        timeout: Seconds, as a safety net only: long enough for a busy machine.

    Raises:
        AssertionError: The condition was false for `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        if result := condition():
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {description}; last result: {result!r}")
        time.sleep(0.05)
