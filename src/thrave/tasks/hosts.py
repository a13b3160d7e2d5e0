"""The hosts of a fleet, as the database knows them: who works on which, and who takes over from whom.

    HostError
    ├── NoSuchHost          no host of that name has ever had an agent
    └── HostInUse           it gives signs of life, so nobody may take its tasks

A host's agent takes its lease when it starts, and gives a sign of life every few seconds. An operator drains a host,
has another one adopt the tasks of one that is lost, or retires it for good. Taking a lease away is enough to stop an
agent, alive or coming back: see `fence.py`. Nothing here talks to an agent.
"""

import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from importlib.metadata import version
from typing import NamedTuple

import sqlalchemy as sa
import structlog

from thrave.database import bundle_task, host, instance, power_request, task_in_progress, utc_now
from thrave.tasks.engine import Queues
from thrave.tasks.failures import TaskFailure
from thrave.tasks.fence import Fence
from thrave.tasks.records import Records

log = structlog.get_logger()

_NOBODY = ""  # the lease of a host that no agent has


class HostError(Exception):
    """Something that cannot be done with a host."""


class NoSuchHost(HostError):  # noqa: N818 (says what there is not)
    """There is no host of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no host {name}")


class HostInUse(HostError):  # noqa: N818 (says what it is)
    """The host's agent has just given a sign of life."""


class HostState(StrEnum):
    """What a host is there for."""

    ACTIVE = "active"
    """It takes tasks."""
    DRAINING = "draining"
    """It finishes what it has begun, and takes no more."""
    DRAINED = "drained"
    """Its agent has ended, as it was asked to. What it had not begun waits for it."""
    FENCED = "fenced"
    """Another host has adopted its tasks, and its agent may do nothing more until it is started anew."""


_WITH_AN_AGENT = frozenset({HostState.ACTIVE, HostState.DRAINING})


class FleetHost(NamedTuple):
    """A host, as an operator sees it."""

    host: str
    state: HostState
    version: str
    tasks_at_once: int
    start_time: datetime
    """When its agent started; aware, in UTC."""
    heartbeat_time: datetime
    """Its last sign of life; aware, in UTC."""
    instances: int
    """How many its agent has reported."""
    waiting: int
    """Tasks that it has not begun."""
    working: int
    """Tasks that it has begun."""

    def is_lost(self, now: datetime, lost_after: timedelta) -> bool:
        """Whether it should give signs of life, and has given none for `lost_after`."""
        return self.state in _WITH_AN_AGENT and now - self.heartbeat_time >= lost_after


