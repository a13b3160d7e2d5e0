"""The registry of a fleet's hosts in the database: heartbeats, drain, adoption, retirement.

    HostError
    ├── NoSuchHost          no host of that name has ever had an agent
    ├── HostInUse           it sends heartbeats, so its tasks must not be taken
    ├── HostStateError      the host's state does not allow it (`models.py`)
    └── AdopterError        the adopting host cannot take the tasks

Nothing here connects to an agent: an agent whose lease was replaced in the database ends (`lease.py`). All times are
set and compared by the database's clock.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import Any, NamedTuple

import sqlalchemy as sa
import structlog

from thrave.concurrency import random_hex
from thrave.database import bundle_task, host, instance, now, task_in_progress
from thrave.tasks.engine import RUNNING, TaskQueue
from thrave.tasks.errors import AdopterError, HostInUse, HostStateError, NoSuchHost, TaskFailure
from thrave.tasks.lease import HostLease
from thrave.tasks.models import HEARTBEAT_STATES, HOST_TRANSITIONS, BundleTaskState, HostEvent, HostState
from thrave.tasks.repository import TaskRepository

_NO_LEASE = ""  # the lease of a host that has no agent
_MIN_IDLE_CHECKS = 3  # calls of `requeue_lost`: the agent calls it twice when it starts, then every 30 seconds
# Sent every few seconds by every host, so they are built once.
_HOLDER = sa.and_(host.c.host == sa.bindparam("name"), host.c.lease == sa.bindparam("token"))
_HEARTBEAT = host.update().where(_HOLDER).values(heartbeat_time=now())
_STATE_OF_HOLDER = sa.select(host.c.state).where(_HOLDER)
_MIN_ADOPTER_SILENCE = 120.0  # seconds: the agent of the adopting host may be restarting

log = structlog.get_logger()


class HostStatus(NamedTuple):
    """A host as `thrave host list` shows it."""

    host: str
    state: HostState
    version: str
    worker_concurrency: int
    start_time: datetime
    """When its agent started; aware, in UTC."""
    heartbeat_time: datetime
    """Its last heartbeat; aware, in UTC."""
    heartbeat_interval: float
    """Seconds between its heartbeats; its agent's setting."""
    heartbeat_timeout: float
    """Seconds without a heartbeat after which it is lost; its agent's setting."""
    adopted_by: str | None
    """The host that adopted its tasks; None again when an agent is started on it."""
    now: datetime
    """When this was read."""
    instances: int
    """Number of instances that its agent has reported."""
    waiting: int
    """Number of tasks that it has not started."""
    working: int
    """Number of tasks that it has started and not finished."""

    @property
    def silence(self) -> timedelta:
        """The time since its last heartbeat."""
        return self.now - self.heartbeat_time

    @property
    def is_lost(self) -> bool:
        """Whether it should send heartbeats, and has sent none for `heartbeat_timeout`."""
        return self.state in HEARTBEAT_STATES and self.silence.total_seconds() >= self.heartbeat_timeout


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
        """Record these settings, in seconds, for a host that this process acquires."""
        self._engine = engine
        self._records = records
        self._queues = queues
        self._heartbeat_interval = heartbeat_interval
        self._heartbeat_timeout = heartbeat_timeout
        self._idle_checks: dict[str, int] = {}  # by task; see `requeue_lost`

    def acquire_lease(self, name: str, *, worker_concurrency: int) -> HostLease:
        """Acquire a new lease of a host for this process. An earlier agent ends at its next write or heartbeat.

        A draining host stays `draining`.
        """
        token = random_hex(16)
        row: dict[str, Any] = {
            "lease": token, "version": version("thrave"), "worker_concurrency": worker_concurrency, "start_time": now(),
            "heartbeat_time": now(), "heartbeat_interval": self._heartbeat_interval,
            "heartbeat_timeout": self._heartbeat_timeout, "adopted_by": None,
        }  # fmt: skip
        with self._engine.begin() as connection:
            if not _change_state(connection, name, HostEvent.AGENT_STARTS, **row):
                connection.execute(host.insert().values(host=name, state=HostState.ACTIVE, **row))
        return HostLease(name, token)

    def heartbeat(self, lease: HostLease) -> HostState:
        """Send a heartbeat, and return the host's state. Ends the process if the host is another agent's now."""
        with self._engine.begin() as connection:
            holder = {"name": lease.host, "token": lease.token}
            connection.execute(_HEARTBEAT, holder)
            state = connection.execute(_STATE_OF_HOLDER, holder).scalar()
        return HostState(state) if state else lease.exit_process()

    def requeue_lost(self, name: str) -> None:
        """Enqueue the unfinished tasks of a host that nothing runs.

        The engine reports a workflow as started even if its thread has ended. So the list of tasks that this process
        runs decides. A workflow that is just starting counts as lost only after `_MIN_IDLE_CHECKS` calls of this
        method. A second workflow of a task does no harm: see `workflow.run_bundle_task`.
        """
        self._queues.cancel_other_versions(name)
        with self._engine.begin() as connection:
            unfinished = _unfinished(connection, name, include_waiting=_starts_tasks(connection, name))
        started, scheduled = self._queues.started(name), self._queues.scheduled(name)
        idle = [each for each in unfinished if each not in scheduled and each not in RUNNING]
        self._idle_checks = {each: self._idle_checks.get(each, 0) + 1 for each in idle if each in started}
        lost = [each for each in idle if self._idle_checks.get(each, _MIN_IDLE_CHECKS) >= _MIN_IDLE_CHECKS]
        if not lost:
            return
        self._queues.cancel(name, lost)
        with self._engine.begin() as connection:
            for bundle_id in lost:
                log.warning("task was not running, enqueued again", bundle_id=bundle_id)
                self._queues.requeue(connection, bundle_id, name)

    def started_tasks(self, name: str) -> Sequence[str]:
        """Return the ids of the tasks that a host has started and not finished."""
        with self._engine.connect() as connection:
            return _unfinished(connection, name, include_waiting=False)

    def record_drained(self, lease: HostLease) -> bool:
        """Record that the host is drained; return False if an operator has ended the drain in the meantime."""
        with self._engine.begin() as connection:
            return _change_state(connection, lease.host, HostEvent.AGENT_HAS_DRAINED, condition=lease.is_held)

    def list(self) -> Sequence[HostStatus]:
        """Return all hosts, sorted by name."""
        tasks = sa.select(sa.func.count()).where(bundle_task.c.host == host.c.host, task_in_progress)
        is_started = bundle_task.c.runs > 0
        reported = sa.select(sa.func.count()).where(instance.c.host == host.c.host)
        query = sa.select(
            host.c.host, host.c.state, host.c.version, host.c.worker_concurrency, host.c.start_time,
            host.c.heartbeat_time, host.c.heartbeat_interval, host.c.heartbeat_timeout, host.c.adopted_by,
            now().label("now"),
            reported.scalar_subquery().label("instances"),
            tasks.where(~is_started).scalar_subquery().label("waiting"),
            tasks.where(is_started).scalar_subquery().label("working"),
        ).order_by(host.c.host)  # fmt: skip
        with self._engine.connect() as connection:
            found = [HostStatus(*row) for row in connection.execute(query)]
        return [one._replace(state=HostState(one.state)) for one in found]

    def drain(self, name: str) -> HostState:
        """Let a host finish its started tasks and start no others.

        Returns:
            The host's state: `draining`, or `drained` if it was so already.

        Raises:
            NoSuchHost: No host has that name.
            HostStateError: It is fenced.
        """
        return self._change(name, HostEvent.DRAIN)

    def activate(self, name: str) -> HostState:
        """End the drain of a host. Raises as `drain`."""
        return self._change(name, HostEvent.ACTIVATE)

    def _change(self, name: str, event: HostEvent) -> HostState:
        with self._engine.begin() as connection:
            is_changed = _change_state(connection, name, event)
            state = _read(connection, name)[name].state
        if not is_changed:
            raise HostStateError(name, state, event)
        return state

    def adopt(self, lost: str, *, by: str, powered_off: bool = False) -> Sequence[str]:
        """Give a lost host's instances and unfinished tasks to another host, which must reach the same storage.

        From then on the lost host's agent can write nothing. If it still runs, it ends at its next write.

        Args:
            lost: The host that is lost.
            by: The host that takes its instances and unfinished tasks.
            powered_off: Whether the operator has checked that the lost host is off. Then its heartbeats are ignored.

        Returns:
            The ids of the adopted tasks.

        Raises:
            NoSuchHost: No host has one of the names.
            HostInUse: The lost host has sent a heartbeat within its `heartbeat_timeout`.
            AdopterError: The other host cannot adopt its tasks.
        """
        with self._engine.begin() as connection:
            hosts = _read(connection, lost, by)
            _check_adopter(hosts[by], hosts[lost])
            _fence(connection, hosts[lost], by=by, powered_off=powered_off)
            # Before the tasks are read: a transaction that adds a task or a request locks the instance's row.
            connection.execute(instance.update().where(instance.c.host == lost).values(host=by))
            tasks = _unfinished(connection, lost)
            affected = (
                bundle_task.c.host == lost,
                sa.or_(
                    task_in_progress,
                    bundle_task.c.power_recovery_until.is_not(None),
                    bundle_task.c.overlay.is_not(None),
                ),
            )
            connection.execute(bundle_task.update().where(*affected).values(host=by))
            for bundle_id in tasks:
                self._queues.requeue(connection, bundle_id, by)
        self._queues.cancel(lost, tasks)
        for bundle_id in tasks:
            self._records.add_event(bundle_id, f"Host {by} continues the task of host {lost}.")
        return tasks

    def retire(self, name: str, *, powered_off: bool = False) -> Sequence[str]:
        """Remove a host and its instances; its unfinished tasks fail with `Server.HostLost`.

        A task whose bundle is complete in the bucket already ends as `complete`.

        Args:
            name: The host.
            powered_off: As for `adopt`.

        Returns:
            The ids of the tasks that failed.

        Raises:
            NoSuchHost: No host has that name.
            HostInUse: It has sent a heartbeat within its `heartbeat_timeout`.
        """
        with self._engine.begin() as connection:
            _fence(connection, _read(connection, name)[name], by=None, powered_off=powered_off)
            # Before the tasks are read, as above.
            connection.execute(instance.delete().where(instance.c.host == name))
            tasks = _unfinished(connection, name)
            reason = TaskFailure("Server.HostLost", f"The host {name}, which had the instance's disk, was retired.")
            failed = [each for each in tasks if self._records.end_on_lost_host(connection, each, reason)]
            connection.execute(host.delete().where(host.c.host == name))
        self._queues.cancel(name, tasks)
        for bundle_id in tasks:
            state = BundleTaskState.FAILED if bundle_id in failed else BundleTaskState.COMPLETE
            self._records.log_state(bundle_id, state)
        return failed


