"""One owner for each object in a bucket: which task may write or delete it, and which requests may still hit it.

The table `bundle_part` has one row per key. A task claims a key in a transaction before it writes the object. A
deletion also claims first, then deletes the objects, then the rows of those that the store has confirmed as deleted.

No clock decides which task owns a key. Deleting the row of an ended task releases its keys.
"""

# The rules:
# - No task can claim a key of another unfinished task.
# - A task takes over the row of an ended task. It waits while a request of that task may be in flight.
# - `sender`: the process, or the attempt to delete, that sent the last request; None: no request is open.
#   A process has a list of its own requests (`store_calls.py`, `IN_FLIGHT`). A request of another sender may arrive at
#   any time: the sender was killed or disconnected, or does not wait for it.
# - Such a key is not free for `SETTLE` seconds after that was found (`settle_time`, by the database's clock). An object
#   that was deleted meanwhile is deleted once more then (state `gone`): an upload may have arrived after the deletion.
# - An object without a row is never deleted.

from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from thrave.bundle.model import PartRecord
from thrave.concurrency import random_hex
from thrave.database import bundle_part, bundle_task, now, task_in_progress
from thrave.tasks.lease import RightLostError

SETTLE = 3600.0
"""Seconds for which a request may be in flight after its sender has ended: in a proxy, or in a kernel's send buffer.
TCP times out after 15 minutes (Linux, tcp_retries2); no proxy is known that keeps a request for longer."""

THIS_PROCESS = random_hex(8)

_ATTEMPTS = 10  # to claim a key: between two statements the row of an ended task may be deleted

_MINE = bundle_part.c.bundle_id == sa.bindparam("of")
_OBJECT = sa.and_(_MINE, bundle_part.c.bucket == sa.bindparam("within"), bundle_part.c.key == sa.bindparam("named"))
_SENT = bundle_part.c.state == sa.literal_column("'sent'")
_GONE = bundle_part.c.state == sa.literal_column("'gone'")
_UNWANTED = bundle_part.c.state == sa.literal_column("'unwanted'")
_DELETE = bundle_part.delete().where(_OBJECT)
_DELAY = bundle_part.update().where(_OBJECT).values(settle_time=now(SETTLE))
_IS_GONE = bundle_part.update().where(_OBJECT).values(state="gone", sender=None)


class ObjectInUseError(Exception):
    """An object cannot be written: another task owns it, or a request of an earlier task may be in flight."""

    def __init__(self, key: str, reason: str, *, seconds: float | None) -> None:
        """Name the object and the reason. It is free in `seconds` at the earliest; None: unknown."""
        super().__init__(f"The object '{key}' cannot be written: {reason}.")
        self.seconds = seconds


@cache
def _claim_new(dialect: str) -> sa.Executable:
    """Claim an object without a row, or one that this process claimed for the same task: the usual case."""
    insert: Any = (postgresql.insert if dialect == "postgresql" else sqlite.insert)(bundle_part)
    row = sa.select(
        bundle_task.c.bucket, sa.bindparam("named", type_=bundle_part.c.key.type), bundle_task.c.bundle_id,
        sa.literal_column("'sent'"), sa.bindparam("by", type_=bundle_part.c.sender.type),
        sa.bindparam("record", type_=bundle_part.c.part.type),
    ).where(bundle_task.c.bundle_id == sa.bindparam("of"), task_in_progress)  # fmt: skip
    insert = insert.from_select(["bucket", "key", "bundle_id", "state", "sender", "part"], row)
    known = insert.excluded
    upsert: sa.Executable = insert.on_conflict_do_update(
        index_elements=["bucket", "key"],
        set_={"sender": known.sender, "part": known.part, "size": None, "etag": None},
        where=sa.and_(
            bundle_part.c.bundle_id == known.bundle_id,
            _SENT,
            sa.or_(bundle_part.c.sender.is_(None), bundle_part.c.sender == known.sender),
        ),
    )
    return upsert.execution_options(preserve_rowcount=True)


