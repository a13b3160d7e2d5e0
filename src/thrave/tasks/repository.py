"""The records of bundle tasks, as they are asked for, change their state and end.

A state is only ever changed by `move`, which applies the table in `states.py` in one statement, so that two writers
(the task's own host, and a caller who cancels) can never both win. Nothing here decides what happens next.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa
from pydantic import TypeAdapter

from thrave.compute import power_records
from thrave.compute.base import Overlay
from thrave.compute.power_records import PowerRecord, WantedPower
from thrave.database import (
    account,
    bundle_part,
    bundle_task,
    bundle_task_event,
    instance,
    instance_power,
    now,
    task_in_progress,
    to_be_deleted,
)
from thrave.tasks import claims
from thrave.tasks.errors import TaskCancelled, TaskFailure, without_folders
from thrave.tasks.journal import UploadJournal
from thrave.tasks.lease import Fence, hostless
from thrave.tasks.models import (
    AFTER_STORED,
    CANCELLABLE,
    FINISHED,
    FIRST_OF_UNDO,
    MAY_FAIL,
    WITH_PROGRESS,
    BundleRequest,
    BundleTask,
    BundleTaskState,
    Step,
    TaskEvent,
    before,
    following,
)
from thrave.vault import Vault

RECOVER_FOR = timedelta(days=1)
"""How long an instance is tried to be started that its task could not start."""

# What a task needs while it is worked on, erased at its end; and what it keeps for itself besides.
_ERASED = dict.fromkeys(("encrypted_policy", "encrypted_bundle_key", "checkpoint", "documents"))
_COMPLETED: dict[str, Any] = {"progress": 100, "made_bucket": None, **_ERASED}
_KEPT = {*_ERASED, "overlay", "part_series", "earlier", "manifest_sent"}

# Queries are written once, here: SQLAlchemy takes longer to put one together than SQLite to answer it.
_SHOWN = [column for column in bundle_task.c if column.name not in _KEPT]
_NAMES = [column.name for column in _SHOWN]
_BY_ID = sa.select(*_SHOWN).where(bundle_task.c.bundle_id == sa.bindparam("bundle_id"))
_TASKS = sa.select(*_SHOWN).order_by(bundle_task.c.start_time, bundle_task.c.bundle_id)
_NEWEST = sa.select(*_SHOWN).order_by(bundle_task.c.start_time.desc(), bundle_task.c.bundle_id.desc())
_WITH_AGE = sa.select(*_SHOWN, now().label("now")).where(bundle_task.c.bundle_id == sa.bindparam("bundle_id"))
_IN_PROGRESS = _TASKS.where(bundle_task.c.instance_id == sa.bindparam("instance_id"), task_in_progress)
_OF_ACCOUNT = _TASKS.where(
    bundle_task.c.account_id == sa.bindparam("account_id"),
    sa.or_(task_in_progress, bundle_task.c.update_time > now(-sa.bindparam("kept", type_=sa.Float))),
)
_OF_PLACE = _TASKS.where(
    bundle_task.c.bucket == sa.bindparam("bucket"), bundle_task.c.prefix == sa.bindparam("prefix"), task_in_progress
)
_FROZEN = TypeAdapter(Overlay)
_ENDED = bundle_task.c.state.in_([sa.literal_column("'complete'"), sa.literal_column("'failed'")])
# By the index of the objects that are to be deleted, which are few; not by the tasks that have ended.
_LEFT_OVER = sa.and_(
    _ENDED,
    bundle_task.c.bundle_id.in_(sa.select(bundle_part.c.bundle_id).where(to_be_deleted, bundle_part.c.state != "gone")),
)
_LOOKED_AFTER = bundle_task.c.power_recovery_until.is_not(None)
_WANTED = sa.select(instance_power.c.wanted).where(instance_power.c.instance_id == bundle_task.c.instance_id)
# Whether a task's instance is to run in the end: as its owner has asked, else as it was before the task.
_TO_RUN = sa.func.coalesce(_WANTED.scalar_subquery() == WantedPower.RUNNING, bundle_task.c.was_running)
_IS_STANDBY = sa.func.pg_is_in_recovery()
# True of a task that goes forward: nothing has failed, nobody has cancelled it.
_UNDECIDED = bundle_task.c.error_code.is_(None)
_REPLACES = sa.and_(bundle_task.c.state == sa.literal_column("'complete'"), bundle_task.c.earlier.is_not(None))


class StoredPolicy(NamedTuple):
    """The caller's upload policy and its signature, as received."""

    upload_policy: str
    upload_policy_signature: str


