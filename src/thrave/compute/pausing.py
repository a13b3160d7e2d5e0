"""Waits for work that goes on by itself, for as long as it makes progress."""

import time
from collections.abc import Callable

from thrave.compute.errors import HypervisorError

Pause = Callable[[float], object]
"""Waits some seconds; may raise, to end it all."""

_LONGEST = 2.0  # seconds between two calls that count; the process itself stood still for the rest


class ProgressPause:
    """A pause that raises once nothing has moved for too long.

    Args:
        instance_id: The instance that is worked on.
        pause: Waits.
        timeout: Seconds without progress.
    """

    def __init__(self, instance_id: str, pause: Pause, timeout: float) -> None:
        self._instance_id = instance_id
        self._pause = pause
        self._timeout = timeout
        self._called = time.monotonic()
        self._idle = 0.0

    def __call__(self, seconds: float) -> None:
        """Wait. Raises HypervisorError if nothing has moved for too long, and whatever the pause inside raises."""
        self._pause(seconds)
        now = time.monotonic()
        self._idle += max(seconds, min(now - self._called, _LONGEST))
        self._called = now
        if self._idle >= self._timeout:
            raise HypervisorError(self._instance_id, f"no progress for {self._timeout:g} seconds")

    def moved(self) -> None:
        """Take note of progress."""
        self._idle = 0.0


def report_progress(pause: Pause) -> None:
    """Tell whoever waits by a pause that the work has moved, if that ends what does not move."""
    if isinstance(pause, ProgressPause):
        pause.moved()