def claim(
    connection: sa.Connection, bundle_id: str, key: str, *, sender: str, busy: Collection[str], part: PartRecord | None
) -> None:
    """Claim an object that is about to be written, for an unfinished task.

    Args:
        connection: Of a transaction.
        bundle_id: The task.
        key: Of the object.
        sender: This process.
        busy: Keys that requests of this process may still hit.
        part: Its record in the manifest, if it is a part.

    Raises:
        ObjectInUseError: The object is not free.
        RightLostError: The task has ended.
    """
    record = part and asdict(part)
    given = {"named": key, "of": bundle_id, "by": sender, "record": record}
    for _ in range(_ATTEMPTS):
        if connection.execute(_claim_new(connection.dialect.name), given).rowcount == 1:
            return
        bucket = _bucket(connection, bundle_id)
        if _can_take_over(connection, bundle_id, bucket, key, sender=sender, busy=busy):
            _take(connection, bundle_id, bucket, key, sender)  # the next attempt finds a row of this process
    raise ObjectInUseError(key, "other processes claim it at the same time", seconds=0.0)


def check_free(connection: sa.Connection, bundle_id: str, key: str, *, sender: str, busy: Collection[str]) -> None:
    """Check that an unfinished task could claim an object. Raises as `claim`."""
    _can_take_over(connection, bundle_id, _bucket(connection, bundle_id), key, sender=sender, busy=busy)


def _bucket(connection: sa.Connection, bundle_id: str) -> str:
    query = sa.select(bundle_task.c.bucket).where(bundle_task.c.bundle_id == bundle_id, task_in_progress)
    bucket: str | None = connection.execute(query).scalar_one_or_none()
    if bucket is None:
        raise RightLostError(bundle_id)
    return bucket


def _can_take_over(
    connection: sa.Connection, bundle_id: str, bucket: str, key: str, *, sender: str, busy: Collection[str]
) -> bool:
    """Lock the object's row, and return True if the task owns it or may take it over; False if there is no row.

    Raises:
        ObjectInUseError: Another task owns the row, or a request may still hit the object.
    """
    query = sa.select(bundle_part).where(bundle_part.c.bucket == bucket, bundle_part.c.key == key)
    row = connection.execute(query.with_for_update()).first()
    if row is None:
        return False
    if row.bundle_id == bundle_id:
        return True
    # Read after the row was locked, so it includes a task that has claimed the key meanwhile.
    if _is_unfinished(connection, row.bundle_id):
        raise ObjectInUseError(key, "another bundle task, which is not finished, writes it", seconds=None)
    if row.sender is not None and (row.sender != sender or key in busy):
        reason = "a request of an earlier bundle task to write or delete it may be in flight"
        raise ObjectInUseError(key, reason, seconds=0.0)
    seconds = 0.0
    if row.settle_time is not None:
        seconds = (row.settle_time - connection.execute(sa.select(now())).scalar_one()).total_seconds()
    if seconds > 0:
        reason = f"a lost request of an earlier bundle task may arrive until {row.settle_time:%Y-%m-%d %H:%M:%S}Z"
        raise ObjectInUseError(key, reason, seconds=seconds)
    return True


def _take(connection: sa.Connection, bundle_id: str, bucket: str, key: str, sender: str) -> None:
    """Make the task the owner of a row that `_can_take_over` has locked."""
    there = sa.and_(bundle_part.c.bucket == bucket, bundle_part.c.key == key)
    # A late request of another process for the same task has the same content, but may arrive after a deletion.
    late = sa.and_(there, bundle_part.c.sender.is_not(None), bundle_part.c.sender != sender)
    connection.execute(bundle_part.update().where(late).values(settle_time=now(SETTLE)))
    connection.execute(bundle_part.update().where(there).values(bundle_id=bundle_id, state="sent", sender=sender))


