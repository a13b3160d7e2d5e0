"""An instance's power, as one bundle task handles it: noted, switched off, held off, and put back as it was.

An instance that ran before the task runs after it, whatever happened; one that was stopped stays stopped. It is never
started while its volume is read, unless it runs on an overlay (`freezing.py`), and its volume never read unless it is
off. A guest that does not power off by itself within the grace period makes the task fail and stays up; its power is
cut only if the operator wants that.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Literal

import structlog

from thrave.compute.errors import InstanceError, InstanceHeld, InstanceNotFound, RootVolumeInUse
from thrave.compute.instance import GONE, Instance, InstanceState
from thrave.compute.instances import Hold, Instances
from thrave.compute.power import power_off
from thrave.database import utc_now
from thrave.tasks.crash_points import durable
from thrave.tasks.failures import TaskFailure
from thrave.tasks.freezing import CHECK_PATIENCE
from thrave.tasks.patience import patiently
from thrave.tasks.records import Records
from thrave.tasks.states import BundleTaskState
from thrave.tasks.task import BundleTask
from thrave.tasks.watch import Watch

START_AGAIN_FOR = timedelta(days=1)  # an instance that its hypervisor does not start
log = structlog.get_logger()
ShutdownTimeoutAction = Literal["fail", "power-off"]
_FREED = frozenset({BundleTaskState.BUNDLING, BundleTaskState.STORING})


class PowerSwitch:
    """The power switch of a task's instance."""

    def __init__(
        self,
        instances: Instances,
        records: Records,
        task: BundleTask,
        *,
        grace: float,
        when_late: ShutdownTimeoutAction,
    ) -> None:
        """Switch the task's instance; its guest has `grace` seconds to power off, then `when_late` is done."""
        self._instances = instances
        self._records = records
        self._task = task
        self._grace = grace
        self._when_late = when_late
        # Kept here as well as in the record, so that power is put back while there is no database.
        self._was_running = task.was_running
        self._is_owed = bool(task.was_running)

    def note(self) -> None:
        """Record whether the instance runs, or would but for an earlier task, before anything is done to it."""
        instance_id = self._task.instance_id
        off = self._instances.state(instance_id) is InstanceState.STOPPED
        running = not off or self._records.is_looked_after(instance_id)
        if self._was_running is None:
            self._was_running = running
        with durable("power noted"):
            self._records.note_power_state(self._task.bundle_id, running=running)

    def sysprep(self, watch: Watch, command: Sequence[str]) -> None:
        """Have the guest prepare itself for being copied, which powers it off; then as `off`."""
        if _is_off(self._instances.state(self._task.instance_id)):
            return
        self._look_after()
        with durable("sysprep sent"):
            self._instances.request_sysprep(self._task.instance_id, command)
        self._off(watch, ask=lambda _instance_id: None)  # a request to power off would cut it short

    def off(self, watch: Watch) -> None:
        """Ask the guest to power off, again and again, until it has; in the end cut its power, if that is wanted.

        If it is still up when this ends, whatever way, it may yet hear it: it is looked after (`caretaker.py`) then.

        Raises:
            TaskFailure: It did not power off in time, or it is terminated.
        """
        self._look_after()
        self._off(watch, ask=self._ask)

    def _look_after(self) -> None:
        self._records.look_after(self._task.bundle_id, utc_now() + timedelta(seconds=2 * self._grace))

    def _off(self, watch: Watch, ask: Callable[[str], None]) -> None:
        self._is_owed = bool(self._was_running)
        state = power_off(self._instances, self._task.instance_id, grace=self._grace, ask=ask, pause=watch.pause)
        if not _is_off(state):
            self._cut(f"The guest did not power off within {self._grace:.0f} seconds")
        with durable("shutdown seen"):
            self._records.leave_alone(self._task.instance_id)

    @contextmanager
    def held_off(self, watch: Watch) -> Iterator[Instance]:
        """The instance, off and kept from being started; switched off again if a crash gave it time to be started.

        Raises RootVolumeInUse or TaskFailure if it is found running or terminated, before the block, during it or
        after it: what was read of a volume that somebody else wrote to is worth nothing.
        """
        self.off(watch)
        with self._instances.hold(self._task.instance_id) as hold:
            check = partial(self._check_off, hold)
            check()
            watch.guard(check)
            yield self._instances.get(self._task.instance_id)
            patiently(check, CHECK_PATIENCE, pause=watch.pause)

    def restore(self) -> None:
        """Start the instance if it ran when the task began and is off now.

        One that has been set free to run on an overlay may have been stopped by its owner since; it is started only if
        it was not.

        Raises:
            TaskFailure: It does not start. It is looked after (`caretaker.py`) then.
        """
        task = self._records.get(self._task.bundle_id)
        if task is None or not task.was_running:
            return
        try:
            if self._instances.state(self._task.instance_id) is InstanceState.STOPPED and self._should_run(task):
                with durable("instance started"):
                    self._instances.start(self._task.instance_id)
            self._is_owed = False
        except InstanceNotFound:
            return  # its description was removed meanwhile: there is nothing to start
        except InstanceHeld:
            raise  # it is let go of soon, and the step repeated
        except InstanceError as error:
            self._records.look_after(self._task.bundle_id, utc_now() + START_AGAIN_FOR)
            raise TaskFailure("Server.InstanceNotStarted", str(error)) from error

    def restore_without_record(self) -> bool:
        """Start the instance if this task has switched it off, by what this process knows: the database is not needed.

        To be called only while nothing reads the root volume; may be repeated, as a guest that was asked to power off
        may do so later.

        Returns:
            Whether it was started, or may have been.
        """
        instance_id = self._task.instance_id
        try:
            if not self._is_owed or self._instances.state(instance_id) is not InstanceState.STOPPED:
                return False
        except (InstanceError, OSError) as error:
            log.warning("power recovery failed", instance_id=instance_id, error=str(error))
            return False
        try:
            self._instances.start(instance_id)
        except InstanceHeld as error:  # it was not touched
            log.warning("power recovery failed", instance_id=instance_id, error=str(error))
            return False
        except (InstanceError, OSError) as error:  # OSError: it may run, and its file cannot be written
            log.warning("power recovery failed", instance_id=instance_id, error=str(error))
        else:
            log.warning("instance started without its record: the database is unavailable", instance_id=instance_id)
        return True

    def _ask(self, instance_id: str) -> None:
        with durable("shutdown sent"):
            self._instances.request_stop(instance_id)

    def _cut(self, late: str) -> None:
        """Cut the power, if that is wanted of a guest that is late; its owner is told before it is done."""
        if self._when_late == "fail":
            raise TaskFailure("Server.InstanceNotStopped", f"{late}.")
        self._records.notice(self._task.bundle_id, f"{late}: its power was cut, and what it had not written is lost.")
        try:
            with durable("power cut"):
                self._instances.force_stop(self._task.instance_id)
        except InstanceError as error:
            raise TaskFailure("Server.InstanceNotStopped", f"{late}, and its power cannot be cut: {error}") from error
        if not _is_off(self._instances.state(self._task.instance_id)):
            raise TaskFailure("Server.InstanceNotStopped", f"{late}, and runs on though its power was cut.")

    def _should_run(self, task: BundleTask) -> bool:
        overlays = self._instances.overlays
        is_free = task.state in _FREED and self._records.frozen(task.bundle_id) is not None
        return not is_free or overlays is None or overlays.lost_power(task.instance_id)

    def _check_off(self, hold: Hold) -> None:
        try:
            hold.check()
        except RootVolumeInUse:
            _is_off(self._instances.state(self._task.instance_id))  # terminated is another reason
            raise


def _is_off(state: InstanceState) -> bool:
    if state in GONE:
        raise TaskFailure("Client.InstanceTerminated", "The instance was terminated while it was being bundled.")
    return state is InstanceState.STOPPED
