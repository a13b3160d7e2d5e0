"""The power of one task's instance: shut down, overlay, hold, restore.

After the task the instance has the power state that its owner wants: the state before the task, or what the owner has
requested since. The root volume is read only while the instance is off, or while it runs on a copy-on-write overlay. An
overlay is recorded before it is created, so after a crash it is found and merged. Power recovery of tasks that have
ended is in `housekeeping.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import Literal

import structlog

from thrave.compute.base import HypervisorDriver, Overlay, Overlays, VolumeHold
from thrave.compute.errors import (
    HypervisorError,
    IncorrectInstanceState,
    InstanceError,
    InstanceLocked,
    InstanceNotFound,
    OverlayNotSupported,
    RootVolumeInUse,
)
from thrave.compute.instance import TERMINATING, Instance, InstanceState
from thrave.compute.power import (
    SHUTDOWN_REQUEST_INTERVAL,
    STARTABLE_STATES,
    UP_STATES,
    power_lock,
    shut_down_guest,
)
from thrave.compute.power_records import PowerRecord, WantedPower
from thrave.compute.progress_timeout import ProgressPause
from thrave.concurrency import Call, CallTimeoutError, monotonic, sleep
from thrave.tasks.errors import TaskFailure, may_pass
from thrave.tasks.failpoints import failpoint
from thrave.tasks.lease import LeaseExpiredError
from thrave.tasks.models import STEPS_WITH_BORROWED_INSTANCE, BundleTask
from thrave.tasks.monitor import TaskMonitor
from thrave.tasks.repository import RECOVER_FOR, TaskRepository
from thrave.tasks.step_retry import retry_hypervisor
from thrave.write_guard import command_guard

ABANDON_AFTER = 10.0  # seconds: grace period after the timeout for a merge to return; then it is abandoned
STALL_TIMEOUT = 600.0  # seconds without progress after which a merge fails
CHECK_RETRY_TIMEOUT = 60.0  # seconds to reach the hypervisor for the last check that nothing wrote to a volume
_HOLD_ATTEMPTS = 3  # attempts to hold an instance that another client starts at the same moment

ShutdownTimeoutAction = Literal["fail", "power-off"]
"""What to do with a guest that does not power off in time."""

log = structlog.get_logger()


class RootOverlay:
    """Runs a task's instance on a copy-on-write overlay while its root volume is read."""

    def __init__(
        self,
        instances: HypervisorDriver,
        records: TaskRepository,
        task: BundleTask,
        *,
        stall_timeout: float = STALL_TIMEOUT,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Manage the overlay of the task's instance.

        Args:
            instances: The hypervisor driver.
            records: Of the tasks.
            task: The task.
            stall_timeout: Seconds without progress after which a merge fails.
            check: Called before each command to the hypervisor; raises if this process must not send any.
        """
        self._instances = instances
        self._records = records
        self._task = task
        self._stall_timeout = stall_timeout
        self._check = check

    @property
    def overlay(self) -> Overlay | None:
        """The task's overlay, recorded before it is created; None once it was merged."""
        return self._records.overlay(self._task.bundle_id)

    def create(self) -> None:
        """Create an overlay for the instance, which is off. If that is not supported, add a warning for the owner."""
        overlay = self.overlay or self._plan()
        if overlay is not None:
            with failpoint("overlay-created"), command_guard.using(self._check):
                self._overlays.attach(self._task.instance_id, overlay)

    @contextmanager
    def hold(self, overlay: Overlay, monitor: TaskMonitor) -> Iterator[Instance]:
        """Yield the instance and keep it on its overlay, so nothing writes to the volume.

        Raises:
            RootVolumeInUse: The instance is not on its overlay: before the block, during it or after it.
        """
        with self._overlays.hold_attached(self._task.instance_id, overlay) as hold:
            hold.check()
            monitor.add_check(hold.check)
            yield self._instances.get(self._task.instance_id)
            retry_hypervisor(hold.check, CHECK_RETRY_TIMEOUT, sleep=monitor.pause)

    def merge(self, pause: Callable[[float], object]) -> None:
        """Merge the instance's overlays into its root volume: the task's, and those of earlier tasks.

        Raises:
            InstanceError: The hypervisor refuses, or makes no progress. The instance keeps running; the call may be
                repeated.
            Exception: What `pause` raises. A merge that was started may continue in the hypervisor.
        """
        for bundle_id, overlay in self._records.overlays_of(self._task.instance_id):
            with failpoint("overlay-merged"), command_guard.using(self._check):
                pause_while_moving = ProgressPause(self._task.instance_id, pause, self._stall_timeout)
                self._overlays.merge(self._task.instance_id, overlay, pause_while_moving)
            self._records.record_overlay(bundle_id, None)

    def merge_with_timeout(self, seconds: float) -> None:
        """Merge as `merge`, without a monitor. Raises InstanceError if that takes longer than `seconds`."""
        timeout = HypervisorError(self._task.instance_id, f"the overlay is not merged after {seconds:.0f} seconds")
        until = monotonic() + seconds

        def pause(interval: float) -> None:
            if monotonic() > until:
                raise timeout
            sleep(interval)

        try:  # a call that hangs is abandoned; if the hypervisor responds later, `pause` ends the call
            Call("merge", lambda: self.merge(pause)).result(seconds + ABANDON_AFTER)
        except CallTimeoutError:
            raise timeout from None

    def _plan(self) -> Overlay | None:
        """Record the overlay to create; None if the instance can have none."""
        try:
            overlay = self._planned()
        except OverlayNotSupported as error:
            self._records.add_warning(
                self._task.bundle_id, f"The instance is off until its root volume has been read: {error}."
            )
            return None
        with failpoint("overlay-recorded"):
            self._records.record_overlay(self._task.bundle_id, overlay)
        return overlay

    def _planned(self) -> Overlay:
        if self._instances.overlays is None:
            raise OverlayNotSupported(self._task.instance_id, "its hypervisor has no overlays")
        return self._instances.overlays.plan(self._task.instance_id)

    @property
    def _overlays(self) -> Overlays:
        overlays = self._instances.overlays
        if overlays is None:
            raise HypervisorError(self._task.instance_id, "the hypervisor that the settings name has no overlays")
        return overlays


class InstancePower:
    """Shuts down a task's instance, keeps it off, and restores its power."""

    def __init__(
        self,
        instances: HypervisorDriver,
        records: TaskRepository,
        task: BundleTask,
        *,
        shutdown_timeout: float,
        shutdown_timeout_action: ShutdownTimeoutAction,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Manage the power of the task's instance.

        Args:
            instances: The hypervisor driver.
            records: Of the tasks.
            task: The task.
            shutdown_timeout: Seconds to wait for the guest to power off.
            shutdown_timeout_action: What to do after that.
            check: Called before each command to the hypervisor; raises if this process must not send any.
        """
        self._instances = instances
        self._records = records
        self._task = task
        self._shutdown_timeout = shutdown_timeout
        self._shutdown_timeout_action = shutdown_timeout_action
        self._check = check
        self._power_recovery_until: datetime | timedelta | None = task.power_recovery_until
        self._has_extended_recovery = False  # after a failed start, which another attempt may follow
        self._lost_power = False
        # Copies of what is recorded: the power is restored even while the database is unavailable.
        self._run_after_task = task.run_after_task
        self._must_restore = bool(task.run_after_task) and task.next_step in STEPS_WITH_BORROWED_INSTANCE

    def record_power_state(self) -> None:
        """Record, before the instance is touched, whether it is to run after the task, and that it is borrowed."""
        instance_id = self._task.instance_id
        while True:
            # The record is read before the state: a request raises the version before it changes the state.
            version = self._records.power_record(instance_id).version
            will_be_started = self._records.has_power_recovery(instance_id)
            running = self._instances.state(instance_id) in UP_STATES or will_be_started
            with failpoint("power-state-recorded"):
                if self._records.record_power_state(self._task.bundle_id, running=running, version=version):
                    break
        self._refresh_run_after_task(self._records.power_record(instance_id))

    def should_run(self) -> bool:
        """Whether the instance is to run after the task, by what its owner wants now."""
        return self._refresh_run_after_task(self._records.power_record(self._task.instance_id))

    def _refresh_run_after_task(self, record: PowerRecord) -> bool:
        """Copy from the database whether the instance is to run after the task, and return it."""
        if record.wanted is not None:
            self._run_after_task = record.wanted is WantedPower.RUNNING
        elif self._run_after_task is None and (task := self._records.get(self._task.bundle_id)) is not None:
            self._run_after_task = task.run_after_task
        return bool(self._run_after_task)

    def run_sysprep(self, monitor: TaskMonitor, command: Sequence[str]) -> None:
        """Run the sysprep command in the guest. The command powers the guest off; then wait as `shut_down` does."""
        if _is_off(self._instances.state(self._task.instance_id)):
            return
        self._schedule_recovery()
        with (
            self._counted_from_its_end(),
            self._unless_terminated(),
            command_guard.using(self._check_right),
            failpoint("sysprep-requested"),
        ):
            self._instances.request_sysprep(self._task.instance_id, command)
        self._wait_until_off(monitor, request=lambda _instance_id: None)  # a shutdown request would interrupt sysprep

    def shut_down(self, monitor: TaskMonitor) -> None:
        """Request a shutdown, repeatedly, until the guest has powered off; after the timeout cut its power or fail.

        A guest that is still up when this ends may follow the request later: power recovery (`housekeeping.py`) starts
        it then.

        Raises:
            TaskFailure: The guest did not power off in time, or the instance is terminated.
        """
        self._schedule_recovery()
        self._wait_until_off(monitor, request=self._request_shutdown)

    def _schedule_recovery(self) -> None:
        self._power_recovery_until = timedelta(seconds=2 * self._shutdown_timeout)
        self._records.schedule_power_recovery(self._task.bundle_id, self._power_recovery_until)

    def _wait_until_off(self, monitor: TaskMonitor, request: Callable[[str], None]) -> None:
        record = self._records.power_record(self._task.instance_id)
        self._must_restore = self._refresh_run_after_task(record)
        is_borrowed = record.borrowed_by == self._task.bundle_id

        def borrow_and_request(instance_id: str) -> None:
            nonlocal is_borrowed
            if not is_borrowed:  # it was restored before, and is shut down once more
                self._must_restore = self._run_after_task = self._records.borrow(self._task.bundle_id, instance_id)
                is_borrowed = True
            request(instance_id)

        state = shut_down_guest(
            self._instances,
            self._task.instance_id,
            timeout=self._shutdown_timeout,
            request=borrow_and_request,
            pause=monitor.pause,
        )
        if not _is_off(state):
            self._cut_power(f"The guest did not power off within {self._shutdown_timeout:.0f} seconds")
        with failpoint("shutdown-recorded"):
            self._records.record_seen_off(self._task.instance_id)
        self._power_recovery_until = None

    @contextmanager
    def hold_stopped(self, monitor: TaskMonitor) -> Iterator[Instance]:
        """Shut the instance down, and yield it while it is off and cannot be started.

        Raises:
            RootVolumeInUse: The instance was started before the block, during it or after it. What was read of its
                volume is not consistent.
            TaskFailure: The instance was terminated.
        """
        with ExitStack() as stack:
            hold = self._hold_off(monitor, stack)
            check = partial(self._check_off, hold)
            monitor.add_check(check)
            yield self._instances.get(self._task.instance_id)
            retry_hypervisor(check, CHECK_RETRY_TIMEOUT, sleep=monitor.pause)

    def _hold_off(self, monitor: TaskMonitor, stack: ExitStack) -> VolumeHold:
        """Shut the instance down and hold it; repeat if it was started in between: nothing has been read yet."""
        for attempts_left in reversed(range(_HOLD_ATTEMPTS)):
            self.shut_down(monitor)
            with ExitStack() as attempt:
                hold = attempt.enter_context(self._instances.hold_stopped(self._task.instance_id))
                try:
                    self._check_off(hold)
                except RootVolumeInUse:
                    if not attempts_left:
                        raise
                    log.warning("instance started before its volume was read", instance_id=self._task.instance_id)
                else:
                    stack.enter_context(attempt.pop_all())
                    return hold
        raise AssertionError

    def restore(self) -> None:
        """Restore the power state that the owner wants now: start the instance if the task has shut it down.

        An instance that was given back is started only if it lost its power. Otherwise its owner may have stopped it.
        Before any of these errors is raised, power recovery (`housekeeping.py`) is scheduled for an instance that has
        to be started.

        Raises:
            InstanceError, OSError: A transient error (`errors.may_pass`): the step is repeated.
            TaskFailure: The instance does not start.
        """
        task = self._records.get(self._task.bundle_id)
        if task is None or task.run_after_task is None:
            return
        try:
            with power_lock(self._task.instance_id):
                self._restore(self._records.power_record(self._task.instance_id))
        except InstanceNotFound:
            self._records.give_back(self._task.bundle_id)  # its record was removed: there is nothing to start
        except (InstanceError, OSError) as error:
            record = self._records.power_record(self._task.instance_id)
            # Power recovery starts any instance that is off: also one that its owner shut down in the guest.
            if record.borrowed_by == self._task.bundle_id or self._lost_power:
                self._has_extended_recovery = True
                self._records.schedule_power_recovery(self._task.bundle_id, RECOVER_FOR)
            if may_pass(error):
                raise
            raise TaskFailure("Server.InstanceNotStarted", str(error)) from error
        self._must_restore = False

    def _restore(self, record: PowerRecord) -> None:
        bundle_id, instance_id = self._task.bundle_id, self._task.instance_id
        is_wanted_on = self._refresh_run_after_task(record)
        is_borrowed = record.borrowed_by == bundle_id
        state = self._instances.state(instance_id)
        if state in STARTABLE_STATES and is_wanted_on:
            self._lost_power = not is_borrowed and self._has_lost_power()
            if is_borrowed or self._lost_power:
                with command_guard.using(self._check_right), failpoint("instance-started"):
                    self._instances.start(instance_id)
                self._records.give_back(bundle_id, seen_off=instance_id)
                return
        if is_borrowed and (state in {*UP_STATES, *TERMINATING} or not is_wanted_on):
            self._records.give_back(bundle_id)
        if self._has_extended_recovery:  # put back the deadline of the shutdown request
            self._records.schedule_power_recovery(bundle_id, self._power_recovery_until)

    def restore_without_record(self, *, check: Callable[[], None] | None = None) -> bool:
        """Start the instance if this run or an earlier one has shut it down. Does not need the database.

        Call this only while nothing reads the root volume. It may be repeated: the guest may follow a shutdown request
        later.

        Args:
            check: Replaces the check of the lease, if the lease has expired and the database has confirmed it.

        Returns:
            Whether the instance was started, or may have been.
        """
        instance_id = self._task.instance_id
        try:
            if not self._must_restore or self._instances.state(instance_id) not in STARTABLE_STATES:
                return False
        except (InstanceError, OSError) as error:
            log.warning("start without the database failed", instance_id=instance_id, error=str(error))
            return False
        try:
            with power_lock(instance_id), command_guard.using(check or self._check):
                self._instances.start(instance_id)
        except (InstanceLocked, LeaseExpiredError) as error:  # the instance was not started
            log.warning("start without the database failed", instance_id=instance_id, error=str(error))
            return False
        except (InstanceError, OSError) as error:  # the start may have succeeded before its record failed
            log.warning("start without the database failed", instance_id=instance_id, error=str(error))
        else:
            log.warning("instance started without its record: the database is unavailable", instance_id=instance_id)
        return True

    def _check_right(self) -> None:
        """Check, before a command to the hypervisor, that the task still belongs to this run: by database and lease.

        The lease alone does not show that an operator has already had another host adopt the task.
        """
        self._records.require_lease(self._task.bundle_id)
        self._check()

    def _request_shutdown(self, instance_id: str) -> None:
        with (
            self._counted_from_its_end(),
            self._unless_terminated(),
            command_guard.using(self._check_right),
            failpoint("shutdown-requested"),
        ):
            self._instances.request_stop(instance_id)

    @contextmanager
    def _counted_from_its_end(self) -> Iterator[None]:
        """Extend power recovery if the hypervisor has delivered a request late: the guest gets it only now."""
        started = monotonic()
        try:
            yield
        finally:
            if monotonic() - started > SHUTDOWN_REQUEST_INTERVAL:
                self._schedule_recovery()

    @contextmanager
    def _unless_terminated(self) -> Iterator[None]:
        """Raise TaskFailure if the instance was terminated after its state was read."""
        try:
            yield
        except IncorrectInstanceState:
            _check_not_terminated(self._instances.state(self._task.instance_id))
            raise

    def _cut_power(self, message: str) -> None:
        """Cut the power if `shutdown_timeout_action` says so, after a warning; else fail with `message`."""
        if self._shutdown_timeout_action == "fail":
            raise TaskFailure("Server.InstanceNotStopped", f"{message}.")
        self._records.add_warning(
            self._task.bundle_id, f"{message}: its power was cut, and what it had not written is lost."
        )
        try:
            with self._unless_terminated(), command_guard.using(self._check_right), failpoint("power-cut"):
                self._instances.force_stop(self._task.instance_id)
        except InstanceError as error:
            raise TaskFailure(
                "Server.InstanceNotStopped", f"{message}, and its power cannot be cut: {error}"
            ) from error
        if not _is_off(self._instances.state(self._task.instance_id)):
            raise TaskFailure("Server.InstanceNotStopped", f"{message}, and it still runs although its power was cut.")

    def _has_lost_power(self) -> bool:
        """Whether the instance is off although it was not stopped, while it was to run on an overlay."""
        overlays = self._instances.overlays
        if overlays is None or self._records.overlay(self._task.bundle_id) is None:
            return False
        return overlays.has_lost_power(self._task.instance_id)

    def _check_off(self, hold: VolumeHold) -> None:
        try:
            hold.check()
        except RootVolumeInUse:
            _check_not_terminated(self._instances.state(self._task.instance_id))
            raise


def _check_not_terminated(state: InstanceState) -> None:
    if state in TERMINATING:
        raise TaskFailure("Client.InstanceTerminated", "The instance was terminated while it was being bundled.")


def _is_off(state: InstanceState) -> bool:
    """Whether an instance is off. Raises TaskFailure if it was terminated."""
    _check_not_terminated(state)
    return state is InstanceState.STOPPED
