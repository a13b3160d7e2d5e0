"""A progress bar on stderr: percent, MB/s and remaining time, by the rate of the last seconds.

The bar appears on a terminal after one second of work. Without a terminal, stderr gets a line for each 10 %. The bar
never goes back. Nothing is written to stdout.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from thrave.concurrency import monotonic, new_event, new_lock, start_thread

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_DELAY = 1.0  # seconds until the bar appears
_RATE_WINDOW = 5.0  # seconds over which the rate is measured
_UPDATE_INTERVAL = 0.1  # seconds; more frequent updates are skipped


class Rate:
    """Bytes per second, measured over a sliding window."""

    def __init__(self, window: float) -> None:
        """Measure over the last `window` seconds."""
        self._window = window
        self._points: deque[tuple[float, float]] = deque()

    def add(self, now: float, done: float) -> None:
        """Record that `done` bytes in total are done at the time `now`, in seconds."""
        self._points.append((now, done))
        while len(self._points) > 2 and self._points[1][0] <= now - self._window:
            self._points.popleft()

    @property
    def per_second(self) -> float:
        """Bytes per second; 0 before two different times are recorded."""
        if not self._points:
            return 0.0
        (begin, first), (end, last) = self._points[0], self._points[-1]
        return (last - first) / (end - begin) if end > begin else 0.0


class ProgressBar:
    """A bar for a known number of bytes. Any thread may update it."""

    def __init__(self, label: str, total: int) -> None:
        """Create a bar with the text `label` for `total` bytes; the bar is not shown yet."""
        self._label = label
        self._total = max(total, 1)
        self._start = self._last_update = monotonic()
        self._rate = Rate(_RATE_WINDOW)
        self._rate.add(self._start, 0)
        self._done = 0.0
        self._lock = new_lock()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._tenths_logged = 0

    def update(self, done: float) -> None:
        """Set the number of bytes that are done. Cheap: may be called for every chunk."""
        now = monotonic()
        if now - self._last_update < _UPDATE_INTERVAL and done < self._total:
            return
        with self._lock:
            self._last_update, self._done = now, max(self._done, min(done, self._total))
            self._rate.add(now, self._done)
            if now - self._start < _DELAY:
                return
            if sys.stderr.isatty():
                self._draw()
            else:
                self._log()

    @contextmanager
    def following(self, get_progress: Callable[[], float]) -> Iterator[None]:
        """Update the bar from `get_progress` (0 to 1) until the block ends, in a background thread."""
        ended = new_event()

        def follow() -> None:
            while not ended.wait(_UPDATE_INTERVAL):
                self.update(get_progress() * self._total)

        # An error in `get_progress` stops only the bar, not the work.
        thread = start_thread("progress", follow, on_failure=lambda _error: None)
        try:
            yield
            self.update(get_progress() * self._total)
        finally:
            ended.set()
            thread.join(_UPDATE_INTERVAL)  # no longer: `get_progress` may hang together with the work

    def close(self) -> None:
        """Stop drawing the bar."""
        if self._bar is not None:
            self._bar.stop()

    def _draw(self) -> None:
        if self._bar is None or self._task is None:
            self._bar = _new_bar()
            self._task = self._bar.add_task(self._label, total=self._total, speed="")
            self._bar.start()
        self._bar.update(self._task, completed=self._done, speed=self._format_speed())

    def _log(self) -> None:
        tenths = int(10 * self._done / self._total)
        if tenths > self._tenths_logged:
            self._tenths_logged = tenths
            sys.stderr.write(f"{self._label} {10 * tenths}% {self._format_speed()}\n")

    def _format_speed(self) -> str:
        """Format rate and remaining time: `10 MB/s, 9 s left`."""
        rate = self._rate.per_second
        remaining = f", {(self._total - self._done) / rate:.0f} s left" if rate and self._done < self._total else ""
        return f"{rate / 1e6:.0f} MB/s{remaining}"


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[ProgressBar]:
    """Yield a `ProgressBar` for `total` bytes, and close it at the end of the block."""
    bar = ProgressBar(label, total)
    try:
        yield bar
    finally:
        bar.close()


def _new_bar() -> "Progress":
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[speed]}"),
    )
    return progress.Progress(*columns, console=Console(stderr=True))
