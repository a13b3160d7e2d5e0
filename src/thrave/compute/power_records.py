"""Power requests, and the power state that the owner wants: one database row for each instance.

The row of an instance has at most one request (StartInstances, StopInstances, RebootInstances or TerminateInstances). A
request is committed before its caller gets the response. A later request replaces it, so the last one wins. It stays
until the instance has the requested state, or until it expires. The row also names the bundle task that has borrowed
the instance, which does not change what the owner wants. `power.py` gives the commands to the hypervisor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from thrave.compute.errors import StateChangedError
from thrave.compute.instance import InstanceState
from thrave.database import bundle_task, instance_power, metadata, now, open_in_memory, task_in_progress
from thrave.database import host as hosts
from thrave.database import instance as reported

MAX_REQUEST_AGE = timedelta(days=1)
"""A request that could not be carried out for so long is ended: its result would surprise the caller by then."""


class PowerAction(StrEnum):
    """A power request, named as the EC2 action."""

    STOP = "stop"
    START = "start"
    REBOOT = "reboot"
    TERMINATE = "terminate"


class WantedPower(StrEnum):
    """The power state that the owner wants; EC2's names."""

    RUNNING = "running"
    STOPPED = "stopped"
    TERMINATED = "terminated"


WANTED: dict[PowerAction, WantedPower] = {
    PowerAction.STOP: WantedPower.STOPPED,
    PowerAction.START: WantedPower.RUNNING,
    PowerAction.REBOOT: WantedPower.RUNNING,
    PowerAction.TERMINATE: WantedPower.TERMINATED,
}


@dataclass(frozen=True, kw_only=True)
class PowerRecord:
    """The row of an instance.

    Attributes:
        instance_id: The instance.
        wanted: The state that the instance is to have in the end; None: no request was made and no task has run.
        request: The pending request; None if there is none.
        version: Number of requests so far, and of their ends: a state that was read before is no longer certain.
        is_shutdown_requested: Whether the guest was asked to power off and was not seen off since. It may still do so.
        borrowed_by: The bundle task that keeps the instance off, or that ended without giving it back.
        is_task_active: Whether that task is in progress. Then the task restores the state that is wanted by then.
        is_expired: Whether the request is too old to be carried out. Has no meaning while `is_task_active`.
    """

    instance_id: str
    wanted: WantedPower | None = None
    request: PowerAction | None = None
    version: int = 0
    is_shutdown_requested: bool = False
    borrowed_by: str | None = None
    is_task_active: bool = False
    is_expired: bool = False


_IS_TASK_ACTIVE = sa.exists().where(bundle_task.c.bundle_id == instance_power.c.borrowed_by, task_in_progress)
_ROW = sa.select(
    instance_power.c.wanted, instance_power.c.request, instance_power.c.version, instance_power.c.asked,
    instance_power.c.borrowed_by, instance_power.c.request_time, _IS_TASK_ACTIVE.label("is_task_active"),
    now().label("now"),
).where(instance_power.c.instance_id == sa.bindparam("instance_id_value"))  # fmt: skip
_IS_REPORTED_BY_HOST = sa.exists().where(
    reported.c.instance_id == instance_power.c.instance_id, reported.c.host == sa.bindparam("host")
)
_PENDING = (
    sa.select(instance_power.c.instance_id, instance_power.c.version)
    .where(instance_power.c.request.is_not(None))
    .order_by(instance_power.c.request_time, instance_power.c.instance_id)
)


