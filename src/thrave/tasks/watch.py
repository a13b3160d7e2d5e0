"""A look at a task's record, four times a second, while a long step of it runs.

It carries the progress there, and word of a cancellation back, and ends what has stood still for too long: neither a
byte read nor an object stored. How long the whole takes is nobody's business, since no total is right for every disk.
Work that waits asks `pause`; work that can only be stopped from another thread is handed to `over`.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

import structlog
from sqlalchemy.exc import SQLAlchemyError

from thrave.compute.errors import InstanceError, InstanceNotFound, RootVolumeInUse
from thrave.concurrency import Background, supervised
from thrave.tasks.failures import Cancelled, TaskFailure, failure_from
from thrave.tasks.records import Records
from thrave.tasks.states import BundleTaskState

_LAST_LOOK = 10.0  # seconds that the monitor has to end; it may wait for the database
INTERVAL = 0.25  # seconds between two looks; a cancellation is to take effect within two seconds
GUARD_INTERVAL = 1.0  # seconds between two looks at whether the volume still stands still

log = structlog.get_logger()


class Watch:
    """Watches over a task, as a context manager around the work of one of its states."""

    def __init__(self, records: Records, bundle_id: str, *, stall_timeout: float) -> None:
        """Watch the record of `bundle_id`; stop its work once it has not moved for `stall_timeout` seconds."""
        self._records = records
        self._bundle_id = bundle_id
        self._stall_timeout = stall_timeout
        self._cancel: Callable[[], None] = lambda: None
        self._progress: Callable[[], float] = lambda: 0.0
        self._percent = -1
        self._moved = time.monotonic()
        self._reason: TaskFailure | None = None
        self._over = threading.Event()
        self._thread: Background | None = None

    def over(self, cancel: Callable[[], None], progress: Callable[[], float] | None = None) -> None:
        """Watch over this work from now on.

        Args:
            cancel: Makes whoever waits for the work stop waiting, with any error; called from another thread, perhaps
                after the end.
            progress: How much of it is done, from 0 to 1; never falls. As before, unless given.

        Raises:
            TaskFailure: It is to stop before it has begun.
        """
        self._cancel = cancel
        self._progress = progress or self._progress
        self.moved()
        self.check()

    def moved(self) -> None:
        """Take note that the work has got on: something was read, or stored. Any thread may call this, often."""
        self._moved = time.monotonic()

    def guard(self, check: Callable[[], None]) -> None:
        """Ask `check` from now on, once a second; stop the work if it raises RootVolumeInUse or what ends a task.

        What cannot be told for a while is passed over: whoever gave the check asks once more at the end.
        """
        supervised(f"guard {self._bundle_id}", partial(self._guard, check), on_failure=self._fail)

    def tell(self, message: str) -> None:
        """Write down among the task's events what the work has met."""
        self._records.tell(self._bundle_id, message)

    def pause(self, seconds: float) -> None:
        """Wait, as a part of the work. Raises Cancelled as soon as the task is cancelled."""
        self._over.wait(seconds)
        self.moved()
        self.check()

    def check(self) -> None:
        """Raise Cancelled if the task has been cancelled, or a TaskFailure if it stands still."""
        if self._reason is not None:
            raise self._reason

    def __enter__(self) -> Self:
        self._thread = supervised(f"watch {self._bundle_id}", self._look, on_failure=self._fail)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the watch. Raises the reason if it has stopped the work, whatever that did to the work."""
        self._over.set()
        assert self._thread is not None
        self._thread.join(_LAST_LOOK)
        if self._reason is not None:
            raise self._reason from error

    def _look(self) -> None:
        while not self._over.wait(INTERVAL):
            reason = self._heard() or self._stalled()
            if reason is not None:  # or it would undo what the guard has found meanwhile
                self._reason = self._reason or reason
            if self._reason is not None:
                self._cancel()
                return

    def _guard(self, check: Callable[[], None]) -> None:
        while self._reason is None and not self._over.wait(GUARD_INTERVAL):
            try:
                check()
            except (TaskFailure, InstanceNotFound, RootVolumeInUse) as error:
                if not self._over.is_set():
                    self._reason = failure_from(error)
                    self._cancel()
            except InstanceError as error:
                log.warning("an instance cannot be looked at", bundle_id=self._bundle_id, reason=str(error))

    def _fail(self, error: BaseException) -> None:
        """Stop the work if what watches it fails: nobody would see that it is cancelled, or has stopped moving."""
        if not self._over.is_set():
            log.error("a task's monitor failed", bundle_id=self._bundle_id, exc_info=error)
            self._end(failure_from(error if isinstance(error, Exception) else RuntimeError(repr(error))))

    def _end(self, reason: TaskFailure) -> None:
        self._reason = self._reason or reason
        self._cancel()

    def _heard(self) -> TaskFailure | None:
        """Carry the progress to the record, and hear of a cancellation."""
        try:
            task = self._records.get(self._bundle_id)
            if task is None or task.state is BundleTaskState.CANCELLING:
                return Cancelled()
            self._carry(task.state, int(100 * self._progress()))
        except SQLAlchemyError as error:  # the database may be back at the next look
            log.warning("a task's record cannot be looked at", bundle_id=self._bundle_id, error=type(error).__name__)
        return None

    def _carry(self, state: BundleTaskState, percent: int) -> None:
        if percent != self._percent:
            self._records.advance(self._bundle_id, state, percent)
            self._percent = percent

    def _stalled(self) -> TaskFailure | None:
        if time.monotonic() - self._moved < self._stall_timeout:
            return None
        return TaskFailure("Server.NoProgress", f"Nothing could be read or stored for {self._stall_timeout:g} seconds.")