class Hosts:
    """The hosts in the database."""

    def __init__(self, engine: sa.Engine, records: Records, queues: Queues, *, lost_after: timedelta) -> None:
        """Let a host be adopted that has given no sign of life for `lost_after`."""
        self._engine = engine
        self._records = records
        self._queues = queues
        self._lost_after = lost_after

    def take(self, name: str, *, tasks_at_once: int) -> Fence:
        """Make this process the host's agent; an earlier one ends as soon as it notices."""
        lease = secrets.token_hex(16)
        now = utc_now()
        row = {
            "state": HostState.ACTIVE, "lease": lease, "version": version("thrave"), "tasks_at_once": tasks_at_once,
            "start_time": now, "heartbeat_time": now,
        }  # fmt: skip
        with self._engine.begin() as connection:
            if not _change(connection, name, **row):
                connection.execute(host.insert(), {"host": name, **row})
        return Fence(name, lease)

    def heartbeat(self, fence: Fence) -> HostState:
        """Give a sign of life, and hear what the host is there for. Ends the process if it is another agent's now."""
        with self._engine.begin() as connection:
            connection.execute(host.update().where(fence.holds).values(heartbeat_time=utc_now()))
            state = connection.execute(sa.select(host.c.state).where(fence.holds)).scalar()
        return HostState(state) if state else fence.end()

    def enqueue_lost(self, name: str) -> None:
        """Have every unfinished task of a host run: give one that no workflow will run another one.

        The tasks are looked up first. One that ends meanwhile may get a workflow, which does nothing.
        """
        self._queues.drop_strangers(name)
        with self._engine.begin() as connection:
            unfinished = _unfinished(connection, name)
        awaited = self._queues.awaited(name)
        with self._engine.begin() as connection:
            for bundle_id in unfinished:
                if bundle_id not in awaited:
                    log.warning("a task that the engine has lost is run anew", bundle_id=bundle_id)
                    self._queues.enqueue_again(connection, bundle_id, name)

    def drained(self, fence: Fence) -> None:
        """Write down that the host's agent ends as it was asked to."""
        with self._engine.begin() as connection:
            connection.execute(host.update().where(fence.holds).values(state=HostState.DRAINED))

    def list(self) -> Sequence[FleetHost]:
        """Every host, by name."""
        tasks = sa.select(sa.func.count()).where(bundle_task.c.host == host.c.host, task_in_progress)
        begun = bundle_task.c.attempts > 0
        reported = sa.select(sa.func.count()).where(instance.c.host == host.c.host)
        query = sa.select(
            host.c.host, host.c.state, host.c.version, host.c.tasks_at_once, host.c.start_time, host.c.heartbeat_time,
            reported.scalar_subquery().label("instances"),
            tasks.where(~begun).scalar_subquery().label("waiting"),
            tasks.where(begun).scalar_subquery().label("working"),
        ).order_by(host.c.host)  # fmt: skip
        with self._engine.connect() as connection:
            found = [FleetHost(*row) for row in connection.execute(query)]
        return [one._replace(state=HostState(one.state)) for one in found]

    def drain(self, name: str) -> None:
        """Have a host finish what it has begun and take no more. Raises NoSuchHost."""
        with self._engine.begin() as connection:
            _require(connection, name)
            _change(connection, name, state=HostState.DRAINING)

    def adopt(self, lost: str, *, by: str, powered_off: bool = False) -> Sequence[str]:
        """Have another host, which reaches the same storage, go on with the tasks of one that is lost.

        From then on the lost host's agent can write nothing; if it still lives, it ends as soon as it tries.

        Args:
            lost: The host that is lost.
            by: The host that takes its instances and unfinished tasks.
            powered_off: The operator knows that the lost host is off, however short a time ago it gave a sign of life.

        Returns:
            The ids of the tasks that were adopted.

        Raises:
            NoSuchHost: There is none of one of the names.
            HostInUse: The lost host has given a sign of life.
        """
        with self._engine.begin() as connection:
            _require(connection, by)
            self._fence_off(connection, lost, powered_off=powered_off)
            tasks = _unfinished(connection, lost)
            for table in (instance, power_request):
                connection.execute(table.update().where(table.c.host == lost).values(host=by))
            concerned = (
                bundle_task.c.host == lost,
                sa.or_(
                    task_in_progress, bundle_task.c.look_after_until.is_not(None), bundle_task.c.frozen.is_not(None)
                ),
            )
            connection.execute(bundle_task.update().where(*concerned).values(host=by))
            for bundle_id in tasks:
                self._queues.enqueue_again(connection, bundle_id, by)
        for bundle_id in tasks:
            self._records.tell(bundle_id, f"Host {by} goes on in the place of {lost}.")
        return tasks

    def retire(self, name: str, *, powered_off: bool = False) -> Sequence[str]:
        """Give a host up, its instances with it; its unfinished tasks fail with `Server.HostLost`.

        Args:
            name: The host.
            powered_off: As for `adopt`.

        Returns:
            The ids of the tasks that failed.

        Raises:
            NoSuchHost: There is none of that name.
            HostInUse: It has given a sign of life.
        """
        with self._engine.begin() as connection:
            self._fence_off(connection, name, powered_off=powered_off)
            tasks = _unfinished(connection, name)
        reason = TaskFailure("Server.HostLost", f"The host {name}, which had the instance's disk, was retired.")
        for bundle_id in tasks:
            self._records.fail(bundle_id, reason)
        with self._engine.begin() as connection:
            connection.execute(host.delete().where(host.c.host == name))
        return tasks

    def _fence_off(self, connection: sa.Connection, name: str, *, powered_off: bool) -> None:
        state, heartbeat = _require(connection, name)
        silent = utc_now() - heartbeat
        if state in _WITH_AN_AGENT and silent < self._lost_after and not powered_off:
            seconds = silent.total_seconds()
            raise HostInUse(f"Host {name} gave a sign of life {seconds:.0f} s ago; drain it, or see that it is off")
        _change(connection, name, state=HostState.FENCED, lease=_NOBODY)


def _require(connection: sa.Connection, name: str) -> tuple[HostState, datetime]:
    """The host's state and last sign of life; nobody else changes the host until the transaction ends."""
    query = sa.select(host.c.state, host.c.heartbeat_time).where(host.c.host == name).with_for_update()
    found = connection.execute(query).first()
    if found is None:
        raise NoSuchHost(name)
    return HostState(found.state), found.heartbeat_time


def _change(connection: sa.Connection, name: str, **values: object) -> bool:
    return connection.execute(host.update().where(host.c.host == name).values(**values)).rowcount == 1


def _unfinished(connection: sa.Connection, name: str) -> list[str]:
    query = sa.select(bundle_task.c.bundle_id).where(bundle_task.c.host == name, task_in_progress)
    return [*connection.execute(query.order_by(bundle_task.c.start_time)).scalars()]
