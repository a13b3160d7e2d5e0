"""A clock for the task monitor that a test controls: a busy machine then causes no stall."""

import time

from support.eventually import eventually


class StallClock:
    """A clock that stops until a test advances it or lets it run. Replaces `monotonic` in `thrave.tasks.monitor`."""

    def __init__(self):
        self._now = 0.0
        self._running_since = None
        self._readings = 0

    def monotonic(self):
        self._readings += 1
        return self._now if self._running_since is None else self._now + time.monotonic() - self._running_since

    def advance(self, seconds):
        """Advance by at most 2 seconds, the most that the monitor counts at once; wait until it has read the time."""
        self._now += seconds
        before = self._readings
        # The monitor has used a reading when it reads again.
        eventually(lambda: self._readings >= before + 2, "the monitor reads the clock")

    def run(self):
        """Let real time pass from now on."""
        self._running_since = time.monotonic()
