"""Output of the commands about bundle tasks: JSON, tables, and the progress of `thrave task watch` on stderr.

Upload policies, their signatures and the keys of bundles are never read here. A bar starts again at 0 with the state
`storing`, as the task's progress does. Its rate is that of the bytes that the bucket received in the last seconds.
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

_HEADER = ("TASK", "STATE", "PROGRESS", "INSTANCE", "HOST", "AGE", "STORED", "ERROR/WARNING")
_MAX_KEYS_SHOWN = 20
_POLL_INTERVAL = 0.5  # seconds
_RATE_WINDOW = 5.0  # seconds


class TaskDetails(NamedTuple):
    """A task with its history."""

    report: TaskReport
    history: Sequence[TaskEvent]
    now: datetime
    """The database's time when the history was read."""


def task_document(report: TaskReport) -> dict[str, object]:
    """A task as JSON. Sizes are in bytes, `progress` is in percent of the state."""
    task, stored = report.task, report.stored
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
        "orphanedObjects": len(report.orphaned_keys),
        "runs": task.runs,
        "warning": task.warning,
        "error": error,
    }


def task_table(reports: Sequence[TaskReport], now: datetime) -> str:
    """A table of tasks, one task in a line."""
    rows: list[tuple[str, ...]] = []
    for report in reports:
        task, stored = report.task, report.stored
        reason = printable(task.error_code or task.warning or "")
        if report.orphaned_keys:
            reason += f", {len(report.orphaned_keys)} orphaned objects"
        age, size = format_duration(now - task.start_time), format_size(stored.size) if stored.size else ""
        rows.append(
            (task.bundle_id, task.state, _format_progress(task), task.instance_id, task.host, age, size, reason)
        )
    return table(_HEADER, rows)


def details_document(details: TaskDetails) -> Json:
    """Everything about a task as JSON; `meaning` and `remedy` come from the table of error codes."""
    task, durations = details.report.task, state_durations(details.history, details.now)
    cause = ERROR_CODES.get(task.error_code or "")
    orphaned_keys = details.report.orphaned_keys
    return {
        **task_document(details.report),
        "ownerId": task.owner_id,
        "runAfterTask": task.run_after_task,
        "volumeDone": bytes_done(task, details.history),
        "bytesPerSecond": _bytes_per_second(details.report, durations),
        "meaning": cause and cause.meaning,
        "remedy": cause and cause.remedy,
        "orphanedKeys": [*orphaned_keys],
        "removalCommand": " ".join(_removal_commands(task)) if orphaned_keys else None,
        "history": [
            {
                "time": item.event.time,
                "state": item.event.state,
                "message": item.event.message,
                "seconds": item.duration and round(item.duration.total_seconds(), 3),
            }
            for item in durations
        ],
    }


