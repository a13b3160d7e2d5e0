"""Restores the power of instances whose task has ended without doing so, and merges overlays that tasks have left.

A guest hears the power button when it likes. If its task is cancelled or fails before it has, the instance still runs
then and there is nothing to start; a minute later it powers off. And an instance may be off that its hypervisor does
not start at the moment. Such instances are started, if their owners want them to run by then, for as long as the guest
might still obey or the start might yet succeed, also after a restart. An instance whose next task has begun is left
alone, and none is stopped.
"""

import time
from collections.abc import Callable

import structlog
from sqlalchemy.exc import SQLAlchemyError

from thrave.compute.base import HypervisorDriver
from thrave.compute.errors import InstanceLocked, InstanceNotFound
from thrave.compute.instance import GONE, InstanceState
from thrave.compute.power import TO_START, switching
from thrave.compute.start_check import start_allowed_by
from thrave.concurrency import Background, NoThreadError, supervised
from thrave.tasks.crash_points import durable
from thrave.tasks.freezing import Freezer
from thrave.tasks.records import RECOVER_FOR, Records
from thrave.tasks.retries import Retries
from thrave.tasks.task import BundleTask

INTERVAL = 1.0  # seconds between two looks
MERGE_SECONDS = 60.0  # for one attempt; others are waiting
LONGEST = 300.0  # seconds between two attempts to start an instance, at last
_PATIENCE = (
    10.0  # seconds in which an instance should be seen to; one that takes longer does not keep the others waiting
)
_ELSEWHERE = 10  # each so many looks also at what the tasks of other hosts have left

log = structlog.get_logger()


class Caretaker:
    """Looks after the instances of one host."""

    def __init__(
        self, records: Records, instances: HypervisorDriver, host: str, *, check: Callable[[], None] = lambda: None
    ) -> None:
        """Look after what the tasks of `host` have left.

        `check` is called before each command to a hypervisor, and raises if this process may not give any.
        """
        self._records = records
        self._instances = instances
        self._host = host
        self._check = check
        self._retries = Retries(INTERVAL, LONGEST)
        self._merges = Retries(INTERVAL, LONGEST)
        self._extended: set[str] = set()
        self._looks = 0

    def look(self) -> None:
        """Look once at each instance that is looked after, and start those that have powered off.

        Each is seen to in a thread of its own: one that hangs, or cannot be started, keeps none of the others waiting.
        """
        tasks = self._records.looked_after(self._host)
        if self._looks % _ELSEWHERE == 0:
            tasks += self._records.looked_after_by_nobody(self._host)
            self._retries.keep({task.bundle_id for task in tasks})
        self._looks += 1
        began = time.monotonic()
        due = [task for task in tasks if self._retries.is_due(task.bundle_id)]
        for thread in [thread for task in due if (thread := self._begin(task)) is not None]:
            thread.join(max(0.0, began + _PATIENCE - time.monotonic()))

    def merge(self) -> None:
        """Try once to merge each overlay that a task has left. It may take minutes."""
        tasks = self._records.unmerged(self._host)
        self._merges.keep({task.bundle_id for task in tasks})
        for task in tasks:
            if self._merges.is_due(task.bundle_id):
                self._merge(task)

    def _begin(self, task: BundleTask) -> Background | None:
        def fail(error: BaseException) -> None:
            log.error("power recovery failed", instance_id=task.instance_id, exc_info=error)

        try:
            return supervised(f"recover {task.instance_id}", lambda: self._recover(task), on_failure=fail)
        except NoThreadError as error:  # there may be one for the next instance, or at the next look
            fail(error)
            return None

    def _recover(self, task: BundleTask) -> None:
        """See to one instance; whatever goes wrong about it is tried again later."""
        bundle_id = task.bundle_id
        try:
            is_over = self._is_over(task)
        except InstanceLocked:  # somebody else decides about it just now, or starts it
            return
        except InstanceNotFound:
            is_over = True
        except SQLAlchemyError as error:
            log.warning("the database does not answer", error=type(error).__name__)
            return
        except Exception as error:  # noqa: BLE001 (whatever it is about one instance)
            self._retries.failed(bundle_id)
            log.warning("power recovery failed", instance_id=task.instance_id, error=str(error) or type(error).__name__)
            is_over = self._is_late(task) and not self._extend(task)
        if is_over:
            self._records.look_after(bundle_id, None)
            self._records.give_back(bundle_id)
            self._retries.over(bundle_id)

    def _is_over(self, task: BundleTask) -> bool:
        """Start the instance if it is time to; say whether there is nothing more to do."""
        if self._records.in_progress(task.instance_id):
            return False
        late = self._is_late(task)
        with switching(task.instance_id):
            state = self._instances.state(task.instance_id)
            # Read now: since the list was made, its owner may have stopped it, or another task may have begun.
            if not self._records.is_to_be_started(task.bundle_id):
                return True
            if self._records.in_progress(task.instance_id):
                return False
            # A file says `stopping` for ever if the process that ran the stopCommand has died.
            off = state in TO_START or (late and state is InstanceState.STOPPING)
            if off:
                self._start(task)
        return off or late or state in GONE

    def _is_late(self, task: BundleTask) -> bool:
        return task.power_recovery_until is not None and task.power_recovery_until < self._records.now()

    def _extend(self, task: BundleTask) -> bool:
        """Have an instance that does not start tried for longer, once: nobody may have looked after it until now."""
        if task.bundle_id in self._extended:
            return False
        self._extended.add(task.bundle_id)
        self._records.look_after(task.bundle_id, RECOVER_FOR)
        return True

    def _merge(self, task: BundleTask) -> None:
        try:
            if self._records.in_progress(task.instance_id) is not None:
                return
            log.info("an overlay is left after its task has ended", instance_id=task.instance_id)
            self._records.check_mine(task.bundle_id)
            self._check()
            Freezer(self._instances, self._records, task, check=self._check).merge_within(MERGE_SECONDS)
        except Exception as error:  # noqa: BLE001 (whatever it is about one instance, the others are not left)
            self._merges.failed(task.bundle_id)
            log.warning("an overlay cannot be merged", instance_id=task.instance_id, reason=str(error))
        else:
            self._merges.over(task.bundle_id)

    def _start(self, task: BundleTask) -> None:
        log.info("an instance is off after its task has ended", instance_id=task.instance_id)

        def check() -> None:
            self._records.check_mine(task.bundle_id)
            self._check()

        with start_allowed_by(check), durable("instance started"):
            self._instances.start(task.instance_id)
