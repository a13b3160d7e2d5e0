"""The right to write a bundle task: the lease of its host, and the number of its run.

An agent that starts takes a new lease on its host. An operator who has another host adopt its tasks takes the lease
away. Each run of a task has a number (`bundle_task.attempts`), which the next run raises. Every transaction of an agent
on a task has lease and run in its condition: a process that has lost one of them changes nothing. Without its lease the
process ends at once, as if killed. A run that was replaced ends by itself.

How long this process may act for its host, as measured on this machine.

A host's agent sends a heartbeat to the database every few seconds. Once the database has accepted none for
`heartbeat_timeout` seconds, another host may adopt the tasks. A process that is cut off from the database does not see
that, so it measures by itself: before each attempt of a call to the store or the hypervisor it checks that the attempt
ends before the lease can. This needs no database.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Never

import sqlalchemy as sa
import structlog

from thrave.database import bundle_task, host, task_in_progress

LOST = 75  # the exit status (cli/exit_codes.py), after which no service manager starts the agent again


# True of a task whose host has no agent any more, and will have none: it was retired, or another has adopted its tasks.
hostless = ~sa.exists().where(host.c.host == bundle_task.c.host, host.c.state != sa.literal_column("'fenced'"))


log = structlog.get_logger()


class RightLostError(Exception):
    """The task belongs to another run, or to another host. Nothing was changed, and nothing may be done for it."""

    def __init__(self, bundle_id: str) -> None:
        super().__init__(f"{bundle_id} belongs to another run or host now")
        self.bundle_id = bundle_id


@dataclass(frozen=True)
class Fence:
    """An agent's right to work on the tasks of its host; of one run of a task, once that has begun."""

    host: str
    lease: str
    run: tuple[str, int] | None = None
    """A task and the number of its run, which no later run may have replaced; None: no task is run."""

    def of_run(self, bundle_id: str, run: int) -> "Fence":
        """Return the right of one run of a task."""
        return replace(self, run=(bundle_id, run))

    def permits(self, bundle_id: str) -> sa.ColumnElement[bool]:
        """True of the task's row if this process may write it: it is of this host, or has ended on a lost one."""
        lease = sa.exists().where(host.c.host == self.host, host.c.lease == self.lease)
        of_host = sa.or_(bundle_task.c.host == self.host, sa.and_(sa.not_(task_in_progress), hostless))
        run = bundle_task.c.attempts == self.run[1] if self.run and self.run[0] == bundle_id else sa.true()
        return sa.and_(bundle_task.c.bundle_id == bundle_id, of_host, run, lease)

    def claim(self, connection: sa.Connection, bundle_id: str) -> None:
        """Lock a task's row until the connection's transaction ends. Raises as `refused`."""
        permits = self.permits(bundle_id)
        if connection.dialect.name == "postgresql":
            rows = sa.select(bundle_task.c.bundle_id).where(permits).with_for_update(of=bundle_task)
            is_mine = connection.execute(rows).first() is not None
        else:  # SQLite has no locks of rows: a write without effect locks the database
            unchanged = bundle_task.update().where(permits).values(attempts=bundle_task.c.attempts)
            is_mine = connection.execute(unchanged).rowcount == 1
        if not is_mine:
            self.refused(connection, bundle_id)

    def claim_host(self, connection: sa.Connection) -> None:
        """Lock the host's row until the connection's transaction ends; the task's, of a run. Raises as `refused`."""
        if self.run is not None:
            self.claim(connection, self.run[0])
            return
        mine = host.update().where(self.holds).values(lease=self.lease)
        if connection.execute(mine).rowcount != 1:
            self.end()

    def refused(self, connection: sa.Connection, bundle_id: str) -> Never:
        """End the process if the lease is lost. Raises RightLostError if only the task is another's."""
        if connection.execute(sa.select(host.c.host).where(self.holds)).first() is None:
            self.end()
        raise RightLostError(bundle_id)

    @property
    def holds(self) -> sa.ColumnElement[bool]:
        """True of this agent's host, for as long as it has the lease."""
        return sa.and_(host.c.host == self.host, host.c.lease == self.lease)

    def end(self) -> Never:
        """End the process: another agent has the host."""
        log.error("another agent has this host now", host=self.host)
        os._exit(LOST)


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
