"""A progress bar on stderr: percent, MB/s, time left.

It shows itself only when the work has taken longer than a second, and only to a terminal; a log file gets a line every
ten percent instead. It never writes to stdout and knows nothing of what it measures.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PATIENCE = 1.0  # seconds before a bar appears


class ProgressBar:
    """A bar over a known number of bytes."""

    def __init__(self, label: str, total: int) -> None:
        """Prepare a bar named `label` over `total` bytes; nothing is shown yet."""
        self._label = label
        self._total = max(total, 1)
        self._begun = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._tenth = 0

    def update(self, done: float) -> None:
        """Say that `done` bytes of the total are done; may be called often."""
        if time.monotonic() - self._begun < _PATIENCE:
            return
        if sys.stderr.isatty():
            self._draw(done)
        else:
            self._log(done)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()

    def _draw(self, done: float) -> None:
        if self._bar is None or self._task is None:
            self._bar = _rich_bar()
            self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=done)

    def _log(self, done: float) -> None:
        tenth = int(10 * done / self._total)
        if tenth > self._tenth:
            self._tenth = tenth
            rate = done / 1e6 / (time.monotonic() - self._begun)
            sys.stderr.write(f"{self._label} {10 * tenth}% {rate:.0f} MB/s\n")


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[ProgressBar]:
    """A `ProgressBar` over `total` bytes that is taken down at the end."""
    bar = ProgressBar(label, total)
    try:
        yield bar
    finally:
        bar.close()


def _rich_bar() -> "Progress":
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=Console(stderr=True))
