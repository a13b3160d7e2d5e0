"""How long this process may act for its host, as measured on this machine.

A host's agent sends a heartbeat to the database every few seconds. Once the database has accepted none for
`heartbeat_timeout` seconds, another host may adopt the tasks. A process that is cut off from the database does not see
that, so it measures by itself: before each attempt of a call to the store or the hypervisor it checks that the attempt
ends before the lease can. This needs no database.
"""

import time
from collections.abc import Callable

MARGIN = 0.1
"""Part of the lease that is not used: clocks of two machines do not run at exactly the same speed."""


# Linux's CLOCK_MONOTONIC stands still while the machine is suspended, and the lease does not.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def _seconds_since_boot() -> float:
    return time.clock_gettime(_CLOCK)


class LeaseExpiredError(Exception):
    """Another host may have adopted this host's tasks. Passes as soon as the database accepts a heartbeat."""

    def __init__(self) -> None:
        super().__init__("no heartbeat was accepted by the database for too long: another host may own the tasks")


class Lease:
    """The lease of this process, from the last heartbeat that the database has accepted.

    Args:
        seconds: How long a heartbeat is good for (`heartbeat_timeout`); None: for ever, since no other process can take
            over (one machine on SQLite, where the data directory is locked).
        clock: Seconds of a monotonic clock that goes on while the machine is suspended.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = _seconds_since_boot) -> None:
        self._usable = float("inf") if seconds is None else seconds * (1 - MARGIN)
        self._clock = clock
        self._renewed = clock()

    def now(self) -> float:
        """Return the time that `renewed` takes; read it before a heartbeat is sent."""
        return self._clock()

    def renewed(self, sent: float) -> None:
        """Record that the database has accepted a heartbeat that was sent then. Any thread may call this."""
        self._renewed = max(self._renewed, sent)

    def holds(self, seconds: float = 0.0) -> bool:
        """Whether nobody else can own the tasks within the next `seconds`."""
        return self._clock() + seconds < self._renewed + self._usable

    def check(self, seconds: float = 0.0) -> None:
        """Check before an attempt that takes at most `seconds`. Raises LeaseExpiredError."""
        if not self.holds(seconds):
            raise LeaseExpiredError