class _Row(NamedTuple):
    """The columns on which changes of a host depend."""

    host: str
    state: HostState
    heartbeat_timeout: float
    adopted_by: str | None
    silence: float
    """Seconds since its last heartbeat."""


def _read(connection: sa.Connection, *names: str) -> dict[str, _Row]:
    """Read hosts and lock their rows until the transaction ends. Raises NoSuchHost."""
    query = sa.select(
        host.c.host,
        host.c.state,
        host.c.heartbeat_timeout,
        host.c.adopted_by,
        host.c.heartbeat_time,
        now().label("now"),
    )
    # Sorted, because two adoptions that lock rows in different orders could deadlock.
    ordered = query.where(host.c.host.in_(names)).order_by(host.c.host).with_for_update()
    found = {
        row.host: _Row(
            row.host, HostState(row.state), row.heartbeat_timeout, row.adopted_by,
            (row.now - row.heartbeat_time).total_seconds(),
        )
        for row in connection.execute(ordered)
    }  # fmt: skip
    for name in names:
        if name not in found:
            raise NoSuchHost(name)
    return found


def _check_adopter(by: _Row, lost: _Row) -> None:
    """Raise AdopterError if no agent would run the tasks of the lost host."""
    if by.host == lost.host:
        raise AdopterError(f"Host {by.host} cannot adopt its own tasks. Name another host with --by.")
    if by.state is HostState.FENCED and by.adopted_by == lost.host:
        return  # its own tasks return to it, and wait until its agent is started
    if by.state is not HostState.ACTIVE:
        raise AdopterError(f"Host {by.host} is {by.state}. Only an active host can adopt tasks.")
    if by.silence >= max(by.heartbeat_timeout, _MIN_ADOPTER_SILENCE):
        raise AdopterError(
            f"Host {by.host} has sent no heartbeat for {by.silence:.0f} s. Start its agent first, or name another host "
            "with --by."
        )