class TaskRepository:
    """The bundle tasks in the database."""

    def __init__(self, engine: sa.Engine, vault: Vault, fence: Fence | None = None) -> None:
        """Work on `engine`; `vault` keeps the upload policies unreadable to whoever steals the database.

        A host's agent gives its `fence`.
        """
        self._engine = engine
        self._vault = vault
        self._fence = fence

    def of_run(self, bundle_id: str, run: int) -> "TaskRepository":
        """Return the records as one run of a task writes them: once another run has begun, it changes nothing."""
        return TaskRepository(self._engine, self._vault, self._fence and self._fence.of_run(bundle_id, run))

    def check_mine(self, bundle_id: str) -> None:
        """Check that this agent may work on the task. Ends as `Fence.claim` if not."""
        with self._owned(bundle_id):
            pass

    def add(self, connection: sa.Connection, bundle_id: str, host: str, request: BundleRequest) -> None:
        """Record a new, pending task.

        Raises:
            sqlalchemy.exc.IntegrityError: The instance, or the bucket and prefix, have one in progress.
        """
        grant = json.dumps([request.upload_policy, request.upload_policy_signature]).encode()
        row = {
            "bundle_id": bundle_id, "account_id": request.account_id, "owner_id": request.owner_id,
            "instance_id": request.instance_id, "host": host, "state": BundleTaskState.PENDING,
            "bucket": request.bucket, "prefix": request.prefix,
            "access_key_id": request.access_key_id, "made_bucket": request.made_bucket or None,
            "encrypted_policy": self._vault.seal(grant, context=bundle_id),
        }  # fmt: skip
        connection.execute(bundle_task.insert(), row)
        connection.execute(bundle_task_event.insert(), _event(bundle_id, BundleTaskState.PENDING))

    def get(self, bundle_id: str) -> BundleTask | None:
        """The task, or None if there is none of that id."""
        return next(iter(self._read(_BY_ID, bundle_id=bundle_id)), None)

    def get_with_age(self, bundle_id: str) -> tuple[BundleTask, timedelta] | None:
        """The task and the time since it has changed, by the database's clock; None if there is none of that id."""
        with self._engine.connect() as connection:
            row: Any = connection.execute(_WITH_AGE, {"bundle_id": bundle_id}).first()
        return None if row is None else (_task(row[:-1]), row.now - row.update_time)

    def now(self) -> datetime:
        """The time of the database's clock: all times of tasks are set by it."""
        with self._engine.connect() as connection:
            return connection.execute(sa.select(now())).scalar_one()

    def state(self, bundle_id: str) -> BundleTaskState | None:
        """The state of a task, or None if there is none of that id."""
        task = self.get(bundle_id)
        return None if task is None else task.state

    def find(self, *conditions: sa.ColumnElement[bool]) -> list[BundleTask]:
        """The tasks for which all conditions hold, the oldest first."""
        return self._read(_TASKS.where(*conditions))

    def latest(self, *conditions: sa.ColumnElement[bool], limit: int) -> list[BundleTask]:
        """Of the tasks for which all conditions hold the `limit` newest, the oldest of them first."""
        newest = _NEWEST.where(*conditions).limit(limit)
        return self._read(newest)[::-1]

    def number_in_progress(self, connection: sa.Connection, account_id: str) -> int:
        """How many unfinished tasks an account has; of several that have just added one, only one is told at a time."""
        connection.execute(sa.select(account.c.account_id).where(account.c.account_id == account_id).with_for_update())
        mine = sa.and_(bundle_task.c.account_id == account_id, task_in_progress)
        return connection.execute(sa.select(sa.func.count()).select_from(bundle_task).where(mine)).scalar_one()

    def in_progress(self, instance_id: str) -> BundleTask | None:
        """The unfinished task of an instance, if it has one."""
        return next(iter(self._read(_IN_PROGRESS, instance_id=instance_id)), None)

    def in_progress_at(self, bucket: str, prefix: str) -> BundleTask | None:
        """The unfinished task, of any account, whose bundle goes to a bucket and prefix."""
        return next(iter(self._read(_OF_PLACE, bucket=bucket, prefix=prefix)), None)

    def of_account(self, account_id: str, *, kept: timedelta) -> list[BundleTask]:
        """An account's tasks, the oldest first, but not those that ended longer than that ago."""
        return self._read(_OF_ACCOUNT, account_id=account_id, kept=kept.total_seconds())

    def move(self, bundle_id: str, state: BundleTaskState) -> bool:
        """Move a task on to `state` if the table allows it from where it is; say whether it is there now.

        Moving to the state that it has already is allowed and changes nothing: a step may be repeated. A task that is
        to be undone is not moved on.
        """
        change: dict[str, Any] = {"progress": 0} if state in WITH_PROGRESS else {}
        moved = self._move(bundle_id, before(state), _UNDECIDED, state=state, **change)
        return moved or bool(self.find(bundle_task.c.bundle_id == bundle_id, bundle_task.c.state == state, _UNDECIDED))

    def step_ended(self, bundle_id: str, step: Step) -> None:
        """Record that a step has ended: the following one comes next, unless the task is to be undone since."""
        self._update(bundle_id, bundle_task.c.next_step == step, next_step=following(step))

    def decide(self, bundle_id: str, failure: TaskFailure) -> None:
        """Record why a task fails, before anything is undone; from then on it is only undone.

        The first reason stays. A task whose bundle is complete in the bucket does not fail.
        """
        may_fail = sa.and_(task_in_progress, _UNDECIDED, bundle_task.c.next_step.in_([*MAY_FAIL]))
        reason = {"error_code": failure.code, "error_message": failure.message}
        self._update(bundle_id, may_fail, next_step=FIRST_OF_UNDO, **reason)

    def also(self, bundle_id: str, failure: TaskFailure) -> None:
        """Add to the message of a task that is undone what went wrong on the way."""
        words = f" ({failure})"
        known = bundle_task.c.error_message
        self._update(
            bundle_id,
            sa.and_(task_in_progress, ~known.contains(words, autoescape=True)),
            error_message=known + words,
        )

    def cancel(self, bundle_id: str) -> bool:
        """Have a task end as `failed` with `Client.Cancelled`; False if it is being cancelled already, or has ended.

        A task that nobody has begun ends at once; any other is `cancelling` until its host has put everything back.
        Once its manifest may have been sent, a task cannot be cancelled: an earlier bundle may be replaced by then.
        """
        cancelled = TaskCancelled()
        at_once = self.fail(bundle_id, cancelled, only_from=BundleTaskState.PENDING)
        unsent = sa.not_(bundle_task.c.manifest_sent)
        decision: dict[str, Any] = {
            "error_code": sa.func.coalesce(bundle_task.c.error_code, cancelled.code),
            "error_message": sa.func.coalesce(bundle_task.c.error_message, cancelled.message),
            "next_step": sa.case((_UNDECIDED, FIRST_OF_UNDO), else_=bundle_task.c.next_step),
        }
        return at_once or self._move(bundle_id, CANCELLABLE, unsent, state=BundleTaskState.CANCELLING, **decision)

    def send_manifest(self, bundle_id: str) -> bool:
        """Record that the manifest is about to be sent; False if the task was cancelled before."""
        is_storing = sa.and_(bundle_task.c.state == BundleTaskState.STORING, _UNDECIDED)
        return self._update(bundle_id, is_storing, manifest_sent=True)

    def has_sent_manifest(self, bundle_id: str) -> bool:
        """Whether the manifest may have been sent."""
        query = sa.select(bundle_task.c.manifest_sent).where(bundle_task.c.bundle_id == bundle_id)
        with self._engine.connect() as connection:
            return bool(connection.execute(query).scalar_one_or_none())

    def complete(self, bundle_id: str) -> bool:
        """Finish a task as `complete`, erasing what it had to keep secret; say whether it is complete now."""
        complete = BundleTaskState.COMPLETE
        done = self._move(bundle_id, before(complete), _UNDECIDED, state=complete, **_COMPLETED)
        return done or self.state(bundle_id) is complete

    def end_on_lost_host(self, connection: sa.Connection, bundle_id: str, failure: TaskFailure) -> bool:
        """Finish a task whose host is given up; say whether it failed.

        One whose bundle is complete in the bucket is complete, whatever its host had still to do.
        """
        stored = bundle_task.c.next_step.in_([*AFTER_STORED])
        complete = BundleTaskState.COMPLETE
        if self._move(bundle_id, before(complete), stored, state=complete, connection=connection, **_COMPLETED):
            connection.execute(bundle_task_event.insert(), _event(bundle_id, complete, failure.message))
            return False
        return self.fail(bundle_id, failure, connection=connection)

    def fail(
        self,
        bundle_id: str,
        failure: TaskFailure,
        *,
        only_from: BundleTaskState | None = None,
        connection: sa.Connection | None = None,
    ) -> bool:
        """Finish a task as `failed`, erasing what it had to keep secret; say whether this ended it.

        The reason that was recorded before, if one was, stays. With a `connection`, in its transaction.
        """
        needed = {
            name: sa.case((bundle_task.c.manifest_sent, bundle_task.c[name]), else_=sa.null())
            for name in (
                "documents",
                "earlier",
            )  # to tell whose manifest is in the bucket, and put the earlier one back
        }
        reason = {
            "error_code": sa.func.coalesce(bundle_task.c.error_code, failure.code),
            "error_message": sa.func.coalesce(bundle_task.c.error_message, failure.message),
            **_ERASED,
            **needed,
        }
        sources = frozenset({only_from}) if only_from else before(BundleTaskState.FAILED)
        may_fail = bundle_task.c.next_step.not_in([*AFTER_STORED])
        return self._move(bundle_id, sources, may_fail, state=BundleTaskState.FAILED, connection=connection, **reason)

    def advance(self, bundle_id: str, state: BundleTaskState, percent: int) -> None:
        """Raise the progress within `state` to `percent`; never lowers it, nor touches a task in another state."""
        forward = sa.and_(bundle_task.c.state == state, bundle_task.c.progress < percent)
        self._update(bundle_id, forward, progress=percent)

    def note_power_state(self, bundle_id: str, *, running: bool, version: int | None = None) -> bool:
        """Record, once, before the task touches it, whether the instance is to run in the end, and that it is borrowed.

        Args:
            bundle_id: The task.
            running: Whether it was seen running, or would run but for an earlier task. A request of its owner that has
                not been carried out says more.
            version: Of the instance's power record when it was looked at; None: as it is now.

        Returns:
            False if its owner has asked for something since it was looked at: look again.
        """
        with self._owned(bundle_id) as connection:
            new = sa.and_(bundle_task.c.bundle_id == bundle_id, bundle_task.c.was_running.is_(None))
            if connection.execute(bundle_task.update().where(new).values(was_running=running)).rowcount != 1:
                return True
            mine = bundle_task.c.bundle_id == bundle_id
            instance_id = connection.execute(sa.select(bundle_task.c.instance_id).where(mine)).scalar_one()
            in_the_end = power_records.borrow(connection, instance_id, bundle_id, running=running, version=version)
            if in_the_end is None:
                connection.rollback()
                return False
            if in_the_end is not running:
                connection.execute(bundle_task.update().where(mine).values(was_running=in_the_end))
        return True

    def power(self, instance_id: str) -> PowerRecord:
        """What is wanted of an instance's power, and which task has borrowed it."""
        with self._engine.connect() as connection:
            return power_records.read(connection, instance_id)

    def borrow(self, bundle_id: str, instance_id: str) -> bool:
        """Record that the task is about to switch off an instance that runs; say whether it is to run in the end."""
        with self._owned(bundle_id) as connection:
            return bool(power_records.borrow(connection, instance_id, bundle_id, running=True))

    def give_back(self, bundle_id: str, *, seen_off: str | None = None) -> None:
        """Record that the task's instance is as is wanted of it: what was borrowed is given back.

        Args:
            bundle_id: The task.
            seen_off: The instance, if it was seen off: as `note_seen_off`.
        """
        with self._owned(bundle_id) as connection:
            if seen_off is not None:
                connection.execute(_is_looked_after(seen_off).values(power_recovery_until=None))
            power_records.give_back(connection, bundle_id)

    def look_after(self, bundle_id: str, until: datetime | timedelta | None) -> None:
        """Have the task's instance looked after until then, or for so long; or no longer (None).

        To others the task does not change.
        """
        then = now(until.total_seconds()) if isinstance(until, timedelta) else until
        self._set(bundle_id, power_recovery_until=then)

    def leave_alone(self, instance_id: str) -> None:
        """Have nobody look after an instance any more, whatever task has had it: its owner wants it off."""
        with self._of_host() as connection:
            connection.execute(_is_looked_after(instance_id).values(power_recovery_until=None))
            power_records.want_off(connection, instance_id)

    def note_seen_off(self, instance_id: str) -> None:
        """Record that an instance was seen off: it hears no earlier request to power off any more."""
        with self._of_host() as connection:
            connection.execute(_is_looked_after(instance_id).values(power_recovery_until=None))
            power_records.note_seen_off(connection, instance_id)

    def is_looked_after(self, instance_id: str) -> bool:
        """Whether an earlier task has left the instance to be started when it powers off."""
        return bool(self.find(bundle_task.c.instance_id == instance_id, _LOOKED_AFTER, _TO_RUN))

    def looked_after(self, host: str) -> list[BundleTask]:
        """The tasks of a host whose instances are to be looked after."""
        return self.find(bundle_task.c.host == host, _LOOKED_AFTER)

    def looked_after_by_nobody(self, host: str) -> list[BundleTask]:
        """The tasks of other hosts whose instances are to be looked after, and are reported by this host now."""
        reported = sa.exists().where(instance.c.instance_id == bundle_task.c.instance_id, instance.c.host == host)
        return self.find(bundle_task.c.host != host, reported, _LOOKED_AFTER)

    def is_to_be_started(self, bundle_id: str) -> bool:
        """Whether the task's instance is to be started if it is off: by what is recorded at this moment."""
        return bool(self.find(bundle_task.c.bundle_id == bundle_id, _LOOKED_AFTER, _TO_RUN))

    def note_frozen(self, bundle_id: str, frozen: Overlay | None) -> None:
        """Record what the task freezes of its instance, before it does; or that it has been merged."""
        document = None if frozen is None else _FROZEN.dump_python(frozen, mode="json", by_alias=True)
        self._set(bundle_id, overlay=document)

    def frozen(self, bundle_id: str) -> Overlay | None:
        """What the task has frozen and not merged yet."""
        return next((frozen for _, frozen in self._frozen(bundle_task.c.bundle_id == bundle_id)), None)

    def frozen_of(self, instance_id: str) -> list[tuple[str, Overlay]]:
        """What tasks have frozen of an instance and not merged yet, with the tasks' ids, the oldest first."""
        return self._frozen(bundle_task.c.instance_id == instance_id)

    def unmerged(self, host: str) -> list[BundleTask]:
        """The ended tasks of a host whose overlays could not be merged."""
        return self.find(bundle_task.c.host == host, bundle_task.c.overlay.is_not(None), sa.not_(task_in_progress))

    def with_made_buckets(self, on_host: str) -> list[BundleTask]:
        """The failed tasks of a host, or of hosts that were given up, whose buckets may have to be removed."""
        there = sa.or_(bundle_task.c.host == on_host, hostless)
        failed = bundle_task.c.state == sa.literal_column("'failed'")
        return self.find(bundle_task.c.made_bucket.is_not(None), failed, there)

    def settle_bucket(self, bundle_id: str) -> None:
        """Record that nothing is to be done about the bucket any more that the task's request created."""
        self._set(bundle_id, made_bucket=None)

    def left_over(self, on_host: str | None = None) -> list[BundleTask]:
        """The tasks that have ended and still have objects to be removed from a bucket (`journal(…).unwanted()`).

        Args:
            on_host: Only those of this host, and of hosts that were given up.
        """
        there = sa.true() if on_host is None else sa.or_(bundle_task.c.host == on_host, hostless)
        return self.find(_LEFT_OVER, there)

    def to_clean_up(self, on_host: str) -> list[BundleTask]:
        """The tasks of `left_over`, and those of which a lost request may have stored a removed object again."""
        due = sa.or_(bundle_part.c.state != "gone", bundle_part.c.settle_time <= now())
        query = sa.select(bundle_part.c.bundle_id).distinct().where(to_be_deleted, due)
        with self._engine.connect() as connection:
            known = [*connection.execute(query).scalars()]
        # Not sorted: for the order SQLite would read every task there is.
        mine = sa.select(*_SHOWN).where(sa.or_(bundle_task.c.host == on_host, hostless))
        tasks = self._read(mine.where(_REPLACES))
        if others := {*known}.difference(task.bundle_id for task in tasks):
            tasks += self._read(mine.where(bundle_task.c.bundle_id.in_(others), _ENDED))
        return tasks

    def has_left_over(self, bundle_id: str) -> bool:
        """Whether a task that has ended still has something to be removed from its bucket."""
        return bool(self.find(bundle_task.c.bundle_id == bundle_id, sa.or_(_LEFT_OVER, _REPLACES)))

    def purge(self, kept: timedelta, *, most: int) -> int:
        """Forget tasks that ended longer ago and left nothing to do, `most` of them at the most; say how many.

        The keys of a complete bundle are free then: no other task has a row of them, so that none can delete them.
        A task with an object that is to be deleted, or that a lost request may reach, stays.
        """
        needed = sa.or_(to_be_deleted, bundle_part.c.settle_time > now())
        done = (
            bundle_task.c.power_recovery_until.is_(None),
            bundle_task.c.overlay.is_(None),
            sa.not_(sa.exists().where(bundle_part.c.bundle_id == bundle_task.c.bundle_id, needed)),
            sa.not_(_REPLACES),
        )
        old = sa.select(bundle_task.c.bundle_id).where(
            bundle_task.c.update_time < now(-kept.total_seconds()), sa.not_(task_in_progress), *done
        )
        with self._engine.begin() as connection:
            ids = [*connection.execute(old.limit(most).with_for_update(skip_locked=True)).scalars()]
            connection.execute(bundle_part.delete().where(bundle_part.c.bundle_id.in_(ids)))
            connection.execute(bundle_task.delete().where(bundle_task.c.bundle_id.in_(ids)))
        return len(ids)

    def grant(self, bundle_id: str) -> StoredPolicy:
        """The upload policy and signature of an unfinished task."""
        query = sa.select(bundle_task.c.encrypted_policy).where(bundle_task.c.bundle_id == bundle_id)
        with self._engine.connect() as connection:
            sealed = connection.execute(query).scalar_one()
        return StoredPolicy(*json.loads(self._vault.unseal(sealed, context=bundle_id)))

    def journal(self, bundle_id: str) -> UploadJournal:
        """The journal of a task: what it has stored, and where its sealing goes on."""
        return UploadJournal(self._engine, self._vault, bundle_id, self._fence)

    def tell(self, bundle_id: str, message: str) -> None:
        """Write down that something happened to a task, beside its changes of state."""
        state = sa.select(bundle_task.c.state).where(bundle_task.c.bundle_id == bundle_id)
        with self._owned(bundle_id) as connection:
            now = connection.execute(state).scalar_one()
            connection.execute(bundle_task_event.insert(), _event(bundle_id, now, message))

    def notice(self, bundle_id: str, notice: str) -> None:
        """Add a warning for a task's owner, and to the events; of the host's files it has the bare names."""
        notice = without_folders(notice)
        columns = sa.select(bundle_task.c.warning, bundle_task.c.state).where(bundle_task.c.bundle_id == bundle_id)
        with self._owned(bundle_id) as connection:
            row = connection.execute(columns.with_for_update()).one_or_none()
            if row is None or notice in (row.warning or ""):
                return
            self._updated(connection, bundle_id, sa.true(), warning=f"{row.warning or ''} {notice}".strip())
            connection.execute(bundle_task_event.insert(), _event(bundle_id, BundleTaskState(row.state), notice))

    def note_volume_size(self, bundle_id: str, size: int) -> None:
        """Record how many bytes the root volume has."""
        self._update(bundle_id, sa.true(), volume_size=size)

    def take_up(self, bundle_id: str) -> int | None:
        """Begin another run of a task, which replaces any earlier one; give its number, None if the task has ended."""
        attempts = sa.select(bundle_task.c.attempts).where(bundle_task.c.bundle_id == bundle_id)
        with self._engine.begin() as connection:
            if not self._updated(connection, bundle_id, task_in_progress, attempts=bundle_task.c.attempts + 1):
                return None
            run: int = connection.execute(attempts).scalar_one()
            return run

    def holds_lease(self) -> bool:
        """Whether the database still gives this process its host. It is only read, which a full disk allows.

        A standby may be behind the server that has given the host to another: its answer is no proof.
        """
        if self._fence is None:
            return True
        with self._engine.connect() as connection:
            if connection.dialect.name == "postgresql" and connection.execute(sa.select(_IS_STANDBY)).scalar_one():
                return False
            return connection.execute(sa.select(sa.exists().where(self._fence.holds))).scalar_one()

    def history(self, bundle_id: str) -> list[TaskEvent]:
        """What happened to a task, the oldest first."""
        query = sa.select(bundle_task_event.c.time, bundle_task_event.c.state, bundle_task_event.c.message)
        mine = query.where(bundle_task_event.c.bundle_id == bundle_id).order_by(bundle_task_event.c.event_id)
        with self._engine.connect() as connection:
            rows = connection.execute(mine)
            return [TaskEvent(row.time, BundleTaskState(row.state), row.message) for row in rows]

    @contextmanager
    def _owned(self, bundle_id: str) -> Iterator[sa.Connection]:
        """A transaction of whoever may write the task; an agent ends as `Fence.claim` if it may not."""
        with self._engine.begin() as connection:
            if self._fence is not None:
                self._fence.claim(connection, bundle_id)
            yield connection

    @contextmanager
    def _of_host(self) -> Iterator[sa.Connection]:
        """A transaction on what concerns several tasks; an agent ends, and a run that was replaced writes nothing."""
        with self._engine.begin() as connection:
            if self._fence is not None:
                self._fence.claim_host(connection)
            yield connection

    def _read(self, query: sa.Select[tuple[object, ...]], **parameters: object) -> list[BundleTask]:
        with self._engine.connect() as connection:
            return [_task(row) for row in connection.execute(query, parameters)]

    def _frozen(self, condition: sa.ColumnElement[bool]) -> list[tuple[str, Overlay]]:
        there = sa.and_(bundle_task.c.overlay.is_not(None), condition)
        query = (
            sa.select(bundle_task.c.bundle_id, bundle_task.c.overlay).where(there).order_by(bundle_task.c.start_time)
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [(row.bundle_id, _FROZEN.validate_python(row.overlay)) for row in rows]

    def _move(
        self,
        bundle_id: str,
        sources: frozenset[BundleTaskState],
        *conditions: sa.ColumnElement[bool],
        state: BundleTaskState,
        connection: sa.Connection | None = None,
        **values: object,
    ) -> bool:
        if state in FINISHED:  # what the task has not put back is left to the caretaker, in the same transaction
            borrowed = sa.exists().where(instance_power.c.borrowed_by == bundle_id)
            until = sa.func.coalesce(bundle_task.c.power_recovery_until, now(RECOVER_FOR.total_seconds()))
            values["power_recovery_until"] = sa.case((borrowed, until), else_=bundle_task.c.power_recovery_until)
        with self._engine.begin() if connection is None else nullcontext(connection) as transaction:
            from_there = sa.and_(bundle_task.c.state.in_([*sources]), *conditions)
            moved = self._updated(transaction, bundle_id, from_there, state=state, **values)
            if moved:
                transaction.execute(bundle_task_event.insert(), _event(bundle_id, state))
            if moved and state is BundleTaskState.FAILED:
                claims.renounce(transaction, bundle_id)
        return moved

    def _set(self, bundle_id: str, **values: object) -> None:
        """Change what is no part of a task as others see it; an agent only while it may."""
        with self._engine.begin() as connection:
            permits = bundle_task.c.bundle_id == bundle_id if self._fence is None else self._fence.permits(bundle_id)
            changed = connection.execute(bundle_task.update().where(permits).values(**values)).rowcount
            if changed != 1 and self._fence is not None:
                self._fence.refused(connection, bundle_id)

    def _update(self, bundle_id: str, condition: sa.ColumnElement[bool], **values: object) -> bool:
        with self._engine.begin() as connection:
            return self._updated(connection, bundle_id, condition, **values)

    def _updated(
        self, connection: sa.Connection, bundle_id: str, condition: sa.ColumnElement[bool], **values: object
    ) -> bool:
        """Change a task for which the condition holds, and say whether it did; an agent only while it may."""
        permits = sa.true() if self._fence is None else self._fence.permits(bundle_id)
        statement = bundle_task.update().where(bundle_task.c.bundle_id == bundle_id, condition, permits)
        if connection.execute(statement.values(update_time=now(), **values)).rowcount == 1:
            return True
        if self._fence is not None:
            self._fence.claim(connection, bundle_id)  # the condition did not hold, or the right is lost
        return False


def _is_looked_after(instance_id: str) -> sa.Update:
    return bundle_task.update().where(
        bundle_task.c.instance_id == instance_id, bundle_task.c.power_recovery_until.is_not(None)
    )


def _event(bundle_id: str, state: BundleTaskState, message: str | None = None) -> dict[str, object]:
    return {"bundle_id": bundle_id, "state": state, "message": message}


def _task(row: sa.Row[tuple[object, ...]]) -> BundleTask:
    values: dict[str, Any] = dict(zip(_NAMES, row, strict=True))
    return BundleTask(**{**values, "state": BundleTaskState(values["state"]), "next_step": Step(values["next_step"])})
