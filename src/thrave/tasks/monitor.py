"""Monitors a step of a task while it runs: cancellation, stall, volume check, progress. Each has its own thread.

A database that hangs does not delay a stop. Work stops in one of three ways: work that waits calls `pause`; work that
another thread must stop is passed to `watch`; for a call that may hang, the caller uses `wait_for_result`.
"""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import structlog

from thrave.compute.errors import HoldLostError, InstanceError, InstanceNotFound, RootVolumeInUse
from thrave.concurrency import Call, RunningThread, monotonic, new_event, new_lock, start_repeating, start_thread
from thrave.tasks.errors import ErrorKind, TaskCancelled, TaskFailure, kind_of, may_pass, to_task_failure
from thrave.tasks.lease import LeaseExpiredError, LeaseTimer, RightLostError
from thrave.tasks.models import FINISHED, BundleTask, BundleTaskState
from thrave.tasks.repository import TaskRepository

INTERVAL = 0.25  # seconds between two checks; a cancellation must take effect within two seconds
CHECK_INTERVAL = 1.0  # seconds between two checks that nothing writes to the volume
CHECK_TIMEOUT = 60.0  # seconds without a result of that check after which the work stops
_MAX_TICK = 2.0  # seconds between two ticks; if more have passed, the process was suspended
_RECORD, _PROGRESS = "record", "progress"
_JOIN_TIMEOUT = 2.0  # seconds to wait for the threads to end; a database that does not respond may hold them longer

log = structlog.get_logger()
_Result = TypeVar("_Result")


