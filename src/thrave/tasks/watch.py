"""A look at a task's record, four times a second, while a long step of it runs.

It carries the progress there, and word of a cancellation back. Work that waits asks `pause`, work that goes through a
list asks `each`, and work that can only be stopped from another thread is handed to `over`.
"""

import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

from thrave.tasks.failures import Cancelled
from thrave.tasks.records import Records
from thrave.tasks.states import BundleTaskState

INTERVAL = 0.25  # seconds between two looks; a cancellation is to take effect within two seconds

_Item = TypeVar("_Item")


class Work(Protocol):
    """Something that goes on for long in other threads."""

    @property
    def progress(self) -> float:
        """How much of it is done, from 0 to 1; never falls."""
        ...

    def cancel(self) -> None:
        """Make whoever waits for it stop waiting, with any error; called from another thread, perhaps after the end."""
        ...


class Watch:
    """Watches over a task, as a context manager around the work of one of its states."""

    def __init__(self, records: Records, bundle_id: str) -> None:
        """Watch the record of `bundle_id`."""
        self._records = records
        self._bundle_id = bundle_id
        self._work: Work | None = None
        self._done = 0.0
        self._cancelled = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name=f"watch {bundle_id}", daemon=True)

    def over(self, work: Work) -> None:
        """Carry this work's progress to the record from now on, and cancel it when the task is cancelled."""
        self._work = work

    def each(self, items: Sequence[_Item]) -> Iterator[_Item]:
        """Go through `items`, which makes them the work. Raises Cancelled as soon as the task is cancelled."""
        for done, item in enumerate(items):
            self._done = done / len(items)
            self.check()
            yield item

    def pause(self, seconds: float) -> None:
        """Wait. Raises Cancelled as soon as the task is cancelled."""
        self._over.wait(seconds)
        self.check()

    def check(self) -> None:
        """Raise Cancelled if the task has been cancelled."""
        if self._cancelled:
            raise Cancelled

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the watch. Raises Cancelled if the task was cancelled, whatever that did to the work."""
        self._over.set()
        self._thread.join()
        if self._cancelled:
            raise Cancelled from error

    def _look(self) -> None:
        while not self._over.wait(INTERVAL):
            task = self._records.get(self._bundle_id)
            if task is None or task.state is BundleTaskState.CANCELLING:
                self._cancelled = True
                if self._work is not None:
                    self._work.cancel()
                return
            done = self._work.progress if self._work is not None else self._done
            self._records.advance(self._bundle_id, task.state, int(100 * done))
