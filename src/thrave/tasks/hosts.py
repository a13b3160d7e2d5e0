"""The hosts of a fleet, as the database knows them: who works on which, and who takes over from whom.

    HostError
    ├── NoSuchHost          no host of that name has ever had an agent
    ├── HostInUse           it sends heartbeats, so nobody may take its tasks
    ├── HostStateError      the host's state does not allow it (`host_states.py`)
    └── AdopterError        the host that is to adopt cannot

A host's agent takes its lease when it starts, and sends a heartbeat every few seconds. An operator drains a host,
has another one adopt the tasks of one that is lost, or retires it for good. Taking a lease away is enough to stop an
agent, alive or coming back: see `fence.py`. Every time is set and compared by the database's clock. Nothing here talks
to an agent.
"""

import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import Any, NamedTuple

import sqlalchemy as sa
import structlog

from thrave.database import bundle_task, host, instance, now, task_in_progress
from thrave.tasks.engine import RUNNING, TaskQueue
from thrave.tasks.errors import AdopterError, HostInUse, HostStateError, NoSuchHost, TaskFailure
from thrave.tasks.lease import Fence
from thrave.tasks.models import MOVES, WITH_AN_AGENT, HostEvent, HostState
from thrave.tasks.repository import TaskRepository

log = structlog.get_logger()


_NOBODY = ""  # the lease of a host that no agent has


_IDLE_LOOKS = 3  # of `enqueue_lost`; the agent calls it twice when it starts, then every 30 seconds


_ADOPTER_SILENCE = 120.0  # seconds, at least: the agent of the host that adopts may just be being started anew


class HostStatus(NamedTuple):
    """A host, as an operator sees it."""

    host: str
    state: HostState
    version: str
    worker_concurrency: int
    start_time: datetime
    """When its agent started; aware, in UTC."""
    heartbeat_time: datetime
    """Its last heartbeat; aware, in UTC."""
    heartbeat_interval: float
    """Seconds between its heartbeats, by its agent's settings."""
    heartbeat_timeout: float
    """Seconds without a heartbeat after which it counts as lost, by its agent's settings."""
    adopted_by: str | None
    """The host that has adopted its tasks, until an agent is started on it again."""
    now: datetime
    """When this was read, by the database's clock, as all times here."""
    instances: int
    """How many its agent has reported."""
    waiting: int
    """Tasks that it has not begun."""
    working: int
    """Tasks that it has begun."""

    @property
    def silence(self) -> timedelta:
        """The time since its last heartbeat."""
        return self.now - self.heartbeat_time

    @property
    def is_lost(self) -> bool:
        """Whether it should send heartbeats, and has sent none for too long."""
        return self.state in WITH_AN_AGENT and self.silence.total_seconds() >= self.heartbeat_timeout


