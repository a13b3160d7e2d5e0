"""What the owner of an instance wants of its power, as data: one row an instance, which survives every process.

A request of StartInstances, StopInstances, RebootInstances or TerminateInstances becomes the row's request in the
transaction that is committed before the caller has the answer. It takes the place of the request before it, so that the
last one wins, and stays until the machine is seen to be as it wants it, or until it is too old. What a bundle task has
borrowed (the instance is off because of the task) is recorded beside what is wanted, and never changes that.

Nothing here starts or stops a machine; `power.py` does.
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

KEPT_FOR = timedelta(days=1)
"""A request that could not be carried out for so long is dropped: whoever asked has long done something else."""


class PowerAction(StrEnum):
    """What can be asked of an instance's power, in EC2's words."""

    STOP = "stop"
    START = "start"
    REBOOT = "reboot"
    TERMINATE = "terminate"


class WantedPower(StrEnum):
    """The power state that an instance is to have in the end, in EC2's words."""

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
        wanted: The state that it is to have in the end; None if nobody has said so.
        request: What is still to be done for that; None if nothing is.
        version: Counts the requests that were accepted.
        asked: Whether the guest has been asked to power off, and has not been seen off since: it may do so later.
        borrowed_by: The bundle task that keeps it off, or has ended without putting it back.
        is_held: Whether that task goes on. It puts the instance back itself, as is wanted by then.
        is_expired: Whether the request is too old to be carried out; says nothing while `is_held`.
    """

    instance_id: str
    wanted: WantedPower | None = None
    request: PowerAction | None = None
    version: int = 0
    asked: bool = False
    borrowed_by: str | None = None
    is_held: bool = False
    is_expired: bool = False


_HELD = sa.exists().where(bundle_task.c.bundle_id == instance_power.c.borrowed_by, task_in_progress)
_ROW = sa.select(
    instance_power.c.wanted, instance_power.c.request, instance_power.c.version, instance_power.c.asked,
    instance_power.c.borrowed_by, instance_power.c.request_time, _HELD.label("is_held"), now().label("now"),
).where(instance_power.c.instance_id == sa.bindparam("of"))  # fmt: skip
_IS_HOSTS = sa.exists().where(
    reported.c.instance_id == instance_power.c.instance_id, reported.c.host == sa.bindparam("host")
)
_TO_DO = (
    sa.select(instance_power.c.instance_id, instance_power.c.version)
    .where(instance_power.c.request.is_not(None))
    .order_by(instance_power.c.request_time, instance_power.c.instance_id)
)


class PowerRecords:
    """The rows of the instances that this process may start and stop, or of all.

    Args:
        engine: The database.
        host: Only instances that this host has reported: in a fleet, whoever reports an instance switches it. None: all
            of them, where one process has all instances.
        holds: True of that host for as long as this process has its lease (`Fence.holds`); None: always true. Without
            the lease there is nothing to do here, and nothing is changed.
    """

    def __init__(self, engine: sa.Engine, host: str | None = None, holds: sa.ColumnElement[bool] | None = None) -> None:
        self._engine = engine
        self._host = host
        self._lease = None if holds is None else sa.select(hosts.c.host).where(holds)
        self._is_mine = _IS_HOSTS if self._lease is None else sa.and_(_IS_HOSTS, self._lease.exists())

    @classmethod
    def in_memory(cls) -> "PowerRecords":
        """Records that end with the process."""
        engine = open_in_memory()
        metadata.create_all(engine, tables=[instance_power, bundle_task])
        return cls(engine)

    def get(self, instance_id: str) -> PowerRecord:
        """The row of an instance; without a request if that is another host's to carry out."""
        query = _ROW if self._host is None else _ROW.where(self._is_mine)
        with self._engine.connect() as connection:
            return _read(connection, instance_id, query, host=self._host)

    def to_do(self) -> Mapping[str, int]:
        """The instances for which a request is to be carried out, the oldest request first; each with its version."""
        query, values = (_TO_DO, {}) if self._host is None else (_TO_DO.where(self._is_mine), {"host": self._host})
        with self._engine.connect() as connection:
            return {row.instance_id: row.version for row in connection.execute(query, values)}

    def request(self, instance_id: str, action: PowerAction, by: str | None = None) -> PowerRecord:
        """Record a request in a transaction of its own; see `record_request`. Gives the row as it was before."""
        with self._engine.begin() as connection:
            return record_request(connection, instance_id, action, by)

    def withdraw(self, before: PowerRecord) -> None:
        """Take the request back that came after this row: it could not even be begun, and its caller is told so.

        Nothing happens if there has been another request since.
        """
        values = {"wanted": before.wanted, "request": before.request, "asked": before.asked}
        self._change(before.instance_id, before.version + 1, **values, version=before.version + 2)

    def note_asked(self, record: PowerRecord) -> bool:
        """Record that the guest is about to be asked to power off.

        False if there has been another request, or the instance is another host's by now.
        """
        return record.asked or self._change(record.instance_id, record.version, asked=True)

    def note_off(self, record: PowerRecord) -> bool:
        """Record that the instance was seen off: of a reboot the start remains. False as `note_asked`."""
        request = PowerAction.START if record.request is PowerAction.REBOOT else record.request
        return self._change(record.instance_id, record.version, request=request, asked=False)

    def finish(self, record: PowerRecord) -> bool:
        """Strike the request out: the machine was seen to be as it wants it. False as `note_asked`."""
        return self._change(record.instance_id, record.version, request=None, asked=False)

    def expire(self, record: PowerRecord) -> bool:
        """Strike the request out since it is too old; what is wanted stays wanted. False as `note_asked`."""
        return self._change(record.instance_id, record.version, request=None, asked=False)

    def drop(self, record: PowerRecord) -> bool:
        """Strike the request out although it was not carried out: nothing is wanted. False as `note_asked`."""
        return self._change(record.instance_id, record.version, request=None, asked=False, wanted=None)

    def _change(self, instance_id: str, of: int, **values: object) -> bool:
        mine = sa.and_(instance_power.c.instance_id == instance_id, instance_power.c.version == of)
        change, given = instance_power.update().where(mine).values(**values), {}
        if self._host is not None:
            change, given = change.where(self._is_mine), {"host": self._host}
        with self._engine.begin() as connection:
            if self._lease is not None:  # locked, so that no adoption comes between the condition and the change
                connection.execute(self._lease.with_for_update(read=True))
            return connection.execute(change, given).rowcount == 1


