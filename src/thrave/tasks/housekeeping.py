"""Restores the power of instances whose task has ended without doing so, and merges overlays that tasks have left.

A guest hears the power button when it likes. If its task is cancelled or fails before it has, the instance still runs
then and there is nothing to start; a minute later it powers off. And an instance may be off that its hypervisor does
not start at the moment. Such instances are started, if their owners want them to run by then, for as long as the guest
might still obey or the start might yet succeed, also after a restart. An instance whose next task has begun is left
alone, and none is stopped.

Tries again to remove objects that could not be removed at once, for as long as it takes, also after a restart.

These are the objects of failed tasks, those of bundles that were replaced, and those that a lost request may have
stored after they were removed (`claims.py`). Deleting is the right of the bucket's owner, in whose name the service
acts: that the task's upload policy has expired, or was erased, does not matter. What the service may not delete is
reported to the operator. What is deleted, and what never, is decided in `removal.py`.

Forgets tasks that ended long ago: their records, events and parts, and what the engine keeps of them.

A task stays as long as there is something to do about it: an instance to look after, an object to remove. The bundles
themselves are their owners' and never touched.
"""

import time
from collections.abc import Callable
from datetime import datetime, timedelta

import structlog
from sqlalchemy.exc import SQLAlchemyError

from thrave.buckets.base import ObjectStore
from thrave.buckets.errors import BucketError, TransientError
from thrave.buckets.retrying_store import RetryingStore
from thrave.compute.base import HypervisorDriver
from thrave.compute.errors import InstanceLocked, InstanceNotFound
from thrave.compute.instance import TERMINATING, InstanceState
from thrave.compute.power import TO_START, switching
from thrave.concurrency import Background, NoThreadError, supervised
from thrave.retry import RetrySchedule
from thrave.tasks.bundle_location import BundleLocation
from thrave.tasks.errors import ErrorKind, TaskFailure, kind_of
from thrave.tasks.failpoints import failpoint
from thrave.tasks.instance_power import RootOverlay
from thrave.tasks.models import BundleTask, BundleTaskState
from thrave.tasks.object_removal import remove_earlier, remove_objects
from thrave.tasks.repository import RECOVER_FOR, TaskRepository
from thrave.tasks.store_calls import IN_FLIGHT
from thrave.write_guard import WriteCheck, no_check, start_guard

POWER_RECOVERY_INTERVAL = 1.0  # seconds between two looks


MERGE_SECONDS = 60.0  # for one attempt; others are waiting


MAX_POWER_RECOVERY_INTERVAL = 300.0  # seconds between two attempts to start an instance, at last


_PATIENCE = (
    10.0  # seconds in which an instance should be seen to; one that takes longer does not keep the others waiting
)


_ELSEWHERE = 10  # each so many looks also at what the tasks of other hosts have left


log = structlog.get_logger()