class HostRegistry:
    """The hosts in the database."""

    def __init__(
        self,
        engine: sa.Engine,
        records: TaskRepository,
        queues: TaskQueue,
        *,
        heartbeat_interval: float,
        heartbeat_timeout: float,
    ) -> None:
        """Hosts that are taken here send heartbeats at this interval, and count as lost after the timeout (seconds)."""
        self._engine = engine
        self._records = records
        self._queues = queues
        self._heartbeat_interval = heartbeat_interval
        self._heartbeat_timeout = heartbeat_timeout
        self._idle: dict[str, int] = {}

    def take(self, name: str, *, worker_concurrency: int) -> Fence:
        """Make this process the host's agent; an earlier one ends as soon as it notices.

        A host that drains goes on draining: see `heartbeat`.
        """
        lease = secrets.token_hex(16)
        row: dict[str, Any] = {
            "lease": lease, "version": version("thrave"), "worker_concurrency": worker_concurrency, "start_time": now(),
            "heartbeat_time": now(), "heartbeat_interval": self._heartbeat_interval,
            "heartbeat_timeout": self._heartbeat_timeout, "adopted_by": None,
        }  # fmt: skip
        with self._engine.begin() as connection:
            if not _move(connection, name, HostEvent.AGENT_STARTS, **row):
                connection.execute(host.insert().values(host=name, state=HostState.ACTIVE, **row))
        return Fence(name, lease)

    def heartbeat(self, fence: Fence) -> HostState:
        """Send a heartbeat, and return the host's state. Ends the process if the host is another agent's now."""
        with self._engine.begin() as connection:
            connection.execute(host.update().where(fence.holds).values(heartbeat_time=now()))
            state = connection.execute(sa.select(host.c.state).where(fence.holds)).scalar()
        return HostState(state) if state else fence.end()

    def enqueue_lost(self, name: str) -> None:
        """Have every unfinished task of a host run: give one that nothing runs another workflow.

        The engine says of a workflow whose thread has ended that it is begun. So what this process runs decides; a
        workflow that is just being started is given the time until `_IDLE_LOOKS` calls of this method have seen it so.
        A second workflow of a task does no harm: see `bundling.bundle`.
        """
        self._queues.cancel_other_versions(name)
        with self._engine.begin() as connection:
            unfinished = _unfinished(connection, name, takes_all=_takes_all(connection, name))
        begun, awaited = self._queues.started(name), self._queues.scheduled(name)
        idle = [each for each in unfinished if each not in awaited and each not in RUNNING]
        self._idle = {each: self._idle.get(each, 0) + 1 for each in idle if each in begun}
        lost = [each for each in idle if self._idle.get(each, _IDLE_LOOKS) >= _IDLE_LOOKS]
        if not lost:
            return
        self._queues.cancel(name, lost)
        with self._engine.begin() as connection:
            for bundle_id in lost:
                log.warning("task enqueued again: nothing runs it", bundle_id=bundle_id)
                self._queues.requeue(connection, bundle_id, name)

    def begun(self, name: str) -> Sequence[str]:
        """The tasks that a host has begun and not finished."""
        with self._engine.connect() as connection:
            return _unfinished(connection, name, takes_all=False)

    def drained(self, fence: Fence) -> bool:
        """Record that the host's agent ends as it was asked to; False if an operator has ended the drain meanwhile."""
        with self._engine.begin() as connection:
            return _move(connection, fence.host, HostEvent.AGENT_HAS_DRAINED, condition=fence.holds)

    def list(self) -> Sequence[HostStatus]:
        """Every host, by name."""
        tasks = sa.select(sa.func.count()).where(bundle_task.c.host == host.c.host, task_in_progress)
        begun = bundle_task.c.attempts > 0
        reported = sa.select(sa.func.count()).where(instance.c.host == host.c.host)
        query = sa.select(
            host.c.host, host.c.state, host.c.version, host.c.worker_concurrency, host.c.start_time,
            host.c.heartbeat_time, host.c.heartbeat_interval, host.c.heartbeat_timeout, host.c.adopted_by,
            now().label("now"),
            reported.scalar_subquery().label("instances"),
            tasks.where(~begun).scalar_subquery().label("waiting"),
            tasks.where(begun).scalar_subquery().label("working"),
        ).order_by(host.c.host)  # fmt: skip
        with self._engine.connect() as connection:
            found = [HostStatus(*row) for row in connection.execute(query)]
        return [one._replace(state=HostState(one.state)) for one in found]

    def drain(self, name: str) -> HostState:
        """Have a host finish what it has begun and take no more.

        Returns:
            The host's state: `drained` if it was so already.

        Raises:
            NoSuchHost: There is none of that name.
            HostStateError: It is fenced.
        """
        return self._change(name, HostEvent.DRAIN)

    def activate(self, name: str) -> HostState:
        """End the drain of a host. Raises as `drain`."""
        return self._change(name, HostEvent.ACTIVATE)

    def _change(self, name: str, event: HostEvent) -> HostState:
        with self._engine.begin() as connection:
            moved = _move(connection, name, event)
            state = _read(connection, name)[name].state
        if not moved:
            raise HostStateError(name, state, event)
        return state

    def adopt(self, lost: str, *, by: str, powered_off: bool = False) -> Sequence[str]:
        """Have another host, which reaches the same storage, go on with the tasks of one that is lost.

        From then on the lost host's agent can write nothing; if it still lives, it ends as soon as it tries.

        Args:
            lost: The host that is lost.
            by: The host that takes its instances and unfinished tasks.
            powered_off: The operator knows that the lost host is off, however short a time ago it sent a heartbeat.

        Returns:
            The ids of the tasks that were adopted.

        Raises:
            NoSuchHost: There is none of one of the names.
            HostInUse: The lost host has sent a heartbeat.
            AdopterError: The other host cannot adopt its tasks.
        """
        with self._engine.begin() as connection:
            hosts = _read(connection, lost, by)
            _check_adopter(hosts[by], hosts[lost])
            _fence_off(connection, hosts[lost], by=by, powered_off=powered_off)
            # Before the tasks are read: whoever records a task or a request locks the instance's row until it is there.
            connection.execute(instance.update().where(instance.c.host == lost).values(host=by))
            tasks = _unfinished(connection, lost)
            concerned = (
                bundle_task.c.host == lost,
                sa.or_(
                    task_in_progress,
                    bundle_task.c.power_recovery_until.is_not(None),
                    bundle_task.c.overlay.is_not(None),
                ),
            )
            connection.execute(bundle_task.update().where(*concerned).values(host=by))
            for bundle_id in tasks:
                self._queues.requeue(connection, bundle_id, by)
        self._queues.cancel(lost, tasks)
        for bundle_id in tasks:
            self._records.add_event(bundle_id, f"Host {by} goes on in the place of {lost}.")
        return tasks

    def retire(self, name: str, *, powered_off: bool = False) -> Sequence[str]:
        """Give a host up, its instances with it; its unfinished tasks fail with `Server.HostLost`.

        A task whose bundle is complete in the bucket already does not fail: it ends as `complete`.

        Args:
            name: The host.
            powered_off: As for `adopt`.

        Returns:
            The ids of the tasks that failed.

        Raises:
            NoSuchHost: There is none of that name.
            HostInUse: It has sent a heartbeat.
        """
        with self._engine.begin() as connection:
            _fence_off(connection, _read(connection, name)[name], by=None, powered_off=powered_off)
            # Before the tasks are read, as above.
            connection.execute(instance.delete().where(instance.c.host == name))
            tasks = _unfinished(connection, name)
            reason = TaskFailure("Server.HostLost", f"The host {name}, which had the instance's disk, was retired.")
            failed = [each for each in tasks if self._records.end_on_lost_host(connection, each, reason)]
            connection.execute(host.delete().where(host.c.host == name))
        self._queues.cancel(name, tasks)
        return failed