def record_request(
    connection: sa.Connection, instance_id: str, action: PowerAction, by: str | None = None
) -> PowerRecord:
    """Record a request in the caller's transaction. It takes the place of the one before it.

    Args:
        connection: The transaction.
        instance_id: The instance.
        action: What is asked.
        by: Who asks.

    Returns:
        The row as it was before.

    Raises:
        StateChangedError: It is to be terminated, and nothing leads out of that. A reboot is ignored then.
    """
    before = _locked(connection, instance_id)
    if before.request is PowerAction.TERMINATE is not action:
        if action is PowerAction.REBOOT:
            return before
        raise StateChangedError(instance_id, InstanceState.SHUTTING_DOWN)
    values = {
        "wanted": WANTED[action], "request": action, "version": before.version + 1, "requested_by": by,
        "request_time": now(),
    }  # fmt: skip
    connection.execute(instance_power.update().where(instance_power.c.instance_id == instance_id).values(**values))
    return before


def borrow(
    connection: sa.Connection, instance_id: str, bundle_id: str, *, running: bool, version: int | None = None
) -> bool | None:
    """Record in the caller's transaction that a bundle task switches the instance off.

    Args:
        connection: The transaction.
        instance_id: The instance.
        bundle_id: The task.
        running: Whether the instance was seen running, or would run but for an earlier task. It is to be so again,
            unless a request says otherwise that has not been carried out.
        version: Of the row when the instance was looked at; None: nobody else asks for anything.

    Returns:
        Whether it is to run in the end; None if there has been a request since it was looked at. Then nothing changed.
    """
    row = _locked(connection, instance_id)
    wanted = row.wanted
    if row.request is None or wanted is None:
        if version not in {None, row.version}:
            return None
        wanted = WantedPower.RUNNING if running else WantedPower.STOPPED
    mine = instance_power.update().where(instance_power.c.instance_id == instance_id)
    connection.execute(mine.values(wanted=wanted, borrowed_by=bundle_id))
    return wanted is WantedPower.RUNNING


def note_seen_off(connection: sa.Connection, instance_id: str) -> None:
    """Record in the caller's transaction that the instance was seen off: of a reboot the start remains."""
    mine = sa.and_(instance_power.c.instance_id == instance_id, instance_power.c.request == PowerAction.REBOOT)
    connection.execute(instance_power.update().where(mine).values(request=PowerAction.START, asked=False))


def give_back(connection: sa.Connection, bundle_id: str) -> None:
    """Record in the caller's transaction that the task has put its instance back as is wanted.

    A request could not be carried out before, so that it grows old from now on.
    """
    mine = instance_power.update().where(instance_power.c.borrowed_by == bundle_id)
    connection.execute(mine.values(borrowed_by=None, request_time=now()))


def read(connection: sa.Connection, instance_id: str) -> PowerRecord:
    """The row of an instance, whichever host has it."""
    return _read(connection, instance_id, _ROW)


def _locked(connection: sa.Connection, instance_id: str) -> PowerRecord:
    """The row, made if there is none; nobody else changes it until the transaction ends."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    new = {"instance_id": instance_id, "version": 0, "asked": False}
    # The first statement writes, so that SQLite's lock is taken before anything is read.
    connection.execute(insert(instance_power).values(**new).on_conflict_do_nothing())
    return _read(connection, instance_id, _ROW.with_for_update(of=instance_power))


def _read(
    connection: sa.Connection, instance_id: str, query: sa.Select[tuple[object, ...]], **more: object
) -> PowerRecord:
    row = connection.execute(query, {"of": instance_id, **more}).first()
    if row is None:
        return PowerRecord(instance_id=instance_id)
    requested: datetime | None = row.request_time
    return PowerRecord(
        instance_id=instance_id,
        wanted=row.wanted and WantedPower(row.wanted),
        request=row.request and PowerAction(row.request),
        version=row.version,
        asked=row.asked,
        borrowed_by=row.borrowed_by,
        is_held=row.is_held,
        is_expired=requested is not None and row.now - requested > KEPT_FOR,
    )
