"""Ends a long operation of a hypervisor, such as a merge, only if the operation makes no progress.

Time in which this process did not run, because it was stopped or its machine was paused, is not counted.
"""

from collections.abc import Callable

from thrave.compute.errors import HypervisorError
from thrave.concurrency import monotonic

Pause = Callable[[float], object]
"""Waits the given number of seconds. An error that it raises ends the operation that called it."""

_MAX_COUNTED_INTERVAL = 2.0  # seconds between two pauses; of a longer interval the process was stopped for the rest


class RunningTime:
    """Measures how long this process ran. A process may be stopped, or its machine paused, for hours.

    Args:
        max_interval: Longest time between two calls of `passed`, in seconds. Of a longer time only this much counts.
        clock: Seconds of a monotonic clock.
    """

    def __init__(self, max_interval: float, clock: Callable[[], float] = monotonic) -> None:
        self._max_interval = max_interval
        self._clock = clock
        self._last_call = clock()

    def passed(self) -> float:
        """Return the seconds since the last call, at most `max_interval`."""
        now = self._clock()
        passed, self._last_call = min(now - self._last_call, self._max_interval), now
        return passed


class ProgressPause:
    """A `Pause` with a timeout: it raises an error if no progress was recorded for `timeout` seconds.

    Args:
        instance_id: The instance of the operation.
        pause: Waits.
        timeout: Seconds without progress.
    """

    def __init__(self, instance_id: str, pause: Pause, timeout: float) -> None:
        self._instance_id = instance_id
        self._pause = pause
        self._timeout = timeout
        self._running_time = RunningTime(_MAX_COUNTED_INTERVAL)
        self._seconds_without_progress = 0.0

    def __call__(self, seconds: float) -> None:
        """Wait. Raises HypervisorError after `timeout` seconds without progress, and the errors of `pause`."""
        self._pause(seconds)
        self._seconds_without_progress += max(seconds, self._running_time.passed())
        if self._seconds_without_progress >= self._timeout:
            raise HypervisorError(self._instance_id, f"no progress for {self._timeout:g} seconds")

    def record_progress(self) -> None:
        """Restart the timeout: the operation has made progress now."""
        self._seconds_without_progress = 0.0


def report_progress(pause: Pause) -> None:
    """Record that the operation has made progress. A pause without a timeout, such as a test's, ignores that."""
    if isinstance(pause, ProgressPause):
        pause.record_progress()
