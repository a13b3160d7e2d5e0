"""Read-only queries of bundle tasks for operators: all accounts, stored objects, time spent in each state.

A page of tasks costs two queries for any number of tasks, and one more for each task with orphaned objects.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import sqlalchemy as sa

from thrave.database import bundle_part, bundle_task, task_in_progress
from thrave.tasks.errors import BundleTaskNotFound
from thrave.tasks.models import FINISHED, BundleTask, BundleTaskState, TaskEvent
from thrave.tasks.repository import TaskRepository

_STORED_PART_SIZE = sa.case((bundle_part.c.part.is_not(None), bundle_part.c.size))
# A complete task may have objects to delete: those of the bundle that it has replaced.
_IS_COUNTED = sa.or_(
    bundle_part.c.state == "sent",
    sa.and_(bundle_part.c.state == "unwanted", bundle_task.c.state == BundleTaskState.FAILED),
)
_STORED = (
    sa.select(
        bundle_task.c.bundle_id,
        bundle_task.c.earlier.is_not(None),
        sa.func.count(bundle_part.c.key),
        sa.func.count(_STORED_PART_SIZE),
        sa.func.coalesce(sa.cast(sa.func.sum(bundle_part.c.size), sa.BigInteger), 0),
    )
    .outerjoin(bundle_part, sa.and_(bundle_part.c.bundle_id == bundle_task.c.bundle_id, _IS_COUNTED))
    .group_by(bundle_task.c.bundle_id)
)


@dataclass(frozen=True, kw_only=True)
class TaskFilter:
    """Selects tasks that meet all of the given conditions."""

    states: frozenset[BundleTaskState] = frozenset()
    """Any of these states; empty: every state."""
    account_id: str | None = None
    instance_id: str | None = None
    host: str | None = None
    since: datetime | None = None
    """Earliest start time; timezone-aware."""

    def conditions(self) -> Iterator[sa.ColumnElement[bool]]:
        """Yield the conditions in SQL, in a form that can use the indexes."""
        equal = {"account_id": self.account_id, "instance_id": self.instance_id, "host": self.host}
        yield from (bundle_task.c[name] == value for name, value in equal.items() if value is not None)
        if self.states:
            yield bundle_task.c.state.in_([*self.states])
        if self.states and not self.states & FINISHED:
            yield task_in_progress
        if self.since is not None:
            yield bundle_task.c.start_time >= self.since
            yield bundle_task.c.update_time >= self.since  # implied by the condition above; this column has an index


class StoredTotals(NamedTuple):
    """What a task has in its bucket, by its records."""

    objects: int = 0
    """Number of parts, manifest and side file, including uploads in flight."""
    parts: int = 0
    """Number of parts that are stored."""
    size: int = 0
    """Bytes of all stored objects."""


class TaskReport(NamedTuple):
    """A task and its objects."""

    task: BundleTask
    stored: StoredTotals
    orphaned_keys: Sequence[str]
    """Keys of objects that must still be deleted from its bucket."""


class StateDuration(NamedTuple):
    """An event of a task; if the event is a change of state, with the time that the task spent in the state."""

    event: TaskEvent
    duration: timedelta | None
    """None for the final state, and for events within a state."""


class TaskQueries:
    """The bundle tasks of all accounts."""

    def __init__(self, engine: sa.Engine, records: TaskRepository) -> None:
        """Read the tasks of `records`, whose database is `engine`."""
        self._engine = engine
        self._records = records

    def latest(self, wanted: TaskFilter, *, limit: int) -> list[TaskReport]:
        """Return the `limit` newest of the selected tasks, oldest first."""
        return self._report(self._records.latest(*wanted.conditions(), limit=limit))

    def of(self, bundle_ids: Sequence[str]) -> list[TaskReport]:
        """Return the tasks with these ids, oldest first. Raises BundleTaskNotFound for the first unknown id."""
        tasks = self._records.find(bundle_task.c.bundle_id.in_(bundle_ids))
        found = {task.bundle_id for task in tasks}
        for bundle_id in bundle_ids:
            if bundle_id not in found:
                raise BundleTaskNotFound(bundle_id)
        return self._report(tasks)

    def ids_from(self, start: str, *, limit: int) -> list[str]:
        """Return at most `limit` ids of tasks that begin with `start`."""
        query = sa.select(bundle_task.c.bundle_id).where(bundle_task.c.bundle_id.startswith(start, autoescape=True))
        with self._engine.connect() as connection:
            return [*connection.execute(query.limit(limit)).scalars()]

    def instance_ids_from(self, start: str, *, limit: int) -> list[str]:
        """Return at most `limit` ids of instances with a task, also of removed ones, that begin with `start`."""
        column = bundle_task.c.instance_id
        query = sa.select(column).where(column.startswith(start, autoescape=True)).distinct()
        with self._engine.connect() as connection:
            return [*connection.execute(query.limit(limit)).scalars()]

    def _report(self, tasks: Sequence[BundleTask]) -> list[TaskReport]:
        query = _STORED.where(bundle_task.c.bundle_id.in_([task.bundle_id for task in tasks]))
        with self._engine.connect() as connection:
            found = {row[0]: (row[1], StoredTotals(*row[2:])) for row in connection.execute(query)}
        none = False, StoredTotals()
        reports = []
        for task in tasks:
            has_replaced, stored = found.get(task.bundle_id, none)
            reports.append(self._report_one(task, stored, has_replaced=has_replaced))
        return reports

    def _report_one(self, task: BundleTask, stored: StoredTotals, *, has_replaced: bool) -> TaskReport:
        journal, orphaned_keys = self._records.journal(task.bundle_id), []
        if task.state is BundleTaskState.FAILED and stored.objects:
            orphaned_keys = [item.key for item in journal.objects()]
        elif task.state is BundleTaskState.COMPLETE and has_replaced:
            orphaned_keys = [item.key for item in journal.orphaned_objects()]
        return TaskReport(task, stored, orphaned_keys)


def state_durations(history: Sequence[TaskEvent], now: datetime) -> list[StateDuration]:
    """Return how long a task was in each state of its history; for the current state, until `now`."""
    changes = [event.time for event in history if event.message is None]
    ends = iter([*changes[1:], now])
    return [
        StateDuration(event, None if event.message is not None or event.state in FINISHED else next(ends) - event.time)
        for event in history
    ]


def time_in(state: BundleTaskState, spent: Sequence[StateDuration]) -> timedelta:
    """Return how long a task was in a state, in total."""
    return sum((each.duration for each in spent if each.event.state is state and each.duration), timedelta())


def bytes_done(task: BundleTask, history: Sequence[TaskEvent]) -> int | None:
    """Return the bytes of the root volume that a task has read, rounded down to a percent; None before it is opened.

    Holes count as read.
    """
    if task.volume_size is None:
        return None
    states = {event.state for event in history}
    if states & {BundleTaskState.STORING, BundleTaskState.COMPLETE}:
        return task.volume_size
    return task.volume_size * (task.progress or 0) // 100
