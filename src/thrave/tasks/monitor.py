"""Watches a step of a task while it runs, from threads of its own.

- The record is read four times a second: a task that was cancelled, has ended, or belongs to another host now has its
  work stopped. So has one whose host could not renew its lease.
- Work that has stood still for too long is stopped: neither a byte read nor an object stored. How long the whole takes
  does not matter, since no total is right for every disk. Only time in which this process ran counts.
- A guard looks whether the volume that is read still stands still.
- Progress is carried to the record.

None of these waits for another, so that progress that cannot be told, or a database that hangs, does not keep work from
being stopped. Work that waits asks `pause`; work that can only be stopped from another thread is handed to `over`; a
call that may hang is waited for by `result_of`.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import structlog

from thrave.compute.errors import HoldLostError, InstanceError, InstanceNotFound, RootVolumeInUse
from thrave.concurrency import Background, Call, repeat, supervised
from thrave.tasks.errors import ErrorKind, TaskCancelled, TaskFailure, kind_of, may_pass, to_task_failure
from thrave.tasks.lease import Lease, LeaseExpiredError, RightLostError
from thrave.tasks.models import FINISHED, BundleTask, BundleTaskState
from thrave.tasks.repository import TaskRepository

INTERVAL = 0.25  # seconds between two looks; a cancellation is to take effect within two seconds
GUARD_INTERVAL = 1.0  # seconds between two looks at whether the volume still stands still
GUARD_TIMEOUT = 60.0  # seconds for which that need not be known; asked once more at the end
_LONGEST_TICK = 2.0  # seconds; the process itself stood still for the rest of a longer one
_RECORD, _PROGRESS = "record", "progress"
_LAST_LOOK = 2.0  # seconds that the threads have to end; a database that does not answer may hold them for longer

log = structlog.get_logger()
_Result = TypeVar("_Result")


class TaskMonitor:
    """Watches over a task, as a context manager around the work of one of its states."""

    def __init__(
        self,
        records: TaskRepository,
        bundle_id: str,
        *,
        stall_timeout: float,
        is_ours: Callable[[BundleTask], bool] = lambda _task: True,
        lease: Lease | None = None,
    ) -> None:
        """Watch the record of `bundle_id`.

        Args:
            records: Where the record is.
            bundle_id: The task.
            stall_timeout: Seconds for which its work may stand still.
            is_ours: Whether this run may work on the task, by its record.
            lease: Until when this host may act while the record cannot be read.
        """
        self._records = records
        self._bundle_id = bundle_id
        self._stall_timeout = stall_timeout
        self._is_ours = is_ours
        self._lease = lease
        self._cancel: Callable[[], None] = lambda: None
        self._progress: Callable[[], float] = lambda: 0.0
        self._state: BundleTaskState | None = None
        self._percent = -1
        self._lock = threading.Lock()
        self._reason: Exception | None = None
        self._over = threading.Event()
        self._threads: list[Background] = []
        self._running = 0.0  # seconds in which this process ran and watched
        self._moved = 0.0  # the same when the work last moved
        self._looked: float | None = None  # the same when the guard last saw that the volume stands still
        self._trouble: Exception | None = None  # why it could not see it since

    def watch(self, cancel: Callable[[], None], progress: Callable[[], float] | None = None) -> None:
        """Watch over this work from now on.

        Args:
            cancel: Makes whoever waits for the work stop waiting, with any error; called from another thread, perhaps
                after the end.
            progress: How much of it is done, from 0 to 1; never falls. As before, unless given.

        Raises:
            Exception: It is to stop before it has begun.
        """
        self._cancel = cancel
        self._progress = progress or self._progress
        self.report_activity()
        self.check()

    def report_activity(self) -> None:
        """Take note that the work has got on: something was read, or stored. Any thread may call this, often."""
        self._moved = self._running

    def add_check(self, check: Callable[[], None]) -> None:
        """Ask `check` from now on, once a second; stop the work if it raises.

        What it raises because it cannot be told for a while is passed over, for `GUARD_TIMEOUT` seconds: whoever gave
        the check asks once more at the end. After that time the work ends with HoldLostError, and can be repeated.
        """
        self._looked = self._running
        supervised(f"guard {self._bundle_id}", partial(self._guard, check), on_failure=self._fail)

    def add_event(self, message: str) -> None:
        """Write down among the task's events what the work has met."""
        self._records.add_event(self._bundle_id, message)

    def pause(self, seconds: float) -> None:
        """Wait, as a part of the work that has a deadline of its own; as soon as it is to stop, raise why."""
        self._over.wait(seconds)
        self.report_activity()
        self.check()
        if self._over.is_set():  # a call that was abandoned when the step ended
            raise RightLostError(self._bundle_id)

    def wait_for(self, call: Call[_Result]) -> _Result:
        """Wait for a call, as a part of the work, and give its result.

        Raises:
            Exception: What the call raised, or, though the call still runs, why the work is to stop.
        """
        while not call.wait(INTERVAL):
            self.check()
        self.report_activity()
        return call.result(0)

    def check(self) -> None:
        """Raise why the work is to stop, if it is: Cancelled, RightLostError, a TaskFailure if it stands still, ..."""
        if self._reason is not None:
            raise self._reason

    def __enter__(self) -> Self:
        try:
            self._thread = supervised(f"watch {self._bundle_id}", self._monitor, on_failure=self._fail)
            self._threads = [self._thread, self._repeat(_RECORD, self._look), self._repeat(_PROGRESS, self._carry)]
        except BaseException:  # no thread can be started; those that were must not stay
            self._over.set()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the watch. Raises the reason if it has stopped the work, whatever that did to the work."""
        self._over.set()
        until = time.monotonic() + _LAST_LOOK
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if self._reason is not None:
            raise self._reason from error

    def _repeat(self, name: str, work: Callable[[], None]) -> Background:
        report = partial(self._pass_over, name)
        return repeat(f"{name} {self._bundle_id}", INTERVAL, work, on_failure=report, stop=self._over, at_once=False)

    def _monitor(self) -> None:
        """Measure time, and see whether the work, the guard or the lease stands still; nothing here can hang."""
        ticked = time.monotonic()
        while self._reason is None and not self._over.wait(INTERVAL):
            now = time.monotonic()
            self._running += min(now - ticked, _LONGEST_TICK)
            ticked = now
            if self._lease is not None and not self._lease.holds():
                self._end(LeaseExpiredError())
            elif self._running - self._moved >= self._stall_timeout:
                self._end(self._stalled())
            elif self._looked is not None and self._running - self._looked >= GUARD_TIMEOUT:
                self._end(self._unguarded())

    def _look(self) -> None:
        """See by the record whether the work is to stop."""
        task = self._records.get(self._bundle_id)
        if task is not None and task.state is BundleTaskState.CANCELLING:
            self._end(TaskCancelled())
        elif task is None or task.state in FINISHED or not self._is_ours(task):
            self._end(RightLostError(self._bundle_id))
        else:
            self._state = task.state

    def _carry(self) -> None:
        """Carry the progress to the record."""
        state, percent = self._state, int(100 * self._progress())
        if state is not None and percent != self._percent:
            self._records.set_progress(self._bundle_id, state, percent)
            self._percent = percent

    def _guard(self, check: Callable[[], None]) -> None:
        while self._reason is None and not self._over.wait(GUARD_INTERVAL):
            try:
                check()
            except (InstanceNotFound, RootVolumeInUse, HoldLostError):
                raise
            except (InstanceError, OSError) as error:
                self._trouble = error
                log.warning("an instance cannot be looked at", bundle_id=self._bundle_id, reason=str(error))
            else:
                self._looked, self._trouble = self._running, None

    def _pass_over(self, name: str, error: BaseException) -> None:
        """What the record cannot be asked or told now may be asked or told the next time."""
        if may_pass(error):
            log.warning("a task's record cannot be reached", bundle_id=self._bundle_id, error=type(error).__name__)
        elif name == _RECORD or kind_of(error) is ErrorKind.RIGHT_LOST:
            self._fail(error)
        else:
            log.error("the progress of a task cannot be told", bundle_id=self._bundle_id, exc_info=error)

    def _fail(self, error: BaseException) -> None:
        """Stop the work if what watches it has failed, or has found a reason."""
        self._end(error if isinstance(error, Exception) else RuntimeError(f"a task's monitor ended: {error!r}"))

    def _end(self, reason: Exception) -> None:
        with self._lock:
            if self._over.is_set() or self._reason is not None:  # the first reason counts
                return
            self._reason = reason if isinstance(reason, _AS_THEY_ARE) else to_task_failure(reason)
        self._cancel()

    def _stalled(self) -> TaskFailure:
        return TaskFailure("Server.NoProgress", f"Nothing could be read or stored for {self._stall_timeout:g} seconds.")

    def _unguarded(self) -> HoldLostError:
        """The step is repeated: it reads the volume anew, since whether it was written to meanwhile is not known."""
        assert self._looked is not None
        trouble = f": {self._trouble}" if self._trouble else ""
        lost = HoldLostError(
            self._trouble.instance_id if isinstance(self._trouble, InstanceError) else "",
            f"for {GUARD_TIMEOUT:g} seconds it could not be told whether the root volume is written to{trouble}",
        )
        lost.waited = self._running - self._looked
        return lost


# Whoever runs the step repeats it, or leaves the task alone.
_AS_THEY_ARE = (TaskFailure, HoldLostError, LeaseExpiredError, RightLostError)
