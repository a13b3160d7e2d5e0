"""The rows of bundle tasks: typed reads and state changes.

Every change of state is one statement that applies the table in `models.py`: of two writers (the task's host, and a
caller who cancels) only one succeeds. An agent's repository has the agent's right to write in every condition
(`lease.py`). The objects of a task are in `journal.py`; what happens next is decided in `workflow.py`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa
import structlog
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
from thrave.log_events import log_event
from thrave.tasks import claims
from thrave.tasks.errors import ERROR_CODES, TaskCancelled, TaskFailure, without_folders
from thrave.tasks.journal import UploadJournal
from thrave.tasks.lease import HostLease, hostless
from thrave.tasks.models import (
    ALLOWED_FROM,
    CANCELLABLE,
    FINISHED,
    FIRST_UNDO_STEP,
    STEP_TRANSITIONS,
    STEPS_AFTER_STORED,
    STEPS_UNTIL_STORED,
    WITH_PROGRESS,
    BundleRequest,
    BundleTask,
    BundleTaskState,
    Step,
    TaskEvent,
)
from thrave.vault import Vault

RECOVER_FOR = timedelta(days=1)
"""How long the agent retries to start an instance that its task could not start."""

# Columns that are erased when a task ends, and columns that are not in `BundleTask`.
_ERASED = dict.fromkeys(("encrypted_policy", "encrypted_bundle_key", "checkpoint", "documents"))
_COMPLETED: dict[str, Any] = {"progress": 100, "created_bucket": None, **_ERASED}
_HIDDEN = {*_ERASED, "overlay", "part_series", "earlier", "manifest_sent", "off_since", "downtime"}

# Built once: building a query takes SQLAlchemy longer than running it takes SQLite.
_COLUMNS = [column for column in bundle_task.c if column.name not in _HIDDEN]
_NAMES = [column.name for column in _COLUMNS]
_BY_ID = sa.select(*_COLUMNS).where(bundle_task.c.bundle_id == sa.bindparam("bundle_id"))
_TASKS = sa.select(*_COLUMNS).order_by(bundle_task.c.start_time, bundle_task.c.bundle_id)
_NEWEST = sa.select(*_COLUMNS).order_by(bundle_task.c.start_time.desc(), bundle_task.c.bundle_id.desc())
_WITH_AGE = sa.select(*_COLUMNS, now().label("now")).where(bundle_task.c.bundle_id == sa.bindparam("bundle_id"))
_IN_PROGRESS = _TASKS.where(bundle_task.c.instance_id == sa.bindparam("instance_id"), task_in_progress)
_OF_ACCOUNT = _TASKS.where(
    bundle_task.c.account_id == sa.bindparam("account_id"),
    sa.or_(task_in_progress, bundle_task.c.update_time > now(-sa.bindparam("kept", type_=sa.Float))),
)
_AT_LOCATION = _TASKS.where(
    bundle_task.c.bucket == sa.bindparam("bucket"), bundle_task.c.prefix == sa.bindparam("prefix"), task_in_progress
)
_OVERLAY = TypeAdapter(Overlay)
_ENDED = bundle_task.c.state.in_([sa.literal_column("'complete'"), sa.literal_column("'failed'")])
# Uses the index of objects to delete, which are few, instead of reading every ended task.
_WITH_ORPHANS = sa.and_(
    _ENDED,
    bundle_task.c.bundle_id.in_(sa.select(bundle_part.c.bundle_id).where(to_be_deleted, bundle_part.c.state != "gone")),
)
_NEEDS_POWER_RECOVERY = bundle_task.c.power_recovery_until.is_not(None)
_WANTED = sa.select(instance_power.c.wanted).where(instance_power.c.instance_id == bundle_task.c.instance_id)
# Whether the instance must run after the task: as its owner has requested, else as before the task.
_MUST_RUN = sa.func.coalesce(_WANTED.scalar_subquery() == WantedPower.RUNNING, bundle_task.c.run_after_task)
_IS_STANDBY = sa.func.pg_is_in_recovery()
# The task has not failed and was not cancelled.
_GOES_FORWARD = bundle_task.c.error_code.is_(None)
_REPLACES = sa.and_(bundle_task.c.state == sa.literal_column("'complete'"), bundle_task.c.earlier.is_not(None))


log = structlog.get_logger()


class StoredPolicy(NamedTuple):
    """The caller's upload policy and its signature, as received."""

    upload_policy: str
    upload_policy_signature: str


