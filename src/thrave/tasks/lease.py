"""The right to write a bundle task. `HostLease` checks it in the database, `LeaseTimer` by a clock of this machine.

An agent acquires a new lease of its host when it starts; adoption replaces the lease. Each run of a task has a number
(`bundle_task.runs`), which the next run increments. Every transaction on a task has both in its condition.

Another host may adopt the tasks after `heartbeat_timeout` seconds without a heartbeat. A process without a connection
to the database cannot read that. So each attempt of a call to the store or the hypervisor must end before the lease.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Never

import sqlalchemy as sa
import structlog

from thrave.concurrency import boot_time
from thrave.database import bundle_task, host, task_in_progress

EXIT_LEASE_LOST = 75  # exit code (cli/exit_codes.py) after which no service manager starts the agent again

# A task whose host will never have an agent again: the host was retired, or another host has adopted its tasks.
hostless = ~sa.exists().where(host.c.host == bundle_task.c.host, host.c.state != sa.literal_column("'fenced'"))


log = structlog.get_logger()


class RightLostError(Exception):
    """The task belongs to another run or host. Nothing was changed, and this process must do nothing for the task."""

    def __init__(self, bundle_id: str) -> None:
        super().__init__(f"{bundle_id} belongs to another run or host now")
        self.bundle_id = bundle_id


@dataclass(frozen=True)
class HostLease:
    """An agent's right to write the tasks of its host, or one run's right to write its task.

    A process that has lost the lease ends at once, as if killed. A run that was replaced ends with RightLostError.
    """

    host: str
    token: str
    """Random; the host's row has the token of the agent that started last."""
    run: tuple[str, int] | None = None
    """A task and the number of its run; None: the right of the agent, outside a run."""

    def for_run(self, bundle_id: str, run: int) -> "HostLease":
        """Return the right of one run of a task."""
        return replace(self, run=(bundle_id, run))

    @property
    def is_held(self) -> sa.ColumnElement[bool]:
        """A condition on the host's row: this agent has the lease of its host."""
        return sa.and_(host.c.host == self.host, host.c.lease == self.token)

    def allows(self, bundle_id: str) -> sa.ColumnElement[bool]:
        """Return a condition on the task's row: this process may write it.

        The task belongs to this host, or has ended on a host that is lost.
        """
        of_host = sa.or_(bundle_task.c.host == self.host, sa.and_(sa.not_(task_in_progress), hostless))
        run = bundle_task.c.runs == self.run[1] if self.run and self.run[0] == bundle_id else sa.true()
        return sa.and_(bundle_task.c.bundle_id == bundle_id, of_host, run, sa.exists().where(self.is_held))

    def lock_task(self, connection: sa.Connection, bundle_id: str) -> None:
        """Lock a task's row until the transaction ends. Raises as `raise_lost` if this process may not write it."""
        allowed = self.allows(bundle_id)
        if connection.dialect.name == "postgresql":
            rows = sa.select(bundle_task.c.bundle_id).where(allowed).with_for_update(of=bundle_task)
            is_mine = connection.execute(rows).first() is not None
        else:  # SQLite has no row locks: an update without effect locks the database
            unchanged = bundle_task.update().where(allowed).values(runs=bundle_task.c.runs)
            is_mine = connection.execute(unchanged).rowcount == 1
        if not is_mine:
            self.raise_lost(connection, bundle_id)

    def lock_host(self, connection: sa.Connection) -> None:
        """Lock the host's row, or the task's row in a run, until the transaction ends. Raises as `lock_task`."""
        if self.run is not None:
            self.lock_task(connection, self.run[0])
            return
        unchanged = host.update().where(self.is_held).values(lease=self.token)
        if connection.execute(unchanged).rowcount != 1:
            self.exit_process()

    def raise_lost(self, connection: sa.Connection, bundle_id: str) -> Never:
        """End the process if the lease is lost; otherwise raise RightLostError, since another run has the task."""
        if connection.execute(sa.select(host.c.host).where(self.is_held)).first() is None:
            self.exit_process()
        raise RightLostError(bundle_id)

    def exit_process(self) -> Never:
        """End the process, because another agent has the lease."""
        log.error("lease lost to another agent, process ends", host=self.host)
        os._exit(EXIT_LEASE_LOST)


LEASE_MARGIN = 0.1
"""Fraction of the lease that is not used, since the clocks of two machines run at slightly different speeds."""


class LeaseExpiredError(Exception):
    """Another host may have adopted this host's tasks. Ends when the database accepts a heartbeat."""

    def __init__(self) -> None:
        super().__init__("the database has accepted no heartbeat for too long: another host may have the tasks")


class LeaseTimer:
    """The remaining time for which this process may act for its host, since the last accepted heartbeat.

    Args:
        seconds: Validity of a heartbeat (`heartbeat_timeout`); None: no limit, since no other process can take over
            (one machine with SQLite, where the data directory is locked).
        clock: Seconds of a monotonic clock that also counts while the machine is suspended.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = boot_time) -> None:
        self._usable = float("inf") if seconds is None else seconds * (1 - LEASE_MARGIN)
        self._clock = clock
        self._renewed = clock()

    def now(self) -> float:
        """Return the time to pass to `renew`. Call this before the heartbeat is sent."""
        return self._clock()

    def renew(self, sent: float) -> None:
        """Record that the database has accepted a heartbeat sent at this time. Thread-safe."""
        self._renewed = max(self._renewed, sent)

    def is_valid(self, seconds: float = 0.0) -> bool:
        """Whether no other host can have the tasks within the next `seconds`."""
        return self._clock() + seconds < self._renewed + self._usable

    def check(self, seconds: float = 0.0) -> None:
        """Check before an attempt that takes at most `seconds`. Raises LeaseExpiredError."""
        if not self.is_valid(seconds):
            raise LeaseExpiredError
