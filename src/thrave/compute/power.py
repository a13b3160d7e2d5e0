"""Shuts instances down, and carries out power requests in the background. Never cuts the power.

`shut_down_guest` waits until a guest is off. `PowerControl` is what the EC2 actions use: it records a request and does
not wait. `BackgroundPower` carries out the requests that `power_records.py` has recorded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import sqlalchemy as sa
import structlog

from thrave.compute.base import HypervisorDriver
from thrave.compute.errors import (
    IncorrectInstanceState,
    InstanceCommandFailed,
    InstanceLocked,
    InstanceNotFound,
    StateChangedError,
)
from thrave.compute.instance import TERMINATING, InstanceState
from thrave.compute.power_records import PowerAction, PowerRecord, PowerRecords
from thrave.compute.progress_timeout import RunningTime
from thrave.compute.timeouts import is_busy
from thrave.concurrency import Event, Lock, monotonic, new_event, new_lock, sleep, start_thread
from thrave.write_guard import command_guard

SHUTDOWN_REQUEST_INTERVAL = 5.0  # seconds; a guest that is booting ignores a request to power off
POLL_INTERVAL = 0.2  # seconds
_MAX_COUNTED_INTERVAL = 30.0  # seconds between two polls; of a longer interval the process was stopped for the rest
MAX_RETRY_INTERVAL = 300.0  # seconds
_LOCKED_POLL_INTERVAL = 1.0  # seconds
UP_STATES = frozenset({InstanceState.PENDING, InstanceState.RUNNING})
STARTABLE_STATES = frozenset({InstanceState.STOPPED, InstanceState.PENDING})
"""States from which an instance is started. An interrupted start leaves it `pending`, perhaps off."""

log = structlog.get_logger()

_power_locks: dict[str, Lock] = {}
_power_locks_lock = new_lock()


@contextmanager
def power_lock(instance_id: str) -> Iterator[None]:
    """Lock the decision about an instance's power, and its command, against other threads of this process.

    Read the wanted power state within the block, before you start an instance or end a request because of the state
    that you read. Otherwise a start that an older request caused could follow after a newer request has ended.

    Raises:
        InstanceLocked: Another thread has the lock, or an abandoned command may still be carried out.
    """
    with _power_locks_lock:
        lock = _power_locks.setdefault(instance_id, new_lock())
    if not lock.acquire(blocking=False):
        raise InstanceLocked(instance_id)
    try:
        if is_busy(instance_id):
            raise InstanceLocked(instance_id)
        yield
    finally:
        lock.release()


def shut_down_guest(
    driver: HypervisorDriver,
    instance_id: str,
    *,
    timeout: float,
    request: Callable[[str], None] | None = None,
    pause: Callable[[float], object] = sleep,
) -> InstanceState:
    """Request that the guest powers off, repeatedly, until it is off or terminating.

    Args:
        driver: Of the instance.
        instance_id: The instance.
        timeout: Seconds that the guest has. Time in which this process was stopped does not count.
        request: Requests the shutdown; by default `driver.request_stop`.
        pause: Waits some seconds between two polls; may raise, to give up.

    Returns:
        The last state: `stopped`, `shutting-down`, `terminated`, or another one after the timeout.

    Raises:
        InstanceError: As `HypervisorDriver.state` and `HypervisorDriver.request_stop`.
    """
    request = request or driver.request_stop
    running_time, waited = RunningTime(_MAX_COUNTED_INTERVAL, monotonic), 0.0
    next_request = 0.0
    while (state := driver.state(instance_id)) not in {InstanceState.STOPPED, *TERMINATING}:
        waited += running_time.passed()
        if waited > timeout:
            break
        if monotonic() > next_request:
            request(instance_id)
            next_request = monotonic() + SHUTDOWN_REQUEST_INTERVAL
        pause(POLL_INTERVAL)
    return state


class PowerControl(Protocol):
    """Records power requests for callers that do not wait. The last request of an instance wins.

    When a method returns, the request is recorded. It is then carried out even if a process crashes. `requester` is the
    account that makes the request. Every method raises IncorrectInstanceState if the instance is being terminated,
    except `reboot`, which does nothing then.
    """

    def start(self, instance_id: str, requester: str | None = None) -> None:
        """Start the instance as soon as it is not locked."""

    def stop(self, instance_id: str, requester: str | None = None) -> None:
        """Ask the guest to power off.

        Raises:
            IncorrectInstanceState: There is no way to stop it. A fleet's API process cannot detect this.
            InstanceCommandFailed: The hypervisor refuses at once; then nothing is recorded.
        """

    def reboot(self, instance_id: str, requester: str | None = None) -> None:
        """Ask the guest to power off, then start the instance. If the guest does not react it keeps running."""

    def terminate(self, instance_id: str, requester: str | None = None) -> None:
        """Ask the guest to power off for good. Raises as `stop`."""


class BackgroundPower:
    """Carries out recorded power requests, with one thread for each instance.

    A request ends when the instance has the requested state. Until then it is retried, with growing intervals, also
    after a crash (`resume_pending`). The row is read again before each command, so that no command is given for a
    request that a newer one has replaced. A failure affects one instance only.

    Args:
        driver: Of the instances.
        power_records: The recorded requests; by default in memory, where they are lost when the process ends.
        shutdown_timeout: Seconds that a guest has to power off for a reboot.
        check_lease: Called before each command to the hypervisor; raises if this process may not give one.
    """

    def __init__(
        self,
        driver: HypervisorDriver,
        power_records: PowerRecords | None = None,
        *,
        shutdown_timeout: float,
        check_lease: Callable[[], None] = lambda: None,
    ) -> None:
        self._driver = driver
        self._power_records = power_records or PowerRecords.in_memory()
        self._shutdown_timeout = shutdown_timeout
        self._check_lease = check_lease
        self._wake_events: dict[str, Event] = {}  # of the instances that have a thread; ends the thread's wait
        self._workers: dict[str, _InstanceWorker] = {}
        self._lock = new_lock()

    def start(self, instance_id: str, requester: str | None = None) -> None:
        """See `PowerControl`."""
        self._power_records.add_request(instance_id, PowerAction.START, requester)
        self._ensure_thread(instance_id)

    def reboot(self, instance_id: str, requester: str | None = None) -> None:
        """See `PowerControl`."""
        self._power_records.add_request(instance_id, PowerAction.REBOOT, requester)
        self._ensure_thread(instance_id)

    def stop(self, instance_id: str, requester: str | None = None) -> None:
        """See `PowerControl`."""
        self._request_and_try(instance_id, PowerAction.STOP, requester)

    def terminate(self, instance_id: str, requester: str | None = None) -> None:
        """See `PowerControl`."""
        self._request_and_try(instance_id, PowerAction.TERMINATE, requester)

    def resume_pending(self) -> None:
        """Continue every pending request: of other processes, and of this process before it was restarted."""
        for instance_id, version in self._power_records.list_pending().items():
            # A new request that another process has recorded must not wait until the failed one is retried.
            self._ensure_thread(instance_id, wake=self._worker(instance_id).version != version)

    def _request_and_try(self, instance_id: str, action: PowerAction, requester: str | None) -> None:
        """Record a request and try it once, so that its caller receives a refusal."""
        before = self._power_records.add_request(instance_id, action, requester)
        try:
            self._worker(instance_id).step(only_version=before.version + 1)
        except (StateChangedError, InstanceLocked):  # another thread or process changes its power at the moment
            self._ensure_thread(instance_id)
        except (IncorrectInstanceState, InstanceCommandFailed):
            self._power_records.withdraw_request(before)
            self._ensure_thread(instance_id)
            raise
        except Exception as error:  # noqa: BLE001 (the request is recorded, and is retried)
            log.warning("power request failed, retrying", instance_id=instance_id, request=action, error=str(error))
            self._ensure_thread(instance_id)
        else:
            self._ensure_thread(instance_id)

    def _worker(self, instance_id: str) -> "_InstanceWorker":
        with self._lock:
            if (worker := self._workers.get(instance_id)) is None:
                worker = _InstanceWorker(
                    self._driver, self._power_records, instance_id, self._shutdown_timeout, self._check_lease
                )
                self._workers[instance_id] = worker
            return worker

    def _ensure_thread(self, instance_id: str, *, wake: bool = True) -> None:
        """Start the thread of an instance unless there is one; `wake`: end its wait for the next attempt."""
        with self._lock:
            if (running := self._wake_events.get(instance_id)) is not None:
                if wake:
                    running.set()
                return
            self._wake_events[instance_id] = wake_event = new_event()
        try:
            start_thread(
                f"power {instance_id}",
                lambda: self._run(instance_id, wake_event),
                on_failure=lambda error: self._handle_failure(instance_id, error),
            )
        except RuntimeError as error:  # no thread can be started: `resume_pending` tries again
            self._handle_failure(instance_id, error)

    def _run(self, instance_id: str, wake_event: Event) -> None:
        """Carry out the requests of an instance until none is pending."""
        worker = self._worker(instance_id)
        while True:
            wake_event.clear()
            wait = worker.attempt()
            if wait is not None:
                wake_event.wait(wait)
                continue
            with self._lock:
                # A request may have been recorded since the attempt; its caller has set the event.
                if not wake_event.is_set():
                    del self._wake_events[instance_id]
                    return

    def _handle_failure(self, instance_id: str, error: BaseException) -> None:
        """Log the end of a thread. The request stays recorded, and `resume_pending` starts a new thread."""
        with self._lock:
            self._wake_events.pop(instance_id, None)
        if isinstance(error, sa.exc.DBAPIError):
            log.warning("database unavailable, power request delayed", instance_id=instance_id, error=str(error.orig))
        else:
            log.error("power request interrupted", instance_id=instance_id, exc_info=error)


class _InstanceWorker:
    """Carries out the requests of one instance step by step. Its timeouts begin again after a crash."""

    def __init__(
        self,
        driver: HypervisorDriver,
        power_records: PowerRecords,
        instance_id: str,
        shutdown_timeout: float,
        check_lease: Callable[[], None],
    ) -> None:
        self._driver = driver
        self._power_records = power_records
        self._instance_id = instance_id
        self._shutdown_timeout = shutdown_timeout
        self._check_lease = check_lease
        self._failure_count = 0
        self._begin_request(-1)

    @property
    def version(self) -> int:
        """Version of the request of the last step."""
        return self._version

    def attempt(self) -> float | None:
        """Perform the next step; return the seconds until the step after it, or None if no request is pending.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: The row cannot be read or written.
        """
        try:
            wait = self.step()
        except sa.exc.SQLAlchemyError:
            raise
        except InstanceLocked:
            return _LOCKED_POLL_INTERVAL
        except StateChangedError:
            return POLL_INTERVAL
        except (IncorrectInstanceState, InstanceNotFound) as error:
            self._end_request("power request impossible", str(error))
            return 0.0
        except Exception as error:  # noqa: BLE001 (an error of any kind affects one instance, and is retried)
            # Not `retry`: a new request for the instance ends the wait, and each attempt reads the request again.
            wait = min(POLL_INTERVAL * 2**self._failure_count, MAX_RETRY_INTERVAL)
            self._failure_count += 1
            log.warning(
                "power request failed, retrying", instance_id=self._instance_id, attempt=self._failure_count,
                error=str(error) or type(error).__name__,
            )  # fmt: skip
        else:
            self._failure_count = 0
        return wait

    def step(self, *, only_version: int | None = None) -> float | None:
        """As `attempt`, but raise every error.

        Args:
            only_version: Do nothing if the row has another version; None: any version.
        """
        with power_lock(self._instance_id):
            record = self._power_records.get(self._instance_id)
            if record.request is None or only_version not in {None, record.version}:
                return None
            if record.version != self._version:
                self._begin_request(record.version)
            if record.is_task_active and record.request is not PowerAction.TERMINATE:
                return (
                    _LOCKED_POLL_INTERVAL  # the bundle task restores the wanted state when it gives the instance back
                )
            if record.is_expired:
                message = "it could not be carried out in time"
                self._end_request("power request expired", message, end=self._power_records.expire_request)
                return 0.0
            return self._carry_out(record, self._driver.state(self._instance_id))

    def _begin_request(self, version: int) -> None:
        self._version = version
        self._failure_count = 0
        self._start_time = monotonic()
        self._first_shutdown_request: float | None = None
        self._next_shutdown_request = 0.0
        self._late_request_count = 0

    def _carry_out(self, record: PowerRecord, state: InstanceState) -> float | None:
        """Perform the next step of a request on an instance in this state."""
        if state is InstanceState.TERMINATED or (state in TERMINATING and record.request is not PowerAction.TERMINATE):
            return self._finish(record)
        if record.request is PowerAction.TERMINATE:
            return self._request_shutdown(record, self._driver.terminate)
        if record.request is PowerAction.STOP:
            if state is InstanceState.STOPPED:
                return self._finish(record)
            return self._request_shutdown(record, self._driver.request_stop)
        # A description file says `stopping` for ever if the process that ran the stopCommand has died.
        is_late = monotonic() - self._start_time > self._shutdown_timeout
        if state is InstanceState.STOPPED or (state is InstanceState.STOPPING and is_late):
            return self._start(record)
        return self._reboot(record, state) if record.request is PowerAction.REBOOT else self._confirm_up(record, state)

    def _start(self, record: PowerRecord) -> float | None:
        # Also written if nothing changes: the update fails if another host has the instance now.
        if not self._power_records.record_off(record):
            return 0.0
        with command_guard.using(self._check_lease):
            self._driver.start(self._instance_id)
        return self._finish(record)

    def _confirm_up(self, record: PowerRecord, state: InstanceState) -> float | None:
        """End a start of an instance that is up. First wait while an earlier request may still power it off."""
        is_late = monotonic() - self._start_time > 2 * self._shutdown_timeout
        if state in UP_STATES and (is_late or not record.is_shutdown_requested):
            return self._finish(record) if state is InstanceState.RUNNING else self._start(record)
        return self._poll_wait()

    def _reboot(self, record: PowerRecord, state: InstanceState) -> float | None:
        waited = 0.0 if self._first_shutdown_request is None else monotonic() - self._first_shutdown_request
        if waited <= self._shutdown_timeout:
            return self._request_shutdown(record, self._driver.request_stop)
        # No more requests. The guest may still power off because of an earlier request. Then `_carry_out` starts it.
        if state in UP_STATES and waited > 2 * self._shutdown_timeout:
            message = f"the guest did not power off within {self._shutdown_timeout:.0f} seconds"
            self._end_request("power request failed", message)
            return 0.0
        return self._poll_wait()

    def _request_shutdown(self, record: PowerRecord, request: Callable[[str], None]) -> float:
        """Ask the guest to power off if a request is due. The intervals double after the shutdown timeout."""
        now = monotonic()
        if now >= self._next_shutdown_request:
            if not self._power_records.record_shutdown_request(record):
                return 0.0
            with command_guard.using(self._check_lease):
                request(self._instance_id)
            if self._first_shutdown_request is None:
                self._first_shutdown_request = now
            self._late_request_count += now - self._first_shutdown_request > self._shutdown_timeout
            interval = min(SHUTDOWN_REQUEST_INTERVAL * 2**self._late_request_count, MAX_RETRY_INTERVAL)
            self._next_shutdown_request = now + interval
        return self._poll_wait()

    def _poll_wait(self) -> float:
        """Return the seconds until the next poll: 0.2, and longer the older the request is; at most 5."""
        return min(POLL_INTERVAL + (monotonic() - self._start_time) / 10, SHUTDOWN_REQUEST_INTERVAL)

    def _finish(self, record: PowerRecord) -> float:
        self._power_records.finish_request(record)
        return 0.0

    def _end_request(self, event: str, message: str, end: Callable[[PowerRecord], bool] | None = None) -> None:
        """End a request that cannot be carried out, and log an error: an operator may have to act."""
        end = end or self._power_records.drop_request
        record = self._power_records.get(self._instance_id)
        if record.request is not None and record.version == self._version and end(record):
            log.error(event, instance_id=self._instance_id, request=record.request, error=message)
