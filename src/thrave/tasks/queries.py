"""Bundle tasks as an operator sees them: anybody's, with what each has stored and how long each state of it took.

It only reads. A page of tasks costs two queries, however many tasks there are, and one more for each that has left
something behind. It decides nothing.
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

_taken_part = sa.case((bundle_part.c.part.is_not(None), bundle_part.c.size))
# A complete task may have objects to delete: those of the bundle that it has replaced.
_counted = sa.or_(
    bundle_part.c.state == "sent",
    sa.and_(bundle_part.c.state == "unwanted", bundle_task.c.state == BundleTaskState.FAILED),
)
_STORED = (
    sa.select(
        bundle_task.c.bundle_id,
        bundle_task.c.earlier.is_not(None),
        sa.func.count(bundle_part.c.key),
        sa.func.count(_taken_part),
        sa.func.coalesce(sa.cast(sa.func.sum(bundle_part.c.size), sa.BigInteger), 0),
    )
    .outerjoin(bundle_part, sa.and_(bundle_part.c.bundle_id == bundle_task.c.bundle_id, _counted))
    .group_by(bundle_task.c.bundle_id)
)


@dataclass(frozen=True, kw_only=True)
class TaskFilter:
    """Which tasks to look at: those for which everything holds that is given."""

    states: frozenset[BundleTaskState] = frozenset()
    """Any of these; empty: whatever state they are in."""
    account_id: str | None = None
    instance_id: str | None = None
    host: str | None = None
    since: datetime | None = None
    """Those that were asked for then or later; aware."""

    def conditions(self) -> Iterator[sa.ColumnElement[bool]]:
        """The same in SQL, so that an index serves where there is one."""
        whose = {"account_id": self.account_id, "instance_id": self.instance_id, "host": self.host}
        yield from (bundle_task.c[name] == value for name, value in whose.items() if value is not None)
        if self.states:
            yield bundle_task.c.state.in_([*self.states])
        if self.states and not self.states & FINISHED:
            yield task_in_progress
        if self.since is not None:
            yield bundle_task.c.start_time >= self.since
            yield bundle_task.c.update_time >= self.since  # no task changes before it is asked for; this has the index


class StoredTotals(NamedTuple):
    """What a task has in its bucket, as far as it was written down."""

    objects: int = 0
    """Parts, manifest and side file, those that are on their way among them."""
    parts: int = 0
    """The parts that the bucket has taken."""
    size: int = 0
    """Bytes of every object that the bucket has taken."""


class TaskReport(NamedTuple):
    """A task, and what it has stored."""

    task: BundleTask
    stored: StoredTotals
    left_over: Sequence[str]
    """The keys of what it should have removed from its bucket and has not yet."""


class StateDuration(NamedTuple):
    """Something that happened to a task and, where it came into a state, how long it was in that."""

    event: TaskEvent
    lasted: timedelta | None
    """None of an end, and of what happened within a state."""


class TaskQueries:
    """The bundle tasks of all accounts."""

    def __init__(self, engine: sa.Engine, records: TaskRepository) -> None:
        """Look at the tasks of `records`, whose database `engine` is."""
        self._engine = engine
        self._records = records

    def latest(self, wanted: TaskFilter, *, limit: int) -> list[TaskReport]:
        """The `limit` newest of the tasks that are wanted, the oldest of them first."""
        return self._seen(self._records.latest(*wanted.conditions(), limit=limit))

    def of(self, bundle_ids: Sequence[str]) -> list[TaskReport]:
        """The tasks with these ids, the oldest first. Raises BundleTaskNotFound for the first that there is none of."""
        tasks = self._records.find(bundle_task.c.bundle_id.in_(bundle_ids))
        found = {task.bundle_id for task in tasks}
        for bundle_id in bundle_ids:
            if bundle_id not in found:
                raise BundleTaskNotFound(bundle_id)
        return self._seen(tasks)

    def _seen(self, tasks: Sequence[BundleTask]) -> list[TaskReport]:
        mine = _STORED.where(bundle_task.c.bundle_id.in_([task.bundle_id for task in tasks]))
        with self._engine.connect() as connection:
            found = {row[0]: (row[1], StoredTotals(*row[2:])) for row in connection.execute(mine)}
        return [self._one(task, *found.get(task.bundle_id, (False, StoredTotals()))) for task in tasks]

    def _one(self, task: BundleTask, replaces: bool, stored: StoredTotals) -> TaskReport:  # noqa: FBT001 (a column)
        journal, left_over = self._records.journal(task.bundle_id), []
        if task.state is BundleTaskState.FAILED and stored.objects:
            left_over = [item.key for item in journal.objects()]
        elif task.state is BundleTaskState.COMPLETE and replaces:
            left_over = [item.key for item in journal.orphaned_objects()]
        return TaskReport(task, stored, left_over)


def state_durations(history: Sequence[TaskEvent], now: datetime) -> list[StateDuration]:
    """How long a task was in each state of its history; in the one that it has still, until now."""
    changes = [event.time for event in history if event.message is None]
    ends = iter([*changes[1:], now])
    return [
        StateDuration(event, None if event.message is not None or event.state in FINISHED else next(ends) - event.time)
        for event in history
    ]


def time_in(state: BundleTaskState, spent: Sequence[StateDuration]) -> timedelta:
    """How long a task was in a state."""
    return sum((spell.lasted for spell in spent if spell.event.state is state and spell.lasted), timedelta())


def bytes_done(task: BundleTask, history: Sequence[TaskEvent]) -> int | None:
    """How much of its root volume a task has dealt with, to the percent, holes included; None until it is opened."""
    if task.volume_size is None:
        return None
    been = {event.state for event in history}
    if been & {BundleTaskState.STORING, BundleTaskState.COMPLETE}:
        return task.volume_size
    return task.volume_size * (task.progress or 0) // 100
