"""The last result of each background probe, so that a request can be refused without a check of its own.

The cache is passive: the process that builds it also runs the probes (`server.py`). It knows no probe.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from thrave.concurrency import monotonic, new_event, new_lock

STORE = "store"
"""Name of the probe of the object store."""


class ProbeResult(NamedTuple):
    """The result of one run of a probe."""

    error: str | None
    """Why the component cannot be used, as a message for clients; None: it can."""
    time: float
    """When the run ended, in seconds of the cache's clock."""


class HealthCache:
    """The last result of each probe. Thread-safe.

    Args:
        max_ages: The probes that will record results; for each, seconds for which one result is used. Longer than the
            time between two bad results, or a component that stays broken seems usable in between.
        clock: Monotonic time in seconds.
    """

    def __init__(self, max_ages: Mapping[str, float] | None = None, clock: Callable[[], float] = monotonic) -> None:
        self._max_ages = dict(max_ages or {})
        self._clock = clock
        self._lock = new_lock()
        self._results: dict[str, ProbeResult] = {}
        self._has_result = {probe: new_event() for probe in self._max_ages}

    def record(self, probe: str, error: str | None) -> None:
        """Record that a run of a probe has just ended with this error, or None."""
        with self._lock:
            self._results[probe] = ProbeResult(error, self._clock())
        self._has_result[probe].set()

    def last(self, probe: str) -> ProbeResult | None:
        """Return the last result of a probe, whatever its age; None before the first."""
        with self._lock:
            return self._results.get(probe)

    def error(self, probe: str) -> str | None:
        """Return why a component cannot be used; None if no reason is known.

        Before the first result this waits for it, at most the maximum age. A probe that the cache was not created with
        never has an error.
        """
        max_age = self._max_ages.get(probe)
        if max_age is None:
            return None
        self._has_result[probe].wait(max_age)
        result = self.last(probe)
        # An old result: the probe hangs or has ended. Then the request finds out itself.
        if result is None or self._clock() - result.time > max_age:
            return None
        return result.error