def _fence(connection: sa.Connection, lost: _Row, *, by: str | None, powered_off: bool) -> None:
    if lost.state in HEARTBEAT_STATES and lost.silence < lost.heartbeat_timeout and not powered_off:
        raise HostInUse(
            f"Host {lost.host} sent a heartbeat {lost.silence:.0f} s ago. Drain it, or power it off and pass "
            "--powered-off."
        )
    _change_state(connection, lost.host, HostEvent.FENCE, lease=_NO_LEASE, adopted_by=by)


def _change_state(
    connection: sa.Connection,
    name: str,
    event: HostEvent,
    *,
    condition: sa.ColumnElement[bool] | None = None,
    **values: object,
) -> bool:
    """Change a host's state by the table, in one statement; return False if there is no such host or transition."""
    transitions = HOST_TRANSITIONS[event]
    after = sa.case({before.value: after.value for before, after in transitions.items()}, value=host.c.state)
    allowed = [host.c.host == name, host.c.state.in_([*transitions]), *([] if condition is None else [condition])]
    return connection.execute(host.update().where(*allowed).values(state=after, **values)).rowcount == 1


def _starts_tasks(connection: sa.Connection, name: str) -> bool:
    """Whether a host may start tasks; a draining host only finishes those that it has started."""
    state = connection.execute(sa.select(host.c.state).where(host.c.host == name)).scalar()
    return state != HostState.DRAINING


def _unfinished(connection: sa.Connection, name: str, *, include_waiting: bool = True) -> list[str]:
    """Return the ids of a host's unfinished tasks, oldest first; all of them, or only those that it has started."""
    some = sa.true() if include_waiting else bundle_task.c.runs > 0
    query = sa.select(bundle_task.c.bundle_id).where(bundle_task.c.host == name, task_in_progress, some)
    return [*connection.execute(query.order_by(bundle_task.c.start_time)).scalars()]
