"""A root volume that stands still while its instance runs, as one bundle task handles it.

Once the instance has been stopped, its root volume gets a copy-on-write overlay, and the instance is started on that;
what is sealed is the volume below, which nothing writes to. In the end the overlay is merged into the volume. What is
planned is written down first, so that whatever is killed, the overlay is found again and merged. Where an overlay
cannot be had, the instance stays off until its volume has been read, and its owner is told why.

An instance's power, as one bundle task handles it: noted, switched off, held off, and put back as is wanted.

An instance that ran before the task runs after it, whatever happened, and one that was stopped stays stopped, unless
its owner has asked for something else since: what is wanted is read again before the instance is put back. It is never
started while its volume is read, unless it runs on an overlay (`freezing.py`), and its volume never read unless it is
off. A guest that does not power off by itself within the grace period makes the task fail and stays up; its power is
cut only if the operator wants that.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import Literal

import structlog

from thrave.compute.base import HypervisorDriver, Overlay, Overlays, StoppedHold
from thrave.compute.errors import (
    HypervisorError,
    IncorrectInstanceState,
    InstanceError,
    InstanceLocked,
    InstanceNotFound,
    OverlayNotSupported,
    RootVolumeInUse,
)
from thrave.compute.instance import GONE, Instance, InstanceState
from thrave.compute.power import TO_START, UP, power_off, switching
from thrave.compute.power_records import PowerRecord, WantedPower
from thrave.compute.timeouts import ProgressPause
from thrave.concurrency import Call, CallTimeoutError
from thrave.tasks.errors import TaskFailure, may_pass
from thrave.tasks.failpoints import failpoint
from thrave.tasks.lease import LeaseExpiredError
from thrave.tasks.models import BORROWED, BundleTask
from thrave.tasks.monitor import TaskMonitor
from thrave.tasks.repository import RECOVER_FOR, TaskRepository
from thrave.tasks.step_retry import retry_hypervisor
from thrave.write_guard import start_guard

ABANDON_AFTER = 10.0  # seconds after which a merge that does not end by itself is abandoned


STALL_TIMEOUT = 600.0  # seconds for which a merge may make no progress


CHECK_PATIENCE = 60.0  # seconds that a hypervisor may be away when it is to say that nobody wrote to a volume


class RootOverlay:
    """Freezes the root volume of a task's instance, and thaws it."""

    def __init__(
        self,
        instances: HypervisorDriver,
        records: TaskRepository,
        task: BundleTask,
        *,
        stall_timeout: float = STALL_TIMEOUT,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Freeze the root volume of the task's instance; a merge may stand still for `stall_timeout` seconds.

        `check` is called before each command to the hypervisor, and raises if this process may not give any.
        """
        self._instances = instances
        self._records = records
        self._task = task
        self._stall_timeout = stall_timeout
        self._check = check

    @property
    def frozen(self) -> Overlay | None:
        """What was frozen for the task, or is just going to be; None from when it has been merged."""
        return self._records.frozen(self._task.bundle_id)

    def freeze(self) -> None:
        """Put an overlay over the root volume of the instance, which is off; if it can have none, tell its owner."""
        frozen = self.frozen or self._plan()
        if frozen is not None:
            with failpoint("root volume frozen"), start_guard.using(self._check):
                self._overlays.freeze(self._task.instance_id, frozen)

    @contextmanager
    def held(self, frozen: Overlay, watch: TaskMonitor) -> Iterator[Instance]:
        """The instance, on its overlay, so that nothing writes to the volume.

        Raises RootVolumeInUse if it is found in another place, before the block, during it or after it.
        """
        with self._overlays.hold(self._task.instance_id, frozen) as hold:
            hold.check()
            watch.guard(hold.check)
            yield self._instances.get(self._task.instance_id)
            retry_hypervisor(hold.check, CHECK_PATIENCE, sleep=watch.pause)

    def merge(self, pause: Callable[[float], object]) -> None:
        """Have the instance go on without the overlay, if there is one; also an earlier task's.

        Raises:
            InstanceError: The hypervisor refuses, or nothing moves; the instance runs on, and it may be tried again.
            Exception: What `pause` raises; what was begun may go on by itself.
        """
        for bundle_id, frozen in self._records.frozen_of(self._task.instance_id):
            with failpoint("overlay merged"), start_guard.using(self._check):
                pause_while_moving = ProgressPause(self._task.instance_id, pause, self._stall_timeout)
                self._overlays.merge(self._task.instance_id, frozen, pause_while_moving)
            self._records.note_frozen(bundle_id, None)

    def merge_within(self, seconds: float) -> None:
        """The same, where nobody watches. Raises InstanceError also if it takes longer than so many seconds."""
        late = HypervisorError(self._task.instance_id, f"the overlay is not merged after {seconds:.0f} seconds")
        given_up = time.monotonic() + seconds

        def pause(between_looks: float) -> None:
            if time.monotonic() > given_up:
                raise late
            time.sleep(between_looks)

        try:  # a hypervisor that hangs is abandoned; if it goes on, `pause` ends what is left
            Call("merge", lambda: self.merge(pause)).result(seconds + ABANDON_AFTER)
        except CallTimeoutError:
            raise late from None

    def _plan(self) -> Overlay | None:
        try:
            frozen = self._planned()
        except OverlayNotSupported as reason:
            self._records.notice(
                self._task.bundle_id, f"The instance is off until its root volume has been read: {reason}."
            )
            return None
        with failpoint("overlay noted"):
            self._records.note_frozen(self._task.bundle_id, frozen)
        return frozen

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


_OFF_AGAIN = 3  # attempts to hold an instance that others start at the same moment


log = structlog.get_logger()


ShutdownTimeoutAction = Literal["fail", "power-off"]


class InstancePower:
    """The power switch of a task's instance."""

    def __init__(
        self,
        instances: HypervisorDriver,
        records: TaskRepository,
        task: BundleTask,
        *,
        grace: float,
        when_late: ShutdownTimeoutAction,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Switch the task's instance; its guest has `grace` seconds to power off, then `when_late` is done.

        `check` is called before each command to a hypervisor, and raises if this process may not give any.
        """
        self._instances = instances
        self._records = records
        self._task = task
        self._grace = grace
        self._when_late = when_late
        self._check = check
        self._looked_after: datetime | timedelta | None = task.power_recovery_until
        self._has_failed = False  # to start the instance
        # Kept here as well as in the record, so that power is put back while there is no database.
        self._was_running = task.was_running
        self._is_owed = bool(task.was_running) and task.next_step in BORROWED

    def note(self) -> None:
        """Record whether the instance is to run in the end, before anything is done to it, and that it is borrowed."""
        instance_id = self._task.instance_id
        while True:
            # In this order: what is recorded may change because of the state that it has, and not the other way round.
            version = self._records.power(instance_id).version
            is_looked_after = self._records.is_looked_after(instance_id)
            running = self._instances.state(instance_id) in UP or is_looked_after
            with failpoint("power noted"):
                if self._records.note_power_state(self._task.bundle_id, running=running, version=version):
                    break
        self.is_to_run()

    def is_to_run(self) -> bool:
        """Whether the instance is to run in the end, as its owner wants it by now."""
        return self._is_to_run(self._records.power(self._task.instance_id))

    def _is_to_run(self, record: PowerRecord) -> bool:
        if record.wanted is not None:
            self._was_running = record.wanted is WantedPower.RUNNING
        elif self._was_running is None and (task := self._records.get(self._task.bundle_id)) is not None:
            self._was_running = task.was_running
        return bool(self._was_running)

    def sysprep(self, watch: TaskMonitor, command: Sequence[str]) -> None:
        """Have the guest prepare itself for being copied, which powers it off; then as `off`."""
        if _is_off(self._instances.state(self._task.instance_id)):
            return
        self._look_after()
        self._check_right()
        with self._unless_terminated(), failpoint("sysprep sent"):
            self._instances.request_sysprep(self._task.instance_id, command)
        self._off(watch, ask=lambda _instance_id: None)  # a request to power off would cut it short

    def off(self, watch: TaskMonitor) -> None:
        """Ask the guest to power off, again and again, until it has; in the end cut its power, if that is wanted.

        If it is still up when this ends, whatever way, it may yet hear it: it is looked after (`caretaker.py`) then.

        Raises:
            TaskFailure: It did not power off in time, or it is terminated.
        """
        self._look_after()
        self._off(watch, ask=self._ask)

    def _look_after(self) -> None:
        self._looked_after = timedelta(seconds=2 * self._grace)
        self._records.look_after(self._task.bundle_id, self._looked_after)

    def _off(self, watch: TaskMonitor, ask: Callable[[str], None]) -> None:
        record = self._records.power(self._task.instance_id)
        self._is_owed = self._is_to_run(record)
        is_borrowed = record.borrowed_by == self._task.bundle_id

        def ask_and_borrow(instance_id: str) -> None:
            nonlocal is_borrowed
            if not is_borrowed:  # it was put back, and is switched off once more
                self._is_owed = self._was_running = self._records.borrow(self._task.bundle_id, instance_id)
                is_borrowed = True
            ask(instance_id)

        state = power_off(
            self._instances, self._task.instance_id, grace=self._grace, ask=ask_and_borrow, pause=watch.pause
        )
        if not _is_off(state):
            self._cut(f"The guest did not power off within {self._grace:.0f} seconds")
        with failpoint("shutdown seen"):
            self._records.note_seen_off(self._task.instance_id)
        self._looked_after = None

    @contextmanager
    def held_off(self, watch: TaskMonitor) -> Iterator[Instance]:
        """The instance, off and kept from being started; switched off again if a crash gave it time to be started.

        Raises RootVolumeInUse or TaskFailure if it is found running or terminated, before the block, during it or
        after it: what was read of a volume that somebody else wrote to is worth nothing.
        """
        with ExitStack() as stack:
            hold = self._hold_off(watch, stack)
            check = partial(self._check_off, hold)
            watch.guard(check)
            yield self._instances.get(self._task.instance_id)
            retry_hypervisor(check, CHECK_PATIENCE, sleep=watch.pause)

    def _hold_off(self, watch: TaskMonitor, stack: ExitStack) -> StoppedHold:
        """Switch it off and hold it; again if it was started in between, as nothing has been read yet."""
        for attempts_left in reversed(range(_OFF_AGAIN)):
            self.off(watch)
            with ExitStack() as attempt:
                hold = attempt.enter_context(self._instances.hold(self._task.instance_id))
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
        """Put the instance back as its owner wants it by now: start it if it is off because of the task.

        An instance that has been given back (it runs on an overlay, or this was done before) is started only if it has
        lost its power: whoever has stopped it since wants it off.

        Raises:
            InstanceError, OSError: What may pass (`failures.may_pass`): the step is repeated.
            TaskFailure: It does not start. In each case it is looked after (`caretaker.py`) from then on.
        """
        task = self._records.get(self._task.bundle_id)
        if task is None or task.was_running is None:
            return
        try:
            with switching(self._task.instance_id):
                self._put_back(self._records.power(self._task.instance_id))
        except InstanceNotFound:
            self._records.give_back(self._task.bundle_id)  # its description was removed: there is nothing to start
        except (InstanceError, OSError) as error:
            self._has_failed = True
            self._records.look_after(self._task.bundle_id, RECOVER_FOR)
            if may_pass(error):
                raise
            raise TaskFailure("Server.InstanceNotStarted", str(error)) from error
        self._is_owed = False

    def _put_back(self, record: PowerRecord) -> None:
        bundle_id, instance_id = self._task.bundle_id, self._task.instance_id
        is_wanted_on = self._is_to_run(record)
        is_borrowed = record.borrowed_by == bundle_id
        state = self._instances.state(instance_id)
        if state in TO_START and is_wanted_on and (is_borrowed or self._has_lost_power()):
            with start_guard.using(self._check_right), failpoint("instance started"):
                self._instances.start(instance_id)
            self._records.give_back(bundle_id, seen_off=instance_id)
            return
        if is_borrowed and (state in {*UP, *GONE} or not is_wanted_on):
            self._records.give_back(bundle_id)
        if self._has_failed:  # no longer than the guest may still hear that it shall power off
            self._records.look_after(bundle_id, self._looked_after)

    def restore_without_record(self, *, check: Callable[[], None] | None = None) -> bool:
        """Start the instance if this task has switched it off, by what this process knows: the database is not needed.

        To be called only while nothing reads the root volume; may be repeated, as a guest that was asked to power off
        may do so later.

        Args:
            check: In the place of the check of the lease, if that has expired and the database was asked for it.

        Returns:
            Whether it was started, or may have been.
        """
        instance_id = self._task.instance_id
        try:
            if not self._is_owed or self._instances.state(instance_id) not in TO_START:
                return False
        except (InstanceError, OSError) as error:
            log.warning("power recovery failed", instance_id=instance_id, error=str(error))
            return False
        try:
            with switching(instance_id), start_guard.using(check or self._check):
                self._instances.start(instance_id)
        except InstanceLocked as error:  # it was not touched
            log.warning("power recovery failed", instance_id=instance_id, error=str(error))
            return False
        except LeaseExpiredError as error:  # another host may have adopted the task
            log.warning("power recovery failed", instance_id=instance_id, error=str(error))
            return False
        except (InstanceError, OSError) as error:  # OSError: it may run, and its file cannot be written
            log.warning("power recovery failed", instance_id=instance_id, error=str(error))
        else:
            log.warning("instance started without its record: the database is unavailable", instance_id=instance_id)
        return True

    def _check_right(self) -> None:
        """Check before a command to the hypervisor that the task is still this run's, by the database and by the lease.

        The lease alone tells nothing of an operator who has already given the task to another host.
        """
        self._records.check_mine(self._task.bundle_id)
        self._check()

    def _ask(self, instance_id: str) -> None:
        self._check_right()
        with self._unless_terminated(), failpoint("shutdown sent"):
            self._instances.request_stop(instance_id)

    @contextmanager
    def _unless_terminated(self) -> Iterator[None]:
        """Give that it was terminated as the reason, if it was since its state was looked at."""
        try:
            yield
        except IncorrectInstanceState:
            _is_off(self._instances.state(self._task.instance_id))
            raise

    def _cut(self, late: str) -> None:
        """Cut the power, if that is wanted of a guest that is late; its owner is told before it is done."""
        if self._when_late == "fail":
            raise TaskFailure("Server.InstanceNotStopped", f"{late}.")
        self._records.notice(self._task.bundle_id, f"{late}: its power was cut, and what it had not written is lost.")
        self._check_right()
        try:
            with self._unless_terminated(), failpoint("power cut"):
                self._instances.force_stop(self._task.instance_id)
        except InstanceError as error:
            raise TaskFailure("Server.InstanceNotStopped", f"{late}, and its power cannot be cut: {error}") from error
        if not _is_off(self._instances.state(self._task.instance_id)):
            raise TaskFailure("Server.InstanceNotStopped", f"{late}, and runs on though its power was cut.")

    def _has_lost_power(self) -> bool:
        """Whether it is off although nobody has stopped it, while it was to run on an overlay."""
        overlays = self._instances.overlays
        if overlays is None or self._records.frozen(self._task.bundle_id) is None:
            return False
        return overlays.lost_power(self._task.instance_id)

    def _check_off(self, hold: StoppedHold) -> None:
        try:
            hold.check()
        except RootVolumeInUse:
            _is_off(self._instances.state(self._task.instance_id))  # terminated is another reason
            raise


def _is_off(state: InstanceState) -> bool:
    if state in GONE:
        raise TaskFailure("Client.InstanceTerminated", "The instance was terminated while it was being bundled.")
    return state is InstanceState.STOPPED
