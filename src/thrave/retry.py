"""When to try again what has failed: soon at first, then at longer and longer intervals.

It is kept in memory only: after a restart everything is tried at once again, since what was wrong may be mended.
"""

import time
from collections.abc import Callable, Collection


class RetrySchedule:
    """The next attempts at several things, each known by a name."""

    def __init__(self, first: float, longest: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Try again `first` seconds after the first failure, then after twice as many, at last every `longest`."""
        self._first = first
        self._longest = longest
        self._clock = clock
        self._waiting: dict[str, tuple[float, float]] = {}

    def is_due(self, name: str) -> bool:
        """Whether it may be tried now: it has not failed, or long enough ago."""
        return self._clock() >= self._waiting.get(name, (0.0, 0.0))[1]

    def failed(self, name: str) -> None:
        """Take note that it has failed."""
        interval = min(2 * self._waiting.get(name, (self._first / 2, 0.0))[0], self._longest)
        self._waiting[name] = interval, self._clock() + interval

    def keep(self, names: Collection[str]) -> None:
        """Forget everything else: it is no longer to be done."""
        self._waiting = {name: waits for name, waits in self._waiting.items() if name in names}

    def over(self, name: str) -> None:
        """Forget it: it was done, or is wanted no longer."""
        self._waiting.pop(name, None)