class PowerRecords:
    """The rows of the instances of one host, or of all instances.

    Args:
        engine: The database.
        host: Only instances that this host has reported: in a fleet, the host that reports an instance carries out its
            requests. None: all instances, where one process has all of them.
        has_lease: True of the host's row as long as this process has its lease (`HostLease.is_held`); None: always
            true. Without the lease no request is pending here, and nothing is changed.
    """

    def __init__(
        self, engine: sa.Engine, host: str | None = None, has_lease: sa.ColumnElement[bool] | None = None
    ) -> None:
        self._engine = engine
        self._host = host
        self._lease = None if has_lease is None else sa.select(hosts.c.host).where(has_lease)
        self._is_own = (
            _IS_REPORTED_BY_HOST if self._lease is None else sa.and_(_IS_REPORTED_BY_HOST, self._lease.exists())
        )

    @classmethod
    def in_memory(cls) -> "PowerRecords":
        """Return records that are lost when the process ends."""
        engine = open_in_memory()
        metadata.create_all(engine, tables=[instance_power, bundle_task])
        return cls(engine)

    def get(self, instance_id: str) -> PowerRecord:
        """Return the row of an instance; without its request if another host has to carry that out."""
        query = _ROW if self._host is None else _ROW.where(self._is_own)
        with self._engine.connect() as connection:
            return _read(connection, instance_id, query, host=self._host)

    def list_pending(self) -> Mapping[str, int]:
        """Return the instances with a pending request, the oldest request first, and the version of each row."""
        query, values = (_PENDING, {}) if self._host is None else (_PENDING.where(self._is_own), {"host": self._host})
        with self._engine.connect() as connection:
            return {row.instance_id: row.version for row in connection.execute(query, values)}

    def add_request(self, instance_id: str, action: PowerAction, requester: str | None = None) -> PowerRecord:
        """Record a request in its own transaction, as `record_request`. Returns the row as it was before."""
        with self._engine.begin() as connection:
            return record_request(connection, instance_id, action, requester)

    def withdraw_request(self, before: PowerRecord) -> None:
        """Undo the request that followed this row: it was refused at once, and its caller receives the error.

        Nothing changes if there was another request since.
        """
        values = {"wanted": before.wanted, "request": before.request, "asked": before.is_shutdown_requested}
        self._update(before.instance_id, before.version + 1, **values, version=before.version + 2)

    def record_shutdown_request(self, record: PowerRecord) -> bool:
        """Record that the guest is about to be asked to power off.

        Returns:
            False if nothing was changed: there was another request, or another host has the instance now.
        """
        return record.is_shutdown_requested or self._update(record.instance_id, record.version, asked=True)

    def record_off(self, record: PowerRecord) -> bool:
        """Record that the instance was seen off, so that a reboot becomes a start. As `record_shutdown_request`."""
        request = PowerAction.START if record.request is PowerAction.REBOOT else record.request
        return self._update(record.instance_id, record.version, request=request, asked=False)

    def finish_request(self, record: PowerRecord) -> bool:
        """End a request: the instance has the requested state. Returns as `record_shutdown_request`."""
        return self._end(record)

    def expire_request(self, record: PowerRecord) -> bool:
        """End a request that is too old; the wanted state stays. Returns as `record_shutdown_request`."""
        return self._end(record)

    def drop_request(self, record: PowerRecord) -> bool:
        """End a request that cannot be carried out, and forget the wanted state. As `record_shutdown_request`."""
        return self._end(record, wanted=None)

    def _end(self, record: PowerRecord, **values: object) -> bool:
        end = {"request": None, "asked": False, "version": record.version + 1}
        return self._update(record.instance_id, record.version, **end, **values)

    def _update(self, instance_id: str, old_version: int, **values: object) -> bool:
        is_same = sa.and_(instance_power.c.instance_id == instance_id, instance_power.c.version == old_version)
        update, parameters = instance_power.update().where(is_same).values(**values), {}
        if self._host is not None:
            update, parameters = update.where(self._is_own), {"host": self._host}
        with self._engine.begin() as connection:
            if self._lease is not None:
                # Locked, so that no adoption comes between the condition and the update.
                connection.execute(self._lease.with_for_update(read=True))
            return connection.execute(update, parameters).rowcount == 1