class TaskSummary(NamedTuple):
    """What a task has done, for the log."""

    seconds: float
    """Since the request, by the database's clock."""
    stored_bytes: int
    """Size of the bundle's objects that are stored."""
    downtime: float | None
    """Seconds for which the instance was off for the task; None: it never was."""


class TaskRepository:
    """The bundle tasks in the database."""

    def __init__(self, engine: sa.Engine, vault: Vault, lease: HostLease | None = None) -> None:
        """Use the database of `engine`.

        Args:
            engine: Of the database.
            vault: Encrypts upload policies and keys, so that a stolen database does not reveal them.
            lease: The right of a host's agent to write; None for other processes.
        """
        self._engine = engine
        self._vault = vault
        self._lease = lease

    # Reads

    def get(self, bundle_id: str) -> BundleTask | None:
        """Return a task; None if there is none with this id."""
        return next(iter(self._read(_BY_ID, bundle_id=bundle_id)), None)

    def get_with_age(self, bundle_id: str) -> tuple[BundleTask, timedelta] | None:
        """Return a task and the time since its last change, by the database's clock; None if there is none."""
        with self._engine.connect() as connection:
            row: Any = connection.execute(_WITH_AGE, {"bundle_id": bundle_id}).first()
        return None if row is None else (_task(row[:-1]), row.now - row.update_time)

    def state(self, bundle_id: str) -> BundleTaskState | None:
        """Return the state of a task; None if there is none with this id."""
        task = self.get(bundle_id)
        return None if task is None else task.state

    def now(self) -> datetime:
        """Return the time of the database's clock, which sets all times of tasks."""
        with self._engine.connect() as connection:
            return connection.execute(sa.select(now())).scalar_one()

    def find(self, *conditions: sa.ColumnElement[bool]) -> list[BundleTask]:
        """Return the tasks that meet all conditions, the oldest first."""
        return self._read(_TASKS.where(*conditions))

    def latest(self, *conditions: sa.ColumnElement[bool], limit: int) -> list[BundleTask]:
        """Return the `limit` newest tasks that meet all conditions, the oldest of them first."""
        newest = _NEWEST.where(*conditions).limit(limit)
        return self._read(newest)[::-1]

    def count_in_progress(self, connection: sa.Connection, account_id: str) -> int:
        """Return how many unfinished tasks an account has. Locks the account, so parallel requests count in turn."""
        connection.execute(sa.select(account.c.account_id).where(account.c.account_id == account_id).with_for_update())
        mine = sa.and_(bundle_task.c.account_id == account_id, task_in_progress)
        return connection.execute(sa.select(sa.func.count()).select_from(bundle_task).where(mine)).scalar_one()

    def in_progress(self, instance_id: str) -> BundleTask | None:
        """Return the unfinished task of an instance, if it has one."""
        return next(iter(self._read(_IN_PROGRESS, instance_id=instance_id)), None)

    def in_progress_at(self, bucket: str, prefix: str) -> BundleTask | None:
        """Return the unfinished task, of any account, for a bucket and prefix."""
        return next(iter(self._read(_AT_LOCATION, bucket=bucket, prefix=prefix)), None)

    def of_account(self, account_id: str, *, kept: timedelta) -> list[BundleTask]:
        """Return an account's tasks, the oldest first, without those that ended more than `kept` ago."""
        return self._read(_OF_ACCOUNT, account_id=account_id, kept=kept.total_seconds())

    def history(self, bundle_id: str) -> list[TaskEvent]:
        """Return the events of a task, the oldest first."""
        query = sa.select(bundle_task_event.c.time, bundle_task_event.c.state, bundle_task_event.c.message)
        mine = query.where(bundle_task_event.c.bundle_id == bundle_id).order_by(bundle_task_event.c.event_id)
        with self._engine.connect() as connection:
            rows = connection.execute(mine)
            return [TaskEvent(row.time, BundleTaskState(row.state), row.message) for row in rows]

    def summary(self, bundle_id: str) -> TaskSummary | None:
        """Return what a task has done so far; None if there is none with this id."""
        stored = sa.select(sa.func.coalesce(sa.func.sum(bundle_part.c.size), 0)).where(
            bundle_part.c.bundle_id == bundle_id, bundle_part.c.state == "sent"
        )
        query = sa.select(
            bundle_task.c.start_time,
            bundle_task.c.off_since,
            bundle_task.c.downtime,
            now().label("now"),
            stored.scalar_subquery().label("stored_bytes"),
        ).where(bundle_task.c.bundle_id == bundle_id)
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        downtime = _downtime(row.downtime, row.off_since, row.now)
        return TaskSummary((row.now - row.start_time).total_seconds(), int(row.stored_bytes), downtime)

    def stored_policy(self, bundle_id: str) -> StoredPolicy:
        """Return the upload policy and signature of an unfinished task."""
        query = sa.select(bundle_task.c.encrypted_policy).where(bundle_task.c.bundle_id == bundle_id)
        with self._engine.connect() as connection:
            encrypted = connection.execute(query).scalar_one()
        return StoredPolicy(*json.loads(self._vault.decrypt(encrypted, context=bundle_id)))

    def journal(self, bundle_id: str) -> UploadJournal:
        """Return the journal of a task's uploads."""
        return UploadJournal(self._engine, self._vault, bundle_id, self._lease)

    # State changes

    def add(self, connection: sa.Connection, bundle_id: str, host: str, request: BundleRequest) -> None:
        """Add a pending task.

        Raises:
            sqlalchemy.exc.IntegrityError: The instance, or the bucket and prefix, have one in progress.
        """
        policy = json.dumps([request.upload_policy, request.upload_policy_signature]).encode()
        row = {
            "bundle_id": bundle_id, "account_id": request.account_id, "owner_id": request.owner_id,
            "instance_id": request.instance_id, "host": host, "state": BundleTaskState.PENDING,
            "bucket": request.bucket, "prefix": request.prefix,
            "access_key_id": request.access_key_id, "created_bucket": request.created_bucket or None,
            "encrypted_policy": self._vault.encrypt(policy, context=bundle_id),
        }  # fmt: skip
        connection.execute(bundle_task.insert(), row)
        connection.execute(bundle_task_event.insert(), _event(bundle_id, BundleTaskState.PENDING))

    def start_run(self, bundle_id: str) -> int | None:
        """Record another run of a task, which replaces earlier ones; return its number, None if the task has ended."""
        runs = sa.select(bundle_task.c.runs).where(bundle_task.c.bundle_id == bundle_id)
        with self._engine.begin() as connection:
            if not self._update_in(connection, bundle_id, task_in_progress, runs=bundle_task.c.runs + 1):
                return None
            run_number: int = connection.execute(runs).scalar_one()
            return run_number

    def change_state(self, bundle_id: str, state: BundleTaskState) -> bool:
        """Change the state of a task if the table allows it; return whether the task is in `state` now.

        A change to the state that the task already has is allowed and does nothing: a step may be repeated. The state
        of a task that has failed or was cancelled does not change.
        """
        change: dict[str, Any] = {"progress": 0} if state in WITH_PROGRESS else {}
        changed = self._change_state(bundle_id, ALLOWED_FROM[state], _GOES_FORWARD, state=state, **change)
        return changed or bool(
            self.find(bundle_task.c.bundle_id == bundle_id, bundle_task.c.state == state, _GOES_FORWARD)
        )

    def finish_step(self, bundle_id: str, step: Step) -> None:
        """Make the following step the next one, unless the task has failed or was cancelled in the meantime."""
        self._update(bundle_id, bundle_task.c.next_step == step, next_step=STEP_TRANSITIONS[step])

    def start_undo(self, bundle_id: str, failure: TaskFailure) -> None:
        """Record why a task fails, and make the first undo step the next one.

        Keeps the first reason. Does nothing if the bundle is complete in the bucket.
        """
        may_fail = sa.and_(task_in_progress, _GOES_FORWARD, bundle_task.c.next_step.in_([*STEPS_UNTIL_STORED]))
        reason = {"error_code": failure.code, "error_message": failure.message}
        self._update(bundle_id, may_fail, next_step=FIRST_UNDO_STEP, **reason)

    def append_failure(self, bundle_id: str, failure: TaskFailure) -> None:
        """Add the failure of an undo step to the error message of the task."""
        addition = f" ({failure})"
        message = bundle_task.c.error_message
        self._update(
            bundle_id,
            sa.and_(task_in_progress, ~message.contains(addition, autoescape=True)),
            error_message=message + addition,
        )

    def cancel(self, bundle_id: str) -> bool:
        """Cancel a task; False if it was cancelled before, or cannot be cancelled.

        A pending task ends at once as `failed` with `Client.Cancelled`. Any other task is `cancelling` until its host
        has undone it. Once its manifest may have been sent, a task cannot be cancelled: an earlier bundle may be
        replaced by then.
        """
        cancelled = TaskCancelled()
        at_once = self.fail(bundle_id, cancelled, only_from=BundleTaskState.PENDING)
        unsent = sa.not_(bundle_task.c.manifest_sent)
        decision: dict[str, Any] = {
            "error_code": sa.func.coalesce(bundle_task.c.error_code, cancelled.code),
            "error_message": sa.func.coalesce(bundle_task.c.error_message, cancelled.message),
            "next_step": sa.case((_GOES_FORWARD, FIRST_UNDO_STEP), else_=bundle_task.c.next_step),
        }
        return at_once or self._change_state(
            bundle_id, CANCELLABLE, unsent, state=BundleTaskState.CANCELLING, **decision
        )

    def record_manifest_sent(self, bundle_id: str) -> bool:
        """Record that the manifest may be sent from now on; False if the task was cancelled before."""
        is_storing = sa.and_(bundle_task.c.state == BundleTaskState.STORING, _GOES_FORWARD)
        return self._update(bundle_id, is_storing, manifest_sent=True)

    def complete(self, bundle_id: str) -> bool:
        """End a task as `complete`, and erase its secrets; return whether it is complete now."""
        complete = BundleTaskState.COMPLETE
        # No condition on `next_step`: only the step `complete` calls this, and the right to write (`HostLease.for_run`)
        # refuses earlier runs. `end_on_lost_host` may run at any step, so it has that condition.
        done = self._change_state(bundle_id, ALLOWED_FROM[complete], _GOES_FORWARD, state=complete, **_COMPLETED)
        return done or self.state(bundle_id) is complete

    def end_on_lost_host(self, connection: sa.Connection, bundle_id: str, failure: TaskFailure) -> bool:
        """End a task whose host was retired; return whether it failed.

        If its bundle is complete in the bucket, the task is complete.
        """
        stored = bundle_task.c.next_step.in_([*STEPS_AFTER_STORED])
        complete = BundleTaskState.COMPLETE
        if self._change_state(
            bundle_id, ALLOWED_FROM[complete], stored, state=complete, connection=connection, **_COMPLETED
        ):
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
        """End a task as `failed`, and erase its secrets; return whether this call has ended it.

        Keeps a reason that was recorded before.

        Args:
            bundle_id: The task.
            failure: The reason.
            only_from: End it only if it is in this state.
            connection: Use its transaction.
        """
        # Cleanup needs both if the manifest was sent: to recognize it in the bucket, and to restore the earlier one.
        needed = {
            name: sa.case((bundle_task.c.manifest_sent, bundle_task.c[name]), else_=sa.null())
            for name in ("documents", "earlier")
        }
        reason = {
            "error_code": sa.func.coalesce(bundle_task.c.error_code, failure.code),
            "error_message": sa.func.coalesce(bundle_task.c.error_message, failure.message),
            **_ERASED,
            **needed,
        }
        sources = frozenset({only_from}) if only_from else ALLOWED_FROM[BundleTaskState.FAILED]
        may_fail = bundle_task.c.next_step.not_in([*STEPS_AFTER_STORED])
        return self._change_state(
            bundle_id, sources, may_fail, state=BundleTaskState.FAILED, connection=connection, **reason
        )

    # Progress, events and warnings

    def set_progress(self, bundle_id: str, state: BundleTaskState, percent: int) -> None:
        """Raise the progress of a task in `state`; never lowers it. A task in another state does not change."""
        forward = sa.and_(bundle_task.c.state == state, bundle_task.c.progress < percent)
        self._update(bundle_id, forward, progress=percent)

    def set_volume_size(self, bundle_id: str, size: int) -> None:
        """Record the size of the root volume in bytes."""
        self._update(bundle_id, sa.true(), volume_size=size)

    def add_event(self, bundle_id: str, message: str) -> None:
        """Add an event that is no change of state."""
        query = sa.select(bundle_task.c.state).where(bundle_task.c.bundle_id == bundle_id)
        with self._task_transaction(bundle_id) as connection:
            state = connection.execute(query).scalar_one()
            connection.execute(bundle_task_event.insert(), _event(bundle_id, state, message))

    def add_warning(self, bundle_id: str, warning: str) -> None:
        """Add a warning for the task's owner, and an event. Folders of the host's files are removed from the text."""
        warning = without_folders(warning)
        columns = sa.select(bundle_task.c.warning, bundle_task.c.state).where(bundle_task.c.bundle_id == bundle_id)
        with self._task_transaction(bundle_id) as connection:
            row = connection.execute(columns.with_for_update()).one_or_none()
            if row is None or warning in (row.warning or ""):
                return
            self._update_in(connection, bundle_id, sa.true(), warning=f"{row.warning or ''} {warning}".strip())
            connection.execute(bundle_task_event.insert(), _event(bundle_id, BundleTaskState(row.state), warning))

    # Power of the instance

    def record_power_state(self, bundle_id: str, *, running: bool, version: int | None = None) -> bool:
        """Record once whether the instance is to run after the task, and that the task has borrowed it.

        Args:
            bundle_id: The task.
            running: Whether it was running, or would run but for an earlier task. A request of its owner that was not
                carried out yet takes precedence.
            version: Version of the instance's power record when `running` was read; None: the current one.

        Returns:
            False if its owner has made a request since then: read the state again.
        """
        with self._task_transaction(bundle_id) as connection:
            new = sa.and_(bundle_task.c.bundle_id == bundle_id, bundle_task.c.run_after_task.is_(None))
            if connection.execute(bundle_task.update().where(new).values(run_after_task=running)).rowcount != 1:
                return True
            mine = bundle_task.c.bundle_id == bundle_id
            instance_id = connection.execute(sa.select(bundle_task.c.instance_id).where(mine)).scalar_one()
            in_the_end = power_records.borrow(connection, instance_id, bundle_id, running=running, version=version)
            if in_the_end is None:
                connection.rollback()
                return False
            if in_the_end is not running:
                connection.execute(bundle_task.update().where(mine).values(run_after_task=in_the_end))
        return True

    def power_record(self, instance_id: str) -> PowerRecord:
        """Return which power state the owner wants, and which task has borrowed the instance."""
        with self._engine.connect() as connection:
            return power_records.read_record(connection, instance_id)

    def borrow(self, bundle_id: str, instance_id: str) -> bool:
        """Record that the task is about to shut down a running instance; return whether it is to run after the task."""
        with self._task_transaction(bundle_id) as connection:
            return bool(power_records.borrow(connection, instance_id, bundle_id, running=True))

    def give_back(self, bundle_id: str, *, seen_off: str | None = None) -> None:
        """Record that the task's instance has the wanted power state, and is no longer borrowed.

        Args:
            bundle_id: The task.
            seen_off: The instance, if it was off: as `record_seen_off`.
        """
        with self._task_transaction(bundle_id) as connection:
            if seen_off is not None:
                connection.execute(_end_power_recovery(seen_off))
            power_records.give_back(connection, bundle_id)
            downtime = _end_downtime(connection, bundle_id)
        if downtime is not None:
            log_event("instance returned", bundle_id=bundle_id, downtime=round(downtime, 1))

    def record_seen_off(self, instance_id: str) -> None:
        """Record that an instance was off: earlier shutdown requests have no further effect.

        The downtime of the task that has borrowed it begins, unless it has begun.
        """
        with self._host_transaction() as connection:
            connection.execute(_end_power_recovery(instance_id))
            power_records.record_off(connection, instance_id)
            borrower = sa.select(instance_power.c.borrowed_by).where(instance_power.c.instance_id == instance_id)
            begun = bundle_task.update().where(
                bundle_task.c.bundle_id == borrower.scalar_subquery(), bundle_task.c.off_since.is_(None)
            )
            borrowed_by = connection.execute(
                begun.values(off_since=now()).returning(bundle_task.c.bundle_id)
            ).scalar_one_or_none()
        if borrowed_by is not None:
            log_event("instance off", bundle_id=borrowed_by, instance_id=instance_id)

    def schedule_power_recovery(self, bundle_id: str, until: datetime | timedelta | None) -> None:
        """Let power recovery check the task's instance until a time or for a duration; None: no longer.

        Does not change the task's update time.
        """
        end = now(until.total_seconds()) if isinstance(until, timedelta) else until
        self._set_values(bundle_id, power_recovery_until=end)

    def has_power_recovery(self, instance_id: str) -> bool:
        """Whether power recovery is to start the instance once it powers off."""
        return bool(self.find(bundle_task.c.instance_id == instance_id, _NEEDS_POWER_RECOVERY, _MUST_RUN))

    def power_recoveries(self, host: str) -> list[BundleTask]:
        """Return the tasks of a host whose instances need power recovery."""
        return self.find(bundle_task.c.host == host, _NEEDS_POWER_RECOVERY)

    def moved_power_recoveries(self, host: str) -> list[BundleTask]:
        """Return the tasks of other hosts whose instances need power recovery and are reported by this host now."""
        reported = sa.exists().where(instance.c.instance_id == bundle_task.c.instance_id, instance.c.host == host)
        return self.find(bundle_task.c.host != host, reported, _NEEDS_POWER_RECOVERY)

    def should_start(self, bundle_id: str) -> bool:
        """Whether power recovery is to start the task's instance if it is off, by the current record."""
        return bool(self.find(bundle_task.c.bundle_id == bundle_id, _NEEDS_POWER_RECOVERY, _MUST_RUN))

    # Overlays

    def record_overlay(self, bundle_id: str, overlay: Overlay | None) -> None:
        """Record an overlay before the task creates it; None: it was merged."""
        document = None if overlay is None else _OVERLAY.dump_python(overlay, mode="json", by_alias=True)
        self._set_values(bundle_id, overlay=document)

    def overlay(self, bundle_id: str) -> Overlay | None:
        """Return the task's overlay if it was not merged yet."""
        return next((overlay for _, overlay in self._overlays(bundle_task.c.bundle_id == bundle_id)), None)

    def overlays_of(self, instance_id: str) -> list[tuple[str, Overlay]]:
        """Return the overlays of an instance that were not merged yet, with their tasks' ids, the oldest first."""
        return self._overlays(bundle_task.c.instance_id == instance_id)

    def unmerged_overlays(self, host: str) -> list[BundleTask]:
        """Return the ended tasks of a host whose overlays could not be merged."""
        return self.find(bundle_task.c.host == host, bundle_task.c.overlay.is_not(None), sa.not_(task_in_progress))

    # Cleanup and retention

    def with_created_buckets(self, on_host: str) -> list[BundleTask]:
        """Return the failed tasks of a host, and of retired hosts, whose created buckets may have to be removed."""
        there = sa.or_(bundle_task.c.host == on_host, hostless)
        failed = bundle_task.c.state == sa.literal_column("'failed'")
        return self.find(bundle_task.c.created_bucket.is_not(None), failed, there)

    def clear_created_bucket(self, bundle_id: str) -> None:
        """Record that the bucket which the task's request created needs no removal any more."""
        self._set_values(bundle_id, created_bucket=None)

    def with_orphans(self, on_host: str | None = None) -> list[BundleTask]:
        """Return the ended tasks with objects to delete from a bucket (`journal(…).orphaned_objects()`).

        Args:
            on_host: Only tasks of this host and of retired hosts.
        """
        there = sa.true() if on_host is None else sa.or_(bundle_task.c.host == on_host, hostless)
        return self.find(_WITH_ORPHANS, there)

    def has_orphans(self, bundle_id: str) -> bool:
        """Whether an ended task has objects to delete from its bucket."""
        return bool(self.find(bundle_task.c.bundle_id == bundle_id, sa.or_(_WITH_ORPHANS, _REPLACES)))

    def has_cleanups(self, bucket: str) -> bool:
        """Whether a bucket has objects of any task that cleanup is to delete, or that may still arrive."""
        there = sa.select(sa.exists().where(bundle_part.c.bucket == bucket, to_be_deleted))
        with self._engine.connect() as connection:
            return bool(connection.execute(there).scalar())

    def cleanups(self, on_host: str) -> list[BundleTask]:
        """Return the tasks of `with_orphans`, and those where a lost request may have stored a deleted object again."""
        due = sa.or_(bundle_part.c.state != "gone", bundle_part.c.settle_time <= now())
        query = sa.select(bundle_part.c.bundle_id).distinct().where(to_be_deleted, due)
        with self._engine.connect() as connection:
            with_objects = {*connection.execute(query).scalars()}
        # Not sorted: to sort them, SQLite would read every task.
        of_host = sa.select(*_COLUMNS).where(sa.or_(bundle_task.c.host == on_host, hostless))
        tasks = self._read(of_host.where(_REPLACES))
        if others := with_objects.difference(task.bundle_id for task in tasks):
            tasks += self._read(of_host.where(bundle_task.c.bundle_id.in_(others), _ENDED))
        return tasks

    def delete_ended(self, keep: timedelta, *, limit: int) -> int:
        """Delete at most `limit` tasks that ended more than `keep` ago; return how many.

        Deleting the rows of a complete bundle releases its keys: no other task has a row of them, so none can delete
        its objects. A task stays while its overlay, its instance's power or one of its objects needs work, or while a
        lost request may reach one of its objects.
        """
        needed = sa.or_(to_be_deleted, bundle_part.c.settle_time > now())
        done = (
            bundle_task.c.power_recovery_until.is_(None),
            bundle_task.c.overlay.is_(None),
            sa.not_(sa.exists().where(bundle_part.c.bundle_id == bundle_task.c.bundle_id, needed)),
            sa.not_(_REPLACES),
        )
        old = sa.select(bundle_task.c.bundle_id).where(
            bundle_task.c.update_time < now(-keep.total_seconds()), sa.not_(task_in_progress), *done
        )
        with self._engine.begin() as connection:
            ids = [*connection.execute(old.limit(limit).with_for_update(skip_locked=True)).scalars()]
            connection.execute(bundle_part.delete().where(bundle_part.c.bundle_id.in_(ids)))
            connection.execute(bundle_task.delete().where(bundle_task.c.bundle_id.in_(ids)))
        return len(ids)

    # Lease and transactions

    def for_run(self, bundle_id: str, run: int) -> "TaskRepository":
        """Return a repository for one run of a task, which writes nothing once a later run has started."""
        return TaskRepository(self._engine, self._vault, self._lease and self._lease.for_run(bundle_id, run))

    def require_lease(self, bundle_id: str) -> None:
        """Check that this agent may work on the task. Raises, or ends the process, as `HostLease.lock_task`."""
        with self._task_transaction(bundle_id):
            pass

    def holds_lease(self) -> bool:
        """Whether this process has the lease of its host, by the database. Only reads, which a full disk allows.

        A PostgreSQL standby may be behind its primary: its answer proves nothing.
        """
        if self._lease is None:
            return True
        with self._engine.connect() as connection:
            if connection.dialect.name == "postgresql" and connection.execute(sa.select(_IS_STANDBY)).scalar_one():
                return False
            return connection.execute(sa.select(sa.exists().where(self._lease.is_held))).scalar_one()

    @contextmanager
    def _task_transaction(self, bundle_id: str) -> Iterator[sa.Connection]:
        """A transaction that may write the task. Raises, or ends the process, as `HostLease.lock_task`."""
        with self._engine.begin() as connection:
            if self._lease is not None:
                self._lease.lock_task(connection, bundle_id)
            yield connection

    @contextmanager
    def _host_transaction(self) -> Iterator[sa.Connection]:
        """A transaction on several tasks of the host. Raises, or ends the process, as `HostLease.lock_host`."""
        with self._engine.begin() as connection:
            if self._lease is not None:
                self._lease.lock_host(connection)
            yield connection

    # Queries and updates of this class

    def _read(self, query: sa.Select[tuple[object, ...]], **parameters: object) -> list[BundleTask]:
        with self._engine.connect() as connection:
            return [_task(row) for row in connection.execute(query, parameters)]

    def _overlays(self, condition: sa.ColumnElement[bool]) -> list[tuple[str, Overlay]]:
        there = sa.and_(bundle_task.c.overlay.is_not(None), condition)
        query = (
            sa.select(bundle_task.c.bundle_id, bundle_task.c.overlay).where(there).order_by(bundle_task.c.start_time)
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [(row.bundle_id, _OVERLAY.validate_python(row.overlay)) for row in rows]

    def _change_state(
        self,
        bundle_id: str,
        sources: frozenset[BundleTaskState],
        *conditions: sa.ColumnElement[bool],
        state: BundleTaskState,
        connection: sa.Connection | None = None,
        **values: object,
    ) -> bool:
        if state in FINISHED:  # in the same transaction, hand a borrowed instance over to power recovery
            borrowed = sa.exists().where(instance_power.c.borrowed_by == bundle_id)
            until = sa.func.coalesce(bundle_task.c.power_recovery_until, now(RECOVER_FOR.total_seconds()))
            values["power_recovery_until"] = sa.case((borrowed, until), else_=bundle_task.c.power_recovery_until)
        with self._engine.begin() if connection is None else nullcontext(connection) as transaction:
            from_source = sa.and_(bundle_task.c.state.in_([*sources]), *conditions)
            changed = self._update_in(transaction, bundle_id, from_source, state=state, **values)
            if changed:
                transaction.execute(bundle_task_event.insert(), _event(bundle_id, state))
            if changed and state is BundleTaskState.FAILED:
                claims.renounce(transaction, bundle_id)
        if changed and connection is None:  # else the caller logs the change after its transaction
            self.log_state(bundle_id, state)
        return changed

    def log_state(self, bundle_id: str, state: BundleTaskState) -> None:
        """Log that a task has changed to `state`; if it has ended, also with which result."""
        log_event("task state changed", bundle_id=bundle_id, state=state.value)
        if state not in FINISHED or not structlog.is_configured():
            return
        try:
            task, summary = self.get(bundle_id), self.summary(bundle_id)
        except sa.exc.SQLAlchemyError as error:  # the change is committed: the task must not be affected
            log.warning(
                "database unavailable, end of the task not logged", bundle_id=bundle_id, error=type(error).__name__
            )
            return
        if task is None or summary is None:
            return
        common: dict[str, Any] = {
            "bundle_id": bundle_id, "instance_id": task.instance_id, "account_id": task.account_id,
            "seconds": round(summary.seconds, 1),
            "downtime": None if summary.downtime is None else round(summary.downtime, 1),
        }  # fmt: skip
        if state is BundleTaskState.COMPLETE:
            log_event(
                "task completed",
                volume_bytes=task.volume_size,
                stored_bytes=summary.stored_bytes,
                rate=round((task.volume_size or 0) / max(summary.seconds, 0.001)),
                **common,
            )
        else:
            code = task.error_code or ""
            remedy = ERROR_CODES[code].remedy if code in ERROR_CODES else None
            log_event("task failed", code=code, message=task.error_message, remedy=remedy, **common)

    def _set_values(self, bundle_id: str, **values: object) -> None:
        """Change columns that the API does not show: the update time stays. An agent needs the right to write."""
        with self._engine.begin() as connection:
            allowed = bundle_task.c.bundle_id == bundle_id if self._lease is None else self._lease.allows(bundle_id)
            changed = connection.execute(bundle_task.update().where(allowed).values(**values)).rowcount
            if changed != 1 and self._lease is not None:
                self._lease.raise_lost(connection, bundle_id)

    def _update(self, bundle_id: str, condition: sa.ColumnElement[bool], **values: object) -> bool:
        with self._engine.begin() as connection:
            return self._update_in(connection, bundle_id, condition, **values)

    def _update_in(
        self, connection: sa.Connection, bundle_id: str, condition: sa.ColumnElement[bool], **values: object
    ) -> bool:
        """Change a task that meets the condition; return whether it did. An agent needs the right to write."""
        allowed = sa.true() if self._lease is None else self._lease.allows(bundle_id)
        statement = bundle_task.update().where(bundle_task.c.bundle_id == bundle_id, condition, allowed)
        if connection.execute(statement.values(update_time=now(), **values)).rowcount == 1:
            return True
        if self._lease is not None:
            self._lease.lock_task(connection, bundle_id)  # raises if the right is lost; else the condition did not hold
        return False


def _end_downtime(connection: sa.Connection, bundle_id: str) -> float | None:
    """Add the time since `off_since` to the task's downtime; return the sum, or None if the instance was not off."""
    mine = bundle_task.c.bundle_id == bundle_id
    query = sa.select(bundle_task.c.off_since, bundle_task.c.downtime, now().label("now")).where(mine)
    row = connection.execute(query).one_or_none()
    if row is None or row.off_since is None:
        return None
    downtime = _downtime(row.downtime, row.off_since, row.now)
    connection.execute(bundle_task.update().where(mine).values(off_since=None, downtime=downtime))
    return downtime


def _downtime(ended: float | None, off_since: datetime | None, current: datetime) -> float | None:
    if off_since is None:
        return ended
    return (ended or 0.0) + max((current - off_since).total_seconds(), 0.0)


def _end_power_recovery(instance_id: str) -> sa.Update:
    mine = sa.and_(bundle_task.c.instance_id == instance_id, _NEEDS_POWER_RECOVERY)
    return bundle_task.update().where(mine).values(power_recovery_until=None)


def _event(bundle_id: str, state: BundleTaskState, message: str | None = None) -> dict[str, object]:
    return {"bundle_id": bundle_id, "state": state, "message": message}


def _task(row: sa.Row[tuple[object, ...]]) -> BundleTask:
    values: dict[str, Any] = dict(zip(_NAMES, row, strict=True))
    return BundleTask(**{**values, "state": BundleTaskState(values["state"]), "next_step": Step(values["next_step"])})
