"""The last result of each background probe, and the two health checks that answer from these results.

So a request can be refused without a check of its own, and a client without credentials causes no work. The cache is
passive: the process that builds it also runs the probes (`server.py`). It knows no probe.
"""

import json
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from thrave.concurrency import monotonic, new_event, new_lock

DATABASE, STORE, HYPERVISOR = "database", "store", "hypervisor"
"""Names of the probes."""

MAX_READY_AGE = 60.0
"""Seconds for which a result counts for `/readyz`: longer than the time between two good results."""

HEALTH_PATHS = frozenset({"/healthz", "/readyz"})
"""Paths of the health checks. No path of the EC2 API."""


class ProbeResult(NamedTuple):
    """The result of one run of a probe."""

    error: str | None
    """Why the component cannot be used, as a message for clients; None: it can."""
    time: float
    """When the run ended, in seconds of the cache's clock."""


class ComponentHealth(NamedTuple):
    """Whether a component can be used, by the last result of its probe."""

    state: Literal["ok", "failed", "unknown"]
    """`unknown`: there is no result, or it is older than `MAX_READY_AGE`."""
    error: str | None
    """Why it is not `ok`."""


class HealthResponse(NamedTuple):
    """The response to a health check."""

    status: int
    """Of HTTP: 200, or 503 if the process is not ready."""
    body: bytes
    """A JSON object."""


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

    def components(self) -> dict[str, ComponentHealth]:
        """Return the last known health of each component. Never waits."""
        with self._lock:
            results = {probe: self._results.get(probe) for probe in self._max_ages}
        now = self._clock()
        return {probe: _component_health(result, now) for probe, result in results.items()}

    def respond(self, path: str, *, with_errors: bool) -> HealthResponse:
        """Answer a health check.

        Args:
            path: One of `HEALTH_PATHS`. `/healthz`: the process responds. `/readyz`: every component can be used.
            with_errors: Whether the response has the error of each component. Errors name servers and folders, so
                they are for operators only.
        """
        if path == "/healthz":
            return HealthResponse(200, b'{"status": "ok"}\n')
        components = self.components()
        is_ready = all(health.state == "ok" for health in components.values())
        document = {
            "status": "ready" if is_ready else "not ready",
            "components": {
                name: {"state": health.state, **({"error": health.error} if health.error and with_errors else {})}
                for name, health in components.items()
            },
        }
        return HealthResponse(200 if is_ready else 503, f"{json.dumps(document)}\n".encode())


def _component_health(result: ProbeResult | None, now: float) -> ComponentHealth:
    if result is None:
        return ComponentHealth("unknown", "not checked yet")
    if now - result.time > MAX_READY_AGE:
        return ComponentHealth("unknown", f"not checked for {now - result.time:.0f} s")
    return ComponentHealth("ok" if result.error is None else "failed", result.error)