class _Row(NamedTuple):
    """What decides about a host."""

    host: str
    state: HostState
    heartbeat_timeout: float
    adopted_by: str | None
    silence: float
    """Seconds since its last heartbeat."""


def _read(connection: sa.Connection, *names: str) -> dict[str, _Row]:
    """The hosts of these names; nobody else changes them until the transaction ends. Raises NoSuchHost."""
    query = sa.select(
        host.c.host,
        host.c.state,
        host.c.heartbeat_timeout,
        host.c.adopted_by,
        host.c.heartbeat_time,
        now().label("now"),
    )
    # In one order everywhere: else two adoptions would wait for each other.
    mine = query.where(host.c.host.in_(names)).order_by(host.c.host).with_for_update()
    found = {
        row.host: _Row(
            row.host, HostState(row.state), row.heartbeat_timeout, row.adopted_by,
            (row.now - row.heartbeat_time).total_seconds(),
        )
        for row in connection.execute(mine)
    }  # fmt: skip
    for name in names:
        if name not in found:
            raise NoSuchHost(name)
    return found


def _check_adopter(by: _Row, lost: _Row) -> None:
    """Raise AdopterError if the tasks of the lost host would have no agent that works on them."""
    if by.host == lost.host:
        raise AdopterError(f"Host {by.host} cannot adopt its own tasks. Name another host with --by.")
    if by.state is HostState.FENCED and by.adopted_by == lost.host:
        return  # its own tasks come back to it, which wait until its agent is started
    if by.state is not HostState.ACTIVE:
        raise AdopterError(f"Host {by.host} is {by.state}. Only an active host can adopt tasks.")
    if by.silence >= max(by.heartbeat_timeout, _ADOPTER_SILENCE):
        raise AdopterError(
            f"Host {by.host} has sent no heartbeat for {by.silence:.0f} s. Start its agent first, or name another host "
            "with --by."
        )


def _fence_off(connection: sa.Connection, lost: _Row, *, by: str | None, powered_off: bool) -> None:
    if lost.state in WITH_AN_AGENT and lost.silence < lost.heartbeat_timeout and not powered_off:
        raise HostInUse(
            f"Host {lost.host} sent a heartbeat {lost.silence:.0f} s ago. Drain it, or power it off and pass "
            "--powered-off."
        )
    _move(connection, lost.host, HostEvent.TAKE_AWAY, lease=_NOBODY, adopted_by=by)


def _move(
    connection: sa.Connection,
    name: str,
    event: HostEvent,
    *,
    condition: sa.ColumnElement[bool] | None = None,
    **values: Any,  # noqa: ANN401 (whatever a column holds)
) -> bool:
    """Move a host as the table says, in one statement; False if there is none, or its state does not allow it."""
    moves = MOVES[event]
    after = sa.case({before.value: after.value for before, after in moves.items()}, value=host.c.state)
    allowed = [host.c.host == name, host.c.state.in_([*moves]), *([] if condition is None else [condition])]
    return connection.execute(host.update().where(*allowed).values(state=after, **values)).rowcount == 1


def _takes_all(connection: sa.Connection, name: str) -> bool:
    """Whether a host may begin tasks; while it drains, it only finishes what it has begun."""
    state = connection.execute(sa.select(host.c.state).where(host.c.host == name)).scalar()
    return state != HostState.DRAINING


def _unfinished(connection: sa.Connection, name: str, *, takes_all: bool = True) -> list[str]:
    """The unfinished tasks of a host, the oldest first; all of them, or those that it has begun."""
    some = sa.true() if takes_all else bundle_task.c.attempts > 0
    query = sa.select(bundle_task.c.bundle_id).where(bundle_task.c.host == name, task_in_progress, some)
    return [*connection.execute(query.order_by(bundle_task.c.start_time)).scalars()]