class TaskMonitor:
    """Monitors a task, as a context manager around the work of one of its states."""

    def __init__(
        self,
        records: TaskRepository,
        bundle_id: str,
        *,
        stall_timeout: float,
        is_ours: Callable[[BundleTask], bool] = lambda _task: True,
        lease_timer: LeaseTimer | None = None,
    ) -> None:
        """Monitor the task `bundle_id`.

        Args:
            records: The repository of the tasks.
            bundle_id: The task.
            stall_timeout: Seconds without progress (a byte read, an object stored) after which the work stops. There is
                no limit on the total time, since no limit fits every disk. Time while the process is suspended does not
                count.
            is_ours: Whether this run may work on the task, by its row.
            lease_timer: How long this host may act while the row cannot be read.
        """
        self._records = records
        self._bundle_id = bundle_id
        self._stall_timeout = stall_timeout
        self._is_ours = is_ours
        self._lease_timer = lease_timer
        self._cancel: Callable[[], None] = lambda: None
        self._progress: Callable[[], float] = lambda: 0.0
        self._state: BundleTaskState | None = None
        self._percent = -1
        self._lock = new_lock()
        self._reason: Exception | None = None
        self._ended = new_event()
        self._threads: list[RunningThread] = []
        self._elapsed = 0.0  # seconds in which this process ran
        self._last_activity = 0.0  # `_elapsed` at the last progress of the work
        self._last_check: float | None = None  # `_elapsed` at the last successful volume check
        self._check_error: Exception | None = None  # the error of the last volume check if it has failed

    def watch(self, cancel: Callable[[], None], progress: Callable[[], float] | None = None) -> None:
        """Monitor this work from now on.

        Args:
            cancel: Stops the work: its callers get an error. Called from another thread, possibly after the
                end of the work.
            progress: Returns the share of the work that is done, from 0 to 1; never falls. None: as before.

        Raises:
            Exception: The work has to stop before it has started.
        """
        self._cancel = cancel
        self._progress = progress or self._progress
        self.report_activity()
        self.check()

    def report_activity(self) -> None:
        """Report progress of the work: something was read or stored. Any thread may call this, often."""
        self._last_activity = self._elapsed

    def add_check(self, check: Callable[[], None]) -> None:
        """Call `check` once a second from now on; stop the work if it raises.

        Errors of an unavailable hypervisor or host are ignored for `CHECK_TIMEOUT` seconds; the caller must check once
        more at the end of the work. After that time the work ends with HoldLostError, and may be repeated.
        """
        self._last_check = self._elapsed
        start_thread(f"volume check {self._bundle_id}", partial(self._repeat_check, check), on_failure=self._fail)

    def add_event(self, message: str) -> None:
        """Add an event to the task."""
        self._records.add_event(self._bundle_id, message)

    def pause(self, seconds: float) -> None:
        """Wait in work that has a timeout of its own; raise as soon as the work has to stop."""
        self._ended.wait(seconds)
        self.report_activity()
        self.check()
        if self._ended.is_set():  # the caller was abandoned when the step ended
            raise RightLostError(self._bundle_id)

    def wait_for_result(self, call: Call[_Result]) -> _Result:
        """Wait for a call that is part of the work, and return its result.

        Raises:
            Exception: What the call raised; or why the work has to stop, although the call still runs.
        """
        while not call.wait(INTERVAL):
            self.check()
        self.report_activity()
        return call.result(0)

    def check(self) -> None:
        """Raise why the work has to stop, if so: TaskCancelled, RightLostError, TaskFailure after a stall, ..."""
        if self._reason is not None:
            raise self._reason

    def __enter__(self) -> Self:
        try:
            self._thread = start_thread(f"monitor {self._bundle_id}", self._monitor, on_failure=self._fail)
            self._threads = [
                self._thread,
                self._repeat(_RECORD, self._check_record),
                self._repeat(_PROGRESS, self._record_progress),
            ]
        except BaseException:  # a thread cannot be started: end those that were started
            self._ended.set()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop monitoring. Raises the reason if the monitor has stopped the work, in place of the work's own error."""
        self._ended.set()
        until = monotonic() + _JOIN_TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, until - monotonic()))
        if self._reason is not None:
            raise self._reason from error

    def _repeat(self, name: str, work: Callable[[], None]) -> RunningThread:
        report = partial(self._handle_error, name)
        return start_repeating(
            f"{name} {self._bundle_id}", INTERVAL, work, on_failure=report, stop=self._ended, at_once=False
        )

    def _monitor(self) -> None:
        """Measure time; stop the work if it, the volume check or the lease stalls. Nothing here can hang."""
        last_tick = monotonic()
        while self._reason is None and not self._ended.wait(INTERVAL):
            now = monotonic()
            self._elapsed += min(now - last_tick, _MAX_TICK)
            last_tick = now
            if self._lease_timer is not None and not self._lease_timer.is_valid():
                self._stop(LeaseExpiredError())
            elif self._elapsed - self._last_activity >= self._stall_timeout:
                self._stop(self._stalled())
            elif self._last_check is not None and self._elapsed - self._last_check >= CHECK_TIMEOUT:
                self._stop(self._unchecked())

    def _check_record(self) -> None:
        """Stop the work if the task was cancelled, has ended, or belongs to another run or host."""
        task = self._records.get(self._bundle_id)
        if task is not None and task.state is BundleTaskState.CANCELLING:
            self._stop(TaskCancelled())
        elif task is None or task.state in FINISHED or not self._is_ours(task):
            self._stop(RightLostError(self._bundle_id))
        else:
            self._state = task.state

    def _record_progress(self) -> None:
        state, percent = self._state, int(100 * self._progress())
        if state is not None and percent != self._percent:
            self._records.set_progress(self._bundle_id, state, percent)
            self._percent = percent

    def _repeat_check(self, check: Callable[[], None]) -> None:
        while self._reason is None and not self._ended.wait(CHECK_INTERVAL):
            try:
                check()
            except (InstanceNotFound, RootVolumeInUse, HoldLostError):
                raise
            except (InstanceError, OSError) as error:
                self._check_error = error
                log.warning("volume check failed, retrying", bundle_id=self._bundle_id, error=str(error))
            else:
                self._last_check, self._check_error = self._elapsed, None

    def _handle_error(self, name: str, error: BaseException) -> None:
        """Ignore a transient error of reading or writing the row: the next attempt may succeed."""
        if may_pass(error):
            log.warning("task row unavailable, retrying", bundle_id=self._bundle_id, error=type(error).__name__)
        elif name == _RECORD or kind_of(error) is ErrorKind.RIGHT_LOST:
            self._fail(error)
        else:
            log.error("task progress not recorded", bundle_id=self._bundle_id, exc_info=error)

    def _fail(self, error: BaseException) -> None:
        """Stop the work because a thread of the monitor has failed, or has found a reason."""
        self._stop(error if isinstance(error, Exception) else RuntimeError(f"a task's monitor ended: {error!r}"))

    def _stop(self, reason: Exception) -> None:
        with self._lock:
            if self._ended.is_set() or self._reason is not None:  # keep the first reason
                return
            self._reason = reason if isinstance(reason, _NOT_TRANSLATED) else to_task_failure(reason)
        self._cancel()

    def _stalled(self) -> TaskFailure:
        return TaskFailure(
            "Server.NoProgress", f"No progress for {self._stall_timeout:g} seconds: no byte read, no object stored."
        )

    def _unchecked(self) -> HoldLostError:
        """The step is repeated and reads the volume again: it may have been written to meanwhile."""
        assert self._last_check is not None
        reason = f": {self._check_error}" if self._check_error else ""
        lost = HoldLostError(
            self._check_error.instance_id if isinstance(self._check_error, InstanceError) else "",
            f"for {CHECK_TIMEOUT:g} seconds it could not be checked whether the root volume is written to{reason}",
        )
        lost.waited = self._elapsed - self._last_check
        return lost


# The workflow repeats the step after these errors, or stops without a record of the error.
_NOT_TRANSLATED = (TaskFailure, HoldLostError, LeaseExpiredError, RightLostError)
