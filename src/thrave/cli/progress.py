"""A progress bar on stderr: percent, MB/s and time left, as of the last seconds.

It shows itself only when the work has taken longer than a second, and only to a terminal; a log file gets a line every
ten percent instead. It never goes back, never writes to stdout and knows nothing of what it measures.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from thrave.concurrency import monotonic, new_event, new_lock, supervised

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PATIENCE = 1.0  # seconds before a bar appears
_WINDOW = 5.0  # seconds over which the rate is taken
_INTERVAL = 0.1  # seconds between two looks; whatever is said more often is left out


class Rate:
    """How fast something goes, over the last seconds."""

    def __init__(self, window: float) -> None:
        """Prepare for a window of so many seconds."""
        self._window = window
        self._points: deque[tuple[float, float]] = deque()

    def note(self, now: float, done: float) -> None:
        """Say that `done` bytes are done at the time `now` (seconds); what is older than the window is forgotten."""
        self._points.append((now, done))
        while len(self._points) > 2 and self._points[1][0] <= now - self._window:
            self._points.popleft()

    @property
    def per_second(self) -> float:
        """Bytes; 0 before two different times are known."""
        if not self._points:
            return 0.0
        (begin, first), (end, last) = self._points[0], self._points[-1]
        return (last - first) / (end - begin) if end > begin else 0.0


class ProgressBar:
    """A bar over a known number of bytes. Any thread may move it."""

    def __init__(self, label: str, total: int) -> None:
        """Prepare a bar named `label` over `total` bytes; nothing is shown yet."""
        self._label = label
        self._total = max(total, 1)
        self._begun = self._seen = monotonic()
        self._rate = Rate(_WINDOW)
        self._rate.note(self._begun, 0)
        self._done = 0.0
        self._lock = new_lock()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._tenth = 0

    def update(self, done: float) -> None:
        """Say that `done` bytes of the total are done; may be called often."""
        now = monotonic()
        if now - self._seen < _INTERVAL and done < self._total:
            return
        with self._lock:
            self._seen, self._done = now, max(self._done, min(done, self._total))
            self._rate.note(now, self._done)
            if now - self._begun >= _PATIENCE:
                self._show()

    @contextmanager
    def following(self, progress: Callable[[], float]) -> Iterator[None]:
        """Show what `progress` says (0 to 1), asked in a thread of its own, until the block ends."""
        ended = new_event()

        def follow() -> None:
            while not ended.wait(_INTERVAL):
                self.update(progress() * self._total)

        thread = supervised("progress", follow, on_failure=lambda _error: None)  # only the bar stands still
        try:
            yield
            self.update(progress() * self._total)
        finally:
            ended.set()
            thread.join(_INTERVAL)  # what tells the progress may hang with what it tells of

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()

    def _show(self) -> None:
        if sys.stderr.isatty():
            self._draw()
        else:
            self._log()

    def _draw(self) -> None:
        if self._bar is None or self._task is None:
            self._bar = _rich_bar()
            self._task = self._bar.add_task(self._label, total=self._total, speed="")
            self._bar.start()
        self._bar.update(self._task, completed=self._done, speed=self._speed())

    def _log(self) -> None:
        tenth = int(10 * self._done / self._total)
        if tenth > self._tenth:
            self._tenth = tenth
            sys.stderr.write(f"{self._label} {10 * tenth}% {self._speed()}\n")

    def _speed(self) -> str:
        """Rate and time left in words."""
        rate = self._rate.per_second
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate and self._done < self._total else ""
        return f"{rate / 1e6:.0f} MB/s{left}"


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
        progress.TextColumn("{task.fields[speed]}"),
    )
    return progress.Progress(*columns, console=Console(stderr=True))
