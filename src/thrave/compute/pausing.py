"""Waits for work that goes on by itself, for as long as it makes progress."""

import time
from collections.abc import Callable

from thrave.compute.errors import HypervisorError

Pause = Callable[[float], object]
"""Waits some seconds; may raise, to end it all."""

_LONGEST = 2.0  # seconds between two calls that count


class RunningTime:
    """Measures time in which this process ran: it may be stopped, or its machine paused, for hours.

    Args:
        longest: Seconds between two calls that count; the process itself stood still for the rest.
        clock: Seconds of a monotonic clock.
    """

    def __init__(self, longest: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest = longest
        self._clock = clock
        self._called = clock()

    def passed(self) -> float:
        """Return the seconds since this was last called."""
        now = self._clock()
        passed, self._called = min(now - self._called, self._longest), now
        return passed


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
        self._time = RunningTime(_LONGEST)
        self._idle = 0.0

    def __call__(self, seconds: float) -> None:
        """Wait. Raises HypervisorError if nothing has moved for too long, and whatever the pause inside raises."""
        self._pause(seconds)
        self._idle += max(seconds, self._time.passed())
        if self._idle >= self._timeout:
            raise HypervisorError(self._instance_id, f"no progress for {self._timeout:g} seconds")

    def moved(self) -> None:
        """Take note of progress."""
        self._idle = 0.0


def report_progress(pause: Pause) -> None:
    """Tell whoever waits by a pause that the work has moved, if that ends what does not move."""
    if isinstance(pause, ProgressPause):
        pause.moved()