class PowerRecovery:
    """Looks after the instances of one host."""

    def __init__(
        self,
        records: TaskRepository,
        instances: HypervisorDriver,
        host: str,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Look after what the tasks of `host` have left.

        `check` is called before each command to a hypervisor, and raises if this process may not give any.
        """
        self._records = records
        self._instances = instances
        self._host = host
        self._check = check
        self._retries = RetrySchedule(POWER_RECOVERY_INTERVAL, MAX_POWER_RECOVERY_INTERVAL)
        self._merges = RetrySchedule(POWER_RECOVERY_INTERVAL, MAX_POWER_RECOVERY_INTERVAL)
        self._extended: set[str] = set()
        self._looks = 0

    def look(self) -> None:
        """Look once at each instance that is looked after, and start those that have powered off.

        Each is seen to in a thread of its own: one that hangs, or cannot be started, keeps none of the others waiting.
        """
        tasks = self._records.power_recoveries(self._host)
        if self._looks % _ELSEWHERE == 0:
            tasks += self._records.moved_power_recoveries(self._host)
            self._retries.keep({task.bundle_id for task in tasks})
        self._looks += 1
        began = time.monotonic()
        due = [task for task in tasks if self._retries.is_due(task.bundle_id)]
        for thread in [thread for task in due if (thread := self._begin(task)) is not None]:
            thread.join(max(0.0, began + _PATIENCE - time.monotonic()))

    def merge(self) -> None:
        """Try once to merge each overlay that a task has left. It may take minutes."""
        tasks = self._records.unmerged_overlays(self._host)
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
            self._retries.record_failure(bundle_id)
            log.warning("power recovery failed", instance_id=task.instance_id, error=str(error) or type(error).__name__)
            is_over = self._is_late(task) and not self._extend(task)
        if is_over:
            self._records.schedule_power_recovery(bundle_id, None)
            self._records.give_back(bundle_id)
            self._retries.forget(bundle_id)

    def _is_over(self, task: BundleTask) -> bool:
        """Start the instance if it is time to; say whether there is nothing more to do."""
        if self._records.in_progress(task.instance_id):
            return False
        late = self._is_late(task)
        with switching(task.instance_id):
            state = self._instances.state(task.instance_id)
            # Read now: since the list was made, its owner may have stopped it, or another task may have begun.
            if not self._records.should_start(task.bundle_id):
                return True
            if self._records.in_progress(task.instance_id):
                return False
            # A file says `stopping` for ever if the process that ran the stopCommand has died.
            off = state in TO_START or (late and state is InstanceState.STOPPING)
            if off:
                self._start(task)
        return off or late or state in TERMINATING

    def _is_late(self, task: BundleTask) -> bool:
        return task.power_recovery_until is not None and task.power_recovery_until < self._records.now()

    def _extend(self, task: BundleTask) -> bool:
        """Have an instance that does not start tried for longer, once: nobody may have looked after it until now."""
        if task.bundle_id in self._extended:
            return False
        self._extended.add(task.bundle_id)
        self._records.schedule_power_recovery(task.bundle_id, RECOVER_FOR)
        return True

    def _merge(self, task: BundleTask) -> None:
        try:
            if self._records.in_progress(task.instance_id) is not None:
                return
            log.info("an overlay is left after its task has ended", instance_id=task.instance_id)
            self._records.require_lease(task.bundle_id)
            self._check()
            RootOverlay(self._instances, self._records, task, check=self._check).merge_with_timeout(MERGE_SECONDS)
        except Exception as error:  # noqa: BLE001 (whatever it is about one instance, the others are not left)
            self._merges.record_failure(task.bundle_id)
            log.warning("an overlay cannot be merged", instance_id=task.instance_id, reason=str(error))
        else:
            self._merges.forget(task.bundle_id)

    def _start(self, task: BundleTask) -> None:
        log.info("an instance is off after its task has ended", instance_id=task.instance_id)

        def check() -> None:
            self._records.require_lease(task.bundle_id)
            self._check()

        with start_guard.using(check), failpoint("instance started"):
            self._instances.start(task.instance_id)


OBJECT_CLEANUP_INTERVAL = 15.0  # seconds between two looks


MAX_OBJECT_CLEANUP_INTERVAL = 3600.0  # seconds between two attempts, at last


class ObjectCleanup:
    """Removes what the tasks of one host could not remove."""

    def __init__(
        self,
        records: TaskRepository,
        buckets: ObjectStore,
        host: str,
        *,
        stall_timeout: float,
        before_attempt: WriteCheck = no_check,
    ) -> None:
        """Remove what the tasks of `host`, and of hosts that were given up, have left in `buckets`.

        Args:
            records: Of the tasks.
            buckets: The store.
            host: Whose tasks.
            stall_timeout: Seconds that a call may take.
            before_attempt: Made before each call; see `RetryingStore`.
        """
        self._records = records
        self._buckets = buckets
        self._host = host
        self._stall_timeout = stall_timeout
        self._before_attempt = before_attempt
        self._retries = RetrySchedule(OBJECT_CLEANUP_INTERVAL, MAX_OBJECT_CLEANUP_INTERVAL)

    def look(self) -> None:
        """Remove what is due to be tried."""
        for task in self._records.cleanups(self._host):
            if self._retries.is_due(task.bundle_id):
                self._try_alone(task)

    def _try_alone(self, task: BundleTask) -> None:
        """Try to clean up one task; what it raises does not keep the others from being cleaned up."""
        try:
            self._try(task)
        except Exception as error:
            match kind_of(error):
                case ErrorKind.UNRECORDABLE:
                    raise
                case ErrorKind.RIGHT_LOST:  # another host has adopted it
                    return
            log.exception("objects cannot be removed", bundle_id=task.bundle_id)
            self._retries.record_failure(task.bundle_id)

    def _try(self, task: BundleTask) -> None:
        self._records.require_lease(task.bundle_id)
        journal = self._records.journal(task.bundle_id)
        try:
            owners = self._buckets.on_behalf_of(task.access_key_id)
            buckets = RetryingStore(owners, 0.0, before_attempt=self._before_attempt, unanswered=IN_FLIGHT.unanswered)
            remove = remove_earlier if task.state is BundleTaskState.COMPLETE else remove_objects
            remove(buckets, BundleLocation.of(task), journal, stall_timeout=self._stall_timeout)
        except (TransientError, TaskFailure) as error:
            log.warning("objects cannot be removed yet", bundle_id=task.bundle_id, error=str(error))
        except BucketError as error:
            # Each attempt logs this once, at last once an hour.
            command = f"thrave task show {task.bundle_id}"
            log.warning(
                "the store does not let objects be removed; the command shows which, and how to remove them",
                bundle_id=task.bundle_id, bucket=task.bucket, error=str(error), command=command,
            )  # fmt: skip
        if self._records.has_orphans(task.bundle_id):
            self._retries.record_failure(task.bundle_id)
        else:
            self._retries.forget(task.bundle_id)


RETENTION_INTERVAL = 3600.0  # seconds between two looks


AT_ONCE = 500  # tasks in one transaction, so that nobody waits for long


class TaskRetention:
    """How long what has ended is remembered."""

    def __init__(self, records: TaskRepository, forget: Callable[[datetime], int], keep: timedelta) -> None:
        """Remember for `keep` after the end; `forget` is the engine's, and says how many it has forgotten."""
        self._records = records
        self._forget = forget
        self._keep = keep

    def look(self) -> None:
        """Forget what is old enough."""
        while self._purge():
            pass
        before = self._records.now() - self._keep
        while self._forget(before):
            pass

    def _purge(self) -> int:
        with failpoint("task purged"):
            return self._records.delete_ended(self._keep, limit=AT_ONCE)
