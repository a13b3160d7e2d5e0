"""A clock for the task monitor, so that how busy the machine is does not decide whether work has stalled."""

import time

from support.eventually import eventually


class StallClock:
    """Stands still until a test advances it, or lets it run. Replaces the module `time` in `thrave.tasks.monitor`."""

    def __init__(self):
        self._now = 0.0
        self._running_since = None
        self._readings = 0

    def monotonic(self):
        self._readings += 1
        return self._now if self._running_since is None else self._now + time.monotonic() - self._running_since

    def advance(self, seconds):
        """Let at most 2 seconds pass at once (the monitor counts no more), and wait until the monitor has seen it."""
        self._now += seconds
        before = self._readings
        # What the monitor does with a reading is done when it reads again.
        eventually(lambda: self._readings >= before + 2, "the monitor reads the clock")

    def run(self):
        """Let real time pass from now on."""
        self._running_since = time.monotonic()