def details_text(details: TaskDetails) -> str:
    """Everything about a task for people: properties, history, reason of a failure, orphaned objects."""
    durations = state_durations(details.history, details.now)
    history: list[tuple[str, ...]] = [
        (
            item.event.time.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z",
            item.event.state,
            format_duration(item.duration) if item.duration else "",
            printable(item.event.message or ""),
        )
        for item in durations
    ]
    paragraphs = [
        table(("TASK", details.report.task.bundle_id), _properties(details, durations)),
        table(("TIME", "STATE", "DURATION", "EVENT"), history) if history else "",
        _reason(details.report.task),
        _orphaned_objects(details.report),
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _format_progress(task: BundleTask) -> str:
    return f"{task.progress}%" if task.progress is not None and task.state in WITH_PROGRESS else ""


def _properties(details: TaskDetails, durations: Sequence[StateDuration]) -> list[tuple[str, ...]]:
    task, stored = details.report.task, details.report.stored
    power = {None: "", True: ", which was running", False: ", which was stopped"}[task.run_after_task]
    done, rate = bytes_done(task, details.history), _bytes_per_second(details.report, durations)
    volume = None
    if task.volume_size is not None and done is not None:
        volume = f"{format_size(done)} of {format_size(task.volume_size)} read"
    objects = "nothing"
    if stored.objects:
        objects = f"{stored.parts} parts, {format_size(stored.size)}" + (f", {rate / 1e6:.1f} MB/s" if rate else "")
    properties = {
        "state": f"{task.state} {_format_progress(task)}",
        "instance": f"{task.instance_id} of account {task.account_id}{power}",
        "host": f"{task.host}, started {task.runs} times" if task.runs > 1 else task.host,
        "bucket": f"{task.bucket}, prefix {task.prefix}",
        "volume": volume,
        "stored": objects,
        "warning": task.warning,
    }
    return [(name, printable(value)) for name, value in properties.items() if value]


def _bytes_per_second(report: TaskReport, durations: Sequence[StateDuration]) -> float | None:
    """Return the average rate of stored bytes in the state `bundling`; None if nothing was stored."""
    seconds = time_in(BundleTaskState.BUNDLING, durations).total_seconds()
    return round(report.stored.size / seconds, 1) if seconds and report.stored.size else None


def _reason(task: BundleTask) -> str:
    if task.error_code is None:
        return ""
    reason = f"{task.error_code}: {printable(task.error_message or '')}"
    cause = ERROR_CODES.get(task.error_code)
    return f"{reason}\n{cause.meaning}\nWhat to do: {cause.remedy}" if cause else reason


def _orphaned_objects(report: TaskReport) -> str:
    """List the objects that must still be deleted from the bucket, with commands that delete them."""
    task, keys = report.task, report.orphaned_keys
    has_failed = task.state is BundleTaskState.FAILED
    if not keys:
        return "The bucket contains no object of this task." if has_failed else ""
    objects = "objects of this task" if has_failed else "objects of the bundle that this one has replaced"
    more = len(keys) - _MAX_KEYS_SHOWN
    lines = [
        f"Not removed from the bucket {task.bucket}: {len(keys)} {objects}",
        *keys[:_MAX_KEYS_SHOWN],
        *([f"… and {more} more (--output json lists all)"] if more > 0 else []),
        "The service retries the removal at least once an hour. If its key may not delete objects, use one that may:",
        *_removal_commands(task),
    ]
    return "\n".join(printable(line) for line in lines)


def _removal_commands(task: BundleTask) -> list[str]:
    """Return shell commands that delete the orphaned objects from an S3 store, with a key that may delete them."""
    keys = "import json, sys; print(*json.load(sys.stdin)['orphanedKeys'], sep='\\n')"
    return [
        f'thrave task show {task.bundle_id} --output json | python3 -c "{keys}" |',
        f"    xargs -d '\\n' -I KEY aws s3api delete-object --bucket {shlex.quote(task.bucket)} --key KEY",
    ]


class _Display(Protocol):
    """Shows the progress of tasks."""

    def show(self, report: TaskReport) -> None:
        """Show the current state of a task; called at each poll."""
        ...


def watch_tasks(queries: TaskQueries, bundle_ids: Sequence[str]) -> list[TaskReport]:
    """Show tasks on stderr until all have ended; return their final state.

    Polls the database twice a second and changes nothing.

    Raises:
        BundleTaskNotFound: There is no such task, or it was deleted after its retention time.
    """
    with _open_display() as display:
        while True:
            reports = queries.of(bundle_ids)
            for report in reports:
                display.show(report)
            if all(report.task.state in FINISHED for report in reports):
                return reports
            sleep(_POLL_INTERVAL)


@contextmanager
def _open_display() -> Iterator[_Display]:
    if not sys.stderr.isatty():
        yield _LineDisplay()
        return
    with _new_bars() as progress:
        yield _BarDisplay(progress)


class _LineDisplay:
    """Writes a line for each change of state and each 10 %."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, int]] = {}

    def show(self, report: TaskReport) -> None:
        """See _Display."""
        task = report.task
        now = (task.state, (task.progress or 0) // 10)
        if self._last.get(task.bundle_id) != now:
            self._last[task.bundle_id] = now
            words = (task.bundle_id, task.instance_id, task.state, _format_progress(task), _format_result(report))
            sys.stderr.write(" ".join(word for word in words if word) + "\n")


class _BarDisplay:
    """Draws a bar for each task."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, tuple[TaskID, Rate]] = {}

    def show(self, report: TaskReport) -> None:
        """See _Display."""
        task = report.task
        if task.bundle_id not in self._bars:
            new = self._progress.add_task(task.bundle_id, total=100, instance="", state="", detail="")
            self._bars[task.bundle_id] = new, Rate(_RATE_WINDOW)
        bar, rate = self._bars[task.bundle_id]
        rate.add(monotonic(), report.stored.size)
        self._progress.update(
            bar,
            completed=task.progress or 0,
            instance=task.instance_id,
            state=task.state,
            detail=_format_result(report) or f"{format_size(report.stored.size)} {rate.per_second / 1e6:.0f} MB/s",
        )


def _format_result(report: TaskReport) -> str:
    """Return the error code or the stored size of a finished task; an empty text for an unfinished one."""
    if report.task.state not in FINISHED:
        return ""
    return printable(report.task.error_code or "") or format_size(report.stored.size)


def _new_bars() -> Progress:
    from rich import progress
    from rich.console import Console

    fields = ("description", "fields[instance]", "fields[state]")
    columns = (
        *(progress.TextColumn(f"{{task.{field}}}", markup=False) for field in fields),
        progress.BarColumn(bar_width=20),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[detail]}", markup=False),
    )
    return progress.Progress(*columns, console=Console(stderr=True))