def record_request(
    connection: sa.Connection, instance_id: str, action: PowerAction, requester: str | None = None
) -> PowerRecord:
    """Record a request in the caller's transaction. It replaces a pending request.

    Args:
        connection: The transaction.
        instance_id: The instance.
        action: The request.
        requester: The account that makes it.

    Returns:
        The row as it was before.

    Raises:
        StateChangedError: The instance is to be terminated, which is final. A reboot is ignored instead.
    """
    before = _lock_row(connection, instance_id)
    if before.request is PowerAction.TERMINATE is not action:
        if action is PowerAction.REBOOT:
            return before
        raise StateChangedError(instance_id, InstanceState.SHUTTING_DOWN)
    values = {
        "wanted": WANTED[action], "request": action, "version": before.version + 1, "requested_by": requester,
        "request_time": now(),
    }  # fmt: skip
    connection.execute(instance_power.update().where(instance_power.c.instance_id == instance_id).values(**values))
    return before


def borrow(
    connection: sa.Connection, instance_id: str, bundle_id: str, *, running: bool, version: int | None = None
) -> bool | None:
    """Record in the caller's transaction that a bundle task shuts the instance down.

    Args:
        connection: The transaction.
        instance_id: The instance.
        bundle_id: The task.
        running: Whether the instance was running, or would run without an earlier task. It is to run again after the
            task, unless a pending request says otherwise.
        version: Version of the row when `running` was read; None: accept every version.

    Returns:
        Whether the instance is to run after the task. None if a request was made or ended since `version`: nothing was
        changed.
    """
    row = _lock_row(connection, instance_id)
    wanted = row.wanted
    if row.request is None or wanted is None:
        if version not in {None, row.version}:
            return None
        wanted = WantedPower.RUNNING if running else WantedPower.STOPPED
    update = instance_power.update().where(instance_power.c.instance_id == instance_id)
    connection.execute(update.values(wanted=wanted, borrowed_by=bundle_id))
    return wanted is WantedPower.RUNNING


def record_off(connection: sa.Connection, instance_id: str) -> None:
    """Record in the caller's transaction that the instance was seen off, so that a reboot becomes a start."""
    is_reboot = sa.and_(instance_power.c.instance_id == instance_id, instance_power.c.request == PowerAction.REBOOT)
    connection.execute(instance_power.update().where(is_reboot).values(request=PowerAction.START, asked=False))


def give_back(connection: sa.Connection, bundle_id: str) -> None:
    """Record in the caller's transaction that the task has restored the wanted state of its instance.

    A pending request could not be carried out before, so its age begins now.
    """
    update = instance_power.update().where(instance_power.c.borrowed_by == bundle_id)
    connection.execute(update.values(borrowed_by=None, request_time=now()))


def read_record(connection: sa.Connection, instance_id: str) -> PowerRecord:
    """Return the row of an instance of any host."""
    return _read(connection, instance_id, _ROW)


def _lock_row(connection: sa.Connection, instance_id: str) -> PowerRecord:
    """Return the row, locked until the transaction ends. Creates it if there is none."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    new = {"instance_id": instance_id, "version": 0, "asked": False}
    # The first statement writes, so that SQLite's lock is taken before anything is read.
    connection.execute(insert(instance_power).values(**new).on_conflict_do_nothing())
    return _read(connection, instance_id, _ROW.with_for_update(of=instance_power))


def _read(
    connection: sa.Connection, instance_id: str, query: sa.Select[tuple[object, ...]], **parameters: object
) -> PowerRecord:
    row = connection.execute(query, {"instance_id_value": instance_id, **parameters}).first()
    if row is None:
        return PowerRecord(instance_id=instance_id)
    request_time: datetime | None = row.request_time
    return PowerRecord(
        instance_id=instance_id,
        wanted=row.wanted and WantedPower(row.wanted),
        request=row.request and PowerAction(row.request),
        version=row.version,
        is_shutdown_requested=row.asked,
        borrowed_by=row.borrowed_by,
        is_task_active=row.is_task_active,
        is_expired=request_time is not None and row.now - request_time > MAX_REQUEST_AGE,
    )
