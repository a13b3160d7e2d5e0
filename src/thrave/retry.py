"""Retries of calls that may succeed later, and waits for a condition. Independent of hypervisor, store and database.

`retry` repeats one call in the calling thread. `RetrySchedule` returns which items of a background job are due. The
callers decide which errors are transient (`tasks/errors.py`, `buckets/errors.py`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import repeat
from typing import NamedTuple, TypeAlias, TypeVar

from thrave.concurrency import monotonic, random_below, sleep

T = TypeVar("T")
Retryable: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]


class FailedAttempt(NamedTuple):
    """An attempt that ended with a transient error."""

    error: Exception
    restarts_timeout: bool
    """Whether the timeout is counted from this failure."""
    elapsed: float
    """Seconds since the failure from which the timeout is counted."""
    wait: float | None
    """Seconds until the next attempt; None if there is no next attempt and the error is raised."""


def _no_minimum(_error: Exception) -> float:
    return 0.0


def _no_progress(_error: Exception, _seconds: float) -> bool:
    return False


def retry(
    operation: Callable[[], T],
    *,
    on: Retryable,
    timeout: float,
    interval: float | Iterable[float] = 1.0,
    is_timeout_strict: bool = False,
    min_wait: Callable[[Exception], float] = _no_minimum,
    is_progress: Callable[[Exception, float], bool] = _no_progress,
    on_failure: Callable[[FailedAttempt], object] | None = None,
    sleep: Callable[[float], object] = sleep,
    clock: Callable[[], float] = monotonic,
) -> T:
    """Call `operation` until it returns, or `timeout` seconds after its first failure.

    Args:
        operation: Must be safe to repeat.
        on: Exception types to retry, or a predicate; other errors are raised at once.
        timeout: Seconds; 0: the operation is called once.
        interval: Seconds between two attempts. An iterable gives one wait after the other and must not end.
        is_timeout_strict: Give up early if the next attempt would begin after the timeout. Otherwise one attempt may
            begin up to one interval after it.
        min_wait: Seconds that the server requests before the next attempt; cut to the end of the timeout.
        is_progress: Called with the error and the seconds that the attempt lasted. Whether the attempt had reached the
            server before it failed; then the timeout is counted from this failure.
        on_failure: Called after each failure in `on`, before the wait. May raise, to give up.
        sleep: Waits; may raise, to give up.
        clock: Seconds of a monotonic clock.

    Raises:
        Exception: The last error of `operation`, or what `on_failure` or `sleep` raises.
    """
    waits = repeat(float(interval)) if isinstance(interval, (int, float)) else iter(interval)
    first_failure: float | None = None
    while True:
        started = clock()
        try:
            return operation()
        except Exception as error:
            if not (isinstance(error, on) if isinstance(on, (type, tuple)) else on(error)):
                raise
            now = clock()
            restarts_timeout = first_failure is None or is_progress(error, now - started)
            if first_failure is None or restarts_timeout:
                first_failure = now
            elapsed = now - first_failure
            wait = next(waits)
            is_last = elapsed + wait > timeout if is_timeout_strict else elapsed >= timeout
            if not is_last:
                wait = max(wait, min(min_wait(error), timeout - elapsed))
            if on_failure is not None:
                on_failure(FailedAttempt(error, restarts_timeout, elapsed, None if is_last else wait))
            if is_last:
                raise
            sleep(wait)


def backoff(first: float, longest: float) -> Iterator[float]:
    """Yield waits for `retry` that double from `first` to `longest` seconds, each shortened at random by up to half.

    The jitter prevents many clients that met the same failure from retrying at the same moment.
    """
    wait = first
    while True:
        yield wait * (0.5 + random_below(1000) / 2000)
        wait = min(2 * wait, longest)


def poll_until(
    read: Callable[[], T],
    is_done: Callable[[T], bool] = bool,
    *,
    timeout: float,
    interval: float,
    sleep: Callable[[float], object] = sleep,
) -> T:
    """Call `read` until `is_done` accepts its value, or for `timeout` seconds; return the last value.

    `read` is called at least once. Its errors are raised.
    """
    deadline = monotonic() + timeout
    while not is_done(value := read()) and monotonic() <= deadline:
        sleep(interval)
    return value


class RetrySchedule:
    """When to try each of several items again: after the first failure soon, then at doubling intervals.

    Kept in memory only. After a restart every item is due, since its cause may be repaired.
    """

    def __init__(self, first: float, longest: float, clock: Callable[[], float] = monotonic) -> None:
        """Wait `first` seconds after the first failure of an item, and at most `longest` seconds after a later one."""
        self._first = first
        self._longest = longest
        self._clock = clock
        self._waits: dict[str, tuple[float, float]] = {}  # last interval, time of the next attempt

    def is_due(self, name: str) -> bool:
        """Whether the item may be tried now."""
        return self._clock() >= self._waits.get(name, (0.0, 0.0))[1]

    def record_failure(self, name: str) -> None:
        """Record that the item failed just now."""
        interval = min(2 * self._waits.get(name, (self._first / 2, 0.0))[0], self._longest)
        self._waits[name] = interval, self._clock() + interval

    def keep(self, names: Collection[str]) -> None:
        """Forget all other items."""
        self._waits = {name: wait for name, wait in self._waits.items() if name in names}

    def forget(self, name: str) -> None:
        """Forget an item that has succeeded or is no longer wanted."""
        self._waits.pop(name, None)
