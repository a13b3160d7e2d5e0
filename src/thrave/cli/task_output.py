"""What the commands on bundle tasks answer: JSON in EC2's camelCase, and text for people.

It only puts data into words. What a stranger may have chosen (a bucket's name, a store's message) is shown without what
could make a terminal do something; an upload policy, its signature and a bundle's key are never read.

Bundle tasks as they go, on stderr: bars on a terminal, a line for each change and each tenth elsewhere.

It looks at the database twice a second and touches nothing. A bar begins anew with `storing`, as the task's progress
does; the rate is that of the bytes that the bucket has taken in the last seconds.
"""

from __future__ import annotations

import shlex
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

from thrave.cli.output import format_duration, format_size, printable, table
from thrave.cli.progress import Rate
from thrave.concurrency import monotonic, sleep
from thrave.tasks.errors import ERROR_CODES
from thrave.tasks.models import FINISHED, WITH_PROGRESS, BundleTaskState
from thrave.tasks.queries import bytes_done, state_durations, time_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from rich.progress import Progress, TaskID

    from thrave.cli.output import Json
    from thrave.tasks.models import BundleTask, TaskEvent
    from thrave.tasks.queries import StateDuration, TaskQueries, TaskReport


_HEADER = ("TASK", "STATE", "PROGRESS", "INSTANCE", "HOST", "AGE", "BUNDLED", "REASON")


_KEYS_SHOWN = 20


class TaskStory(NamedTuple):
    """All that is known of one task."""

    seen: TaskReport
    history: Sequence[TaskEvent]
    now: datetime


def task_document(seen: TaskReport) -> dict[str, object]:
    """A task as JSON. Sizes are in bytes, the progress in percent of the state."""
    task, stored = seen.task, seen.stored
    error = {"code": task.error_code, "message": task.error_message} if task.error_code else None
    return {
        "bundleId": task.bundle_id,
        "accountId": task.account_id,
        "instanceId": task.instance_id,
        "host": task.host,
        "state": task.state,
        "progress": task.progress,
        "startTime": task.start_time,
        "updateTime": task.update_time,
        "storage": {"bucket": task.bucket, "prefix": task.prefix},
        "volumeSize": task.volume_size,
        "storedSize": stored.size,
        "storedParts": stored.parts,
        "orphanedObjects": len(seen.orphaned_keys),
        "attempts": task.attempts,
        "warning": task.warning,
        "error": error,
    }


def task_table(tasks: Sequence[TaskReport], now: datetime) -> str:
    """Tasks, one a line."""
    return table(_HEADER, [_row(seen, now) for seen in tasks])


def story_document(story: TaskStory) -> Json:
    """All of one task as JSON; what it says of the table of reasons is there only if the task failed."""
    task, spent = story.seen.task, state_durations(story.history, story.now)
    cause = ERROR_CODES.get(task.error_code or "")
    return {
        **task_document(story.seen),
        "ownerId": task.owner_id,
        "wasRunning": task.was_running,
        "volumeDone": bytes_done(task, story.history),
        "bytesPerSecond": _rate(story.seen, spent),
        "meaning": cause and cause.meaning,
        "remedy": cause and cause.remedy,
        "orphanedKeys": [*story.seen.orphaned_keys],
        "removalCommand": " ".join(removal_commands(task)) if story.seen.orphaned_keys else None,
        "history": [
            {
                "time": spell.event.time,
                "state": spell.event.state,
                "message": spell.event.message,
                "seconds": spell.duration and round(spell.duration.total_seconds(), 3),
            }
            for spell in spent
        ],
    }