def claim_replaced(
    connection: sa.Connection, bundle_id: str, keys: Collection[str], *, sender: str, busy: Collection[str]
) -> None:
    """Claim the objects of a bundle that an unfinished task has replaced, so that they can be deleted.

    Leaves out the objects of unfinished tasks, and those that another task has to delete.
    """
    bucket = _bucket(connection, bundle_id)
    for key in sorted(keys):
        there = sa.and_(bundle_part.c.bucket == bucket, bundle_part.c.key == key)
        row = connection.execute(sa.select(bundle_part).where(there).with_for_update()).first()
        if row is None:
            unknown = {"bucket": bucket, "key": key, "bundle_id": bundle_id, "state": "unwanted", "size": 0}
            connection.execute(bundle_part.insert(), unknown)
        elif row.bundle_id != bundle_id and row.state == "sent" and not _is_unfinished(connection, row.bundle_id):
            change = bundle_part.update().where(there)
            connection.execute(change.values(bundle_id=bundle_id, state="unwanted", part=None, sender=None))
            if row.sender is not None and (row.sender != sender or key in busy):
                delay(connection, bundle_id, [key])


def _is_unfinished(connection: sa.Connection, bundle_id: str) -> bool:
    query = sa.select(bundle_task.c.bundle_id).where(bundle_task.c.bundle_id == bundle_id, task_in_progress)
    return connection.execute(query).first() is not None


def renounce(connection: sa.Connection, bundle_id: str) -> None:
    """Record that all objects of a task are to be deleted: the task has failed, or restarts its sealing."""
    mine = sa.and_(bundle_part.c.bundle_id == bundle_id, _SENT)
    connection.execute(bundle_part.update().where(mine).values(state="unwanted", part=None))


def claim_deletion(
    connection: sa.Connection, bundle_id: str, *, sender: str, deletion: str, unanswered: Collection[str]
) -> Sequence[str]:
    """Claim every unwanted object of a task, and those that were deleted and may have come back; return their keys.

    Args:
        connection: Of a transaction that is committed before anything is deleted.
        bundle_id: The task.
        sender: This process.
        deletion: A unique name of this attempt to delete.
        unanswered: Keys for which a request of this process has no response.
    """
    mine = bundle_part.c.bundle_id == bundle_id
    due = sa.and_(mine, sa.or_(_UNWANTED, sa.and_(_GONE, bundle_part.c.settle_time <= now())))
    late = sa.and_(mine, _UNWANTED, bundle_part.c.sender.is_not(None), bundle_part.c.sender != sender)
    connection.execute(bundle_part.update().where(late).values(settle_time=now(SETTLE)))
    connection.execute(bundle_part.update().where(due).values(state="unwanted", sender=deletion))
    delay(connection, bundle_id, unanswered)
    query = sa.select(bundle_part.c.key).where(mine, _UNWANTED).order_by(bundle_part.c.key)
    return connection.execute(query).scalars().all()


def end_deletion(
    connection: sa.Connection,
    bundle_id: str,
    *,
    deletion: str,
    gone: Collection[str],
    unanswered: Collection[str],
    busy: Collection[str],
) -> None:
    """Record the end of a deletion.

    Args:
        connection: Of a transaction.
        bundle_id: The task.
        deletion: As it was claimed.
        gone: Keys of objects that the store has confirmed as deleted, or that belong to another bundle.
        unanswered: Keys for which a request has no response.
        busy: Keys that requests of this process may still hit.
    """
    delay(connection, bundle_id, unanswered)
    mine = bundle_part.c.bundle_id == bundle_id
    waiting = sa.select(bundle_part.c.key).where(mine, bundle_part.c.settle_time > now())
    late = {*connection.execute(waiting).scalars()}
    _each(connection, _IS_GONE, bundle_id, late.intersection(gone).difference(busy))
    _each(connection, _DELETE, bundle_id, set(gone).difference(late, busy))
    ended = sa.and_(mine, _UNWANTED, bundle_part.c.sender == deletion, bundle_part.c.key.not_in([*busy]))
    connection.execute(bundle_part.update().where(ended).values(sender=None))


def delay(connection: sa.Connection, bundle_id: str, keys: Collection[str]) -> None:
    """Record that requests for these objects of a task were sent, and may arrive later."""
    _each(connection, _DELAY, bundle_id, keys)


def _each(connection: sa.Connection, statement: sa.Executable, bundle_id: str, keys: Collection[str]) -> None:
    if keys:
        query = sa.select(bundle_task.c.bucket).where(bundle_task.c.bundle_id == bundle_id)
        bucket = connection.execute(query).scalar_one()
        connection.execute(statement, [{"of": bundle_id, "within": bucket, "named": key} for key in sorted(keys)])
