"""Sees an instance through to the power state that it had before its task, when the task itself no longer can.

A guest hears the power button when it likes. If its task is cancelled or fails before it has, the instance still runs
then and there is nothing to start; a minute later it powers off. And an instance may be off that its hypervisor does
not start at the moment. The caretaker looks after such instances, for as long as the guest might still obey or the
start might yet succeed, also after a restart, and starts them. It merges the overlays that a task could not merge. It
leaves an instance alone whose next task has begun, and stops none.
"""

import structlog

from thrave.compute.errors import InstanceError, InstanceNotFound
from thrave.compute.instance import GONE, InstanceState
from thrave.compute.instances import Instances
from thrave.database import utc_now
from thrave.tasks.crash_points import durable
from thrave.tasks.freezing import Freezer
from thrave.tasks.records import Records
from thrave.tasks.retries import Retries
from thrave.tasks.task import BundleTask

INTERVAL = 1.0  # seconds between two looks
MERGE_SECONDS = 60.0  # for one attempt; others are waiting
LONGEST = 300.0  # seconds between two attempts to start an instance, at last

log = structlog.get_logger()


class Caretaker:
    """Looks after the instances of one host."""

    def __init__(self, records: Records, instances: Instances, host: str) -> None:
        """Look after what the tasks of `host` have left."""
        self._records = records
        self._instances = instances
        self._host = host
        self._retries = Retries(INTERVAL, LONGEST)

    def look(self) -> None:
        """Look once at each instance that is looked after, and start those that have powered off."""
        for task in self._records.looked_after(self._host):
            if self._retries.is_due(task.bundle_id) and self._is_over(task):
                self._records.look_after(task.bundle_id, None)
                self._retries.over(task.bundle_id)
        for task in self._records.unmerged(self._host):
            if self._retries.is_due(task.bundle_id) and self._records.in_progress(task.instance_id) is None:
                self._merge(task)

    def _is_over(self, task: BundleTask) -> bool:
        late = task.look_after_until is not None and task.look_after_until < utc_now()
        try:
            return self._see_to(task, late=late) or late
        except InstanceNotFound:
            return True
        except InstanceError as error:
            self._retries.failed(task.bundle_id)
            log.warning("an instance cannot be seen to", instance_id=task.instance_id, reason=str(error))
            return late

    def _see_to(self, task: BundleTask, *, late: bool) -> bool:
        """Start the instance if it is time to; say whether there is nothing more to do."""
        if self._records.in_progress(task.instance_id):
            return False
        state = self._instances.state(task.instance_id)
        # A file says `stopping` for ever if the process that ran the stopCommand has died.
        off = state is InstanceState.STOPPED or (late and state is InstanceState.STOPPING)
        if off and task.was_running:
            self._start(task)
        return off or state in GONE

    def _merge(self, task: BundleTask) -> None:
        log.info("an overlay is left after its task has ended", instance_id=task.instance_id)
        self._records.check_mine(task.bundle_id)
        try:
            Freezer(self._instances, self._records, task).merge_within(MERGE_SECONDS)
        except InstanceError as error:
            self._retries.failed(task.bundle_id)
            log.warning("an overlay cannot be merged", instance_id=task.instance_id, reason=str(error))
        else:
            self._retries.over(task.bundle_id)

    def _start(self, task: BundleTask) -> None:
        log.info("an instance is off after its task has ended", instance_id=task.instance_id)
        self._records.check_mine(task.bundle_id)
        with durable("instance started"):
            self._instances.start(task.instance_id)