def story_text(story: TaskStory) -> str:
    """All of one task in a few paragraphs."""
    spent = state_durations(story.history, story.now)
    paragraphs = [
        table(("TASK", story.seen.task.bundle_id), _facts(story.seen, story.history, spent)),
        table(("TIME", "STATE", "LASTED", "WHAT"), [_happened(spell) for spell in spent]) if spent else "",
        _reason(story.seen.task),
        _left_over(story),
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def progress_words(task: BundleTask) -> str:
    """How far a task is within its state."""
    return f"{task.progress}%" if task.progress is not None and task.state in WITH_PROGRESS else ""


def _row(seen: TaskReport, now: datetime) -> tuple[str, ...]:
    task, stored = seen.task, seen.stored
    bundled = format_size(stored.size) if stored.size else ""
    age = format_duration(now - task.start_time)
    reason = printable(task.error_code or task.warning or "") + (
        f", {len(seen.orphaned_keys)} orphaned objects" if seen.orphaned_keys else ""
    )
    return (task.bundle_id, task.state, progress_words(task), task.instance_id, task.host, age, bundled, reason)


def _facts(seen: TaskReport, history: Sequence[TaskEvent], spent: Sequence[StateDuration]) -> list[tuple[str, ...]]:
    task, stored = seen.task, seen.stored
    before = {None: "", True: ", which was running", False: ", which was stopped"}[task.was_running]
    facts = {
        "state": f"{task.state} {progress_words(task)}",
        "instance": f"{task.instance_id} of account {task.account_id}{before}",
        "host": f"{task.host}, begun {task.attempts} times" if task.attempts > 1 else task.host,
        "bucket": f"{task.bucket}, prefix {task.prefix}",
        "volume": _volume(task, history),
        "stored": f"{stored.parts} parts, {format_size(stored.size)}{_speed(seen, spent)}"
        if stored.objects
        else "nothing",
        "warning": task.warning,
    }
    return [(name, printable(fact)) for name, fact in facts.items() if fact]


def _volume(task: BundleTask, history: Sequence[TaskEvent]) -> str | None:
    done = bytes_done(task, history)
    if task.volume_size is None or done is None:
        return None
    return f"{format_size(done)} of {format_size(task.volume_size)} read"


def _rate(seen: TaskReport, spent: Sequence[StateDuration]) -> float | None:
    """Bytes a second that were stored while the volume was read; None if nothing was."""
    seconds = time_in(BundleTaskState.BUNDLING, spent).total_seconds()
    return round(seen.stored.size / seconds, 1) if seconds and seen.stored.size else None


def _speed(seen: TaskReport, spent: Sequence[StateDuration]) -> str:
    rate = _rate(seen, spent)
    return f", {rate / 1e6:.1f} MB/s" if rate else ""


def _happened(spell: StateDuration) -> tuple[str, ...]:
    time = spell.event.time.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"
    return (
        time,
        spell.event.state,
        format_duration(spell.duration) if spell.duration else "",
        printable(spell.event.message or ""),
    )


def _reason(task: BundleTask) -> str:
    if task.error_code is None:
        return ""
    said = f"{task.error_code}: {printable(task.error_message or '')}"
    cause = ERROR_CODES.get(task.error_code)
    return f"{said}\n{cause.meaning}\nWhat to do: {cause.remedy}" if cause else said


def _left_over(story: TaskStory) -> str:
    """What is still to be removed from the bucket, and how; what a failed task had sent is known to be gone, if so."""
    task, keys = story.seen.task, story.seen.orphaned_keys
    failed = task.state is BundleTaskState.FAILED
    if not keys:
        return "The bucket holds no object that this task has sent." if failed else ""
    whose = "objects of this task" if failed else "objects of the bundle that this one has replaced"
    more = [f"… and {len(keys) - _KEYS_SHOWN} more (--output json lists all)"] if len(keys) > _KEYS_SHOWN else []
    remedy = [
        "The service tries again to remove them, at last once an hour. If its key may not, use one that may:",
        *removal_commands(task),
    ]
    first = f"Not removed from the bucket {task.bucket}: {len(keys)} {whose}"
    return "\n".join(printable(line) for line in [first, *keys[:_KEYS_SHOWN], *more, *remedy])


def removal_commands(task: BundleTask) -> list[str]:
    """The commands that remove from an S3 store what a task could not, with an access key that may delete."""
    keys = "import json, sys; print(*json.load(sys.stdin)['orphanedKeys'], sep='\\n')"
    return [
        f'thrave task show {task.bundle_id} --output json | python3 -c "{keys}" |',
        f"    xargs -d '\\n' -I KEY aws s3api delete-object --bucket {shlex.quote(task.bucket)} --key KEY",
    ]


_INTERVAL = 0.5  # seconds between two looks


_WINDOW = 5.0  # seconds over which a rate is taken


class Screen(Protocol):
    """Where tasks are shown."""

    def show(self, seen: TaskReport) -> None:
        """Show a task as it is now; called again and again."""
        ...


def watch(overview: TaskQueries, bundle_ids: Sequence[str]) -> list[TaskReport]:
    """Show tasks until each of them has ended, and give them as they are then.

    Raises:
        BundleTaskNotFound: There is no such task, or it was forgotten meanwhile.
    """
    with _screen() as screen:
        while True:
            tasks = overview.of(bundle_ids)
            for seen in tasks:
                screen.show(seen)
            if all(seen.task.state in FINISHED for seen in tasks):
                return tasks
            sleep(_INTERVAL)


@contextmanager
def _screen() -> Iterator[Screen]:
    if not sys.stderr.isatty():
        yield Lines()
        return
    with _rich_progress() as progress:
        yield Bars(progress)


class Lines:
    """A log of what happens, a line each."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[str, int]] = {}

    def show(self, seen: TaskReport) -> None:
        """Write a line if the task has come into another state, or a tenth further in it."""
        task = seen.task
        now = (task.state, (task.progress or 0) // 10)
        if self._said.get(task.bundle_id) != now:
            self._said[task.bundle_id] = now
            said = (task.bundle_id, task.instance_id, task.state, progress_words(task), _end(seen))
            sys.stderr.write(" ".join(word for word in said if word) + "\n")


class _Bar(NamedTuple):
    task_id: TaskID
    rate: Rate


class Bars:
    """A bar a task."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, _Bar] = {}

    def show(self, seen: TaskReport) -> None:
        """Move the task's bar to where the task is."""
        task = seen.task
        bar = self._bars.get(task.bundle_id) or self._new(task.bundle_id)
        bar.rate.note(monotonic(), seen.stored.size)
        self._progress.update(
            bar.task_id,
            completed=task.progress or 0,
            instance=task.instance_id,
            state=task.state,
            said=_end(seen) or f"{format_size(seen.stored.size)} {bar.rate.per_second / 1e6:.0f} MB/s",
        )

    def _new(self, bundle_id: str) -> _Bar:
        task_id = self._progress.add_task(bundle_id, total=100, instance="", state="", said="")
        bar = self._bars[bundle_id] = _Bar(task_id, Rate(_WINDOW))
        return bar


def _end(seen: TaskReport) -> str:
    """How a task has ended, in a few words; nothing if it has not."""
    if seen.task.state not in FINISHED:
        return ""
    return printable(seen.task.error_code or "") or format_size(seen.stored.size)


def _rich_progress() -> Progress:
    from rich import progress
    from rich.console import Console

    fields = ("description", "fields[instance]", "fields[state]")
    columns = (
        *(progress.TextColumn(f"{{task.{field}}}", markup=False) for field in fields),
        progress.BarColumn(bar_width=20),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[said]}", markup=False),
    )
    return progress.Progress(*columns, console=Console(stderr=True))
