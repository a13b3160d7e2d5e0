"""Bundle tasks as they go, on stderr: bars on a terminal, a line for each change and each tenth elsewhere.

It looks at the database twice a second and touches nothing. A bar begins anew with `storing`, as the task's progress
does; the rate is that of the bytes that the bucket has taken in the last seconds.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

from thrave.cli.output import printable
from thrave.cli.progress import Rate
from thrave.cli.sizes import words
from thrave.cli.task_words import progress_words
from thrave.tasks.models import FINISHED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.progress import Progress, TaskID

    from thrave.tasks.queries import TaskQueries, TaskReport

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
            time.sleep(_INTERVAL)


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
        bar.rate.note(time.monotonic(), seen.stored.size)
        self._progress.update(
            bar.task_id,
            completed=task.progress or 0,
            instance=task.instance_id,
            state=task.state,
            said=_end(seen) or f"{words(seen.stored.size)} {bar.rate.per_second / 1e6:.0f} MB/s",
        )

    def _new(self, bundle_id: str) -> _Bar:
        task_id = self._progress.add_task(bundle_id, total=100, instance="", state="", said="")
        bar = self._bars[bundle_id] = _Bar(task_id, Rate(_WINDOW))
        return bar


def _end(seen: TaskReport) -> str:
    """How a task has ended, in a few words; nothing if it has not."""
    if seen.task.state not in FINISHED:
        return ""
    return printable(seen.task.error_code or "") or words(seen.stored.size)


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
