"""Background jobs of a host's agent: power recovery, object cleanup, retention of ended tasks.

Each job has a `run_once`, which the agent calls at a fixed interval, also after a restart. Which objects may be deleted
is decided in `object_removal.py`.
"""

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
from thrave.compute.power import STARTABLE_STATES, power_lock
from thrave.concurrency import NoThreadError, RunningThread, monotonic, start_thread
from thrave.retry import RetrySchedule
from thrave.tasks.bundle_location import BundleLocation
from thrave.tasks.errors import ErrorKind, TaskFailure, kind_of
from thrave.tasks.failpoints import failpoint
from thrave.tasks.instance_power import RootOverlay
from thrave.tasks.models import BundleTask, BundleTaskState
from thrave.tasks.object_removal import remove_earlier, remove_objects
from thrave.tasks.repository import RECOVER_FOR, TaskRepository
from thrave.tasks.store_calls import IN_FLIGHT
from thrave.write_guard import WriteCheck, command_guard, no_check

# Seconds between two calls of `run_once`, and at most between two attempts for one item.
POWER_RECOVERY_INTERVAL = 1.0
MAX_POWER_RECOVERY_INTERVAL = 300.0
OBJECT_CLEANUP_INTERVAL = 15.0
MAX_OBJECT_CLEANUP_INTERVAL = 3600.0
RETENTION_INTERVAL = 3600.0

MERGE_TIMEOUT = 60.0  # seconds for one attempt: other overlays wait
DELETE_BATCH = 500  # tasks in one transaction, so that other transactions do not wait long
_RECOVERY_TIMEOUT = 10.0  # seconds; an instance that takes longer does not delay the next `run_once`
_LOST_HOSTS_RUN_INTERVAL = 10  # every tenth `run_once` also recovers instances of tasks whose host is lost

log = structlog.get_logger()


class PowerRecovery:
    """Starts instances of one host whose task ended without doing so, and merges the overlays of ended tasks.

    A guest may still power off because of an earlier request: its task was cancelled or has failed, the instance still
    ran and was not started, and a minute later the guest powers off. Or the hypervisor cannot start an instance at the
    moment. Such an instance is started until `power_recovery_until`, if its owner still wants it to run. An instance
    whose next task has started is not changed, and no instance is stopped.
    """

    def __init__(
        self,
        records: TaskRepository,
        instances: HypervisorDriver,
        host: str,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Recover the instances of the ended tasks of `host`.

        Args:
            records: The tasks.
            instances: The instances of this machine.
            host: The host.
            check: Called before each command to the hypervisor; raises if this process may not give one.
        """
        self._records = records
        self._instances = instances
        self._host = host
        self._check = check
        self._retries = RetrySchedule(POWER_RECOVERY_INTERVAL, MAX_POWER_RECOVERY_INTERVAL)
        self._merge_retries = RetrySchedule(POWER_RECOVERY_INTERVAL, MAX_POWER_RECOVERY_INTERVAL)
        self._extended: set[str] = set()
        self._runs = 0

    def run_once(self) -> None:
        """Check each instance once, and start those that have powered off.

        Each instance has a thread of its own, so that one that hangs or cannot be started does not delay the others.
        """
        tasks = self._records.power_recoveries(self._host)
        if self._runs % _LOST_HOSTS_RUN_INTERVAL == 0:
            tasks += self._records.moved_power_recoveries(self._host)
            self._retries.keep({task.bundle_id for task in tasks})
        self._runs += 1
        started = monotonic()
        due = [task for task in tasks if self._retries.is_due(task.bundle_id)]
        for thread in [thread for task in due if (thread := self._start_recovery(task)) is not None]:
            thread.join(max(0.0, started + _RECOVERY_TIMEOUT - monotonic()))

    def merge_overlays(self) -> None:
        """Try once to merge each overlay of an ended task. May take minutes."""
        tasks = self._records.unmerged_overlays(self._host)
        self._merge_retries.keep({task.bundle_id for task in tasks})
        for task in tasks:
            if self._merge_retries.is_due(task.bundle_id):
                self._merge(task)

    def _start_recovery(self, task: BundleTask) -> RunningThread | None:
        def fail(error: BaseException) -> None:
            log.error("power recovery failed", instance_id=task.instance_id, exc_info=error)

        try:
            return start_thread(f"recover {task.instance_id}", lambda: self._recover(task), on_failure=fail)
        except NoThreadError as error:  # the next run tries again
            fail(error)
            return None

    def _recover(self, task: BundleTask) -> None:
        """Recover one instance. Every failure is retried later."""
        bundle_id = task.bundle_id
        try:
            is_done = self._start_if_needed(task)
        except InstanceLocked:  # another thread changes its power
            return
        except InstanceNotFound:
            is_done = True
        except SQLAlchemyError as error:
            log.warning("database unavailable, retrying", error=type(error).__name__)
            return
        except Exception as error:  # noqa: BLE001 (other instances are not affected)
            self._retries.record_failure(bundle_id)
            log.warning("power recovery failed", instance_id=task.instance_id, error=str(error) or type(error).__name__)
            is_done = self._is_period_over(task) and not self._extend(task)
        if is_done:
            self._records.schedule_power_recovery(bundle_id, None)
            self._records.give_back(bundle_id)
            self._retries.forget(bundle_id)

    def _start_if_needed(self, task: BundleTask) -> bool:
        """Start the instance if it is off and must run; return whether nothing remains to do."""
        if self._records.in_progress(task.instance_id):
            return False
        is_period_over = self._is_period_over(task)
        with power_lock(task.instance_id):
            state = self._instances.state(task.instance_id)
            # Read again: since the list was read, the owner may have stopped it, or another task may have started.
            if not self._records.should_start(task.bundle_id):
                return True
            if self._records.in_progress(task.instance_id):
                return False
            # A description file stays at `stopping` if the process that ran the stopCommand has ended.
            is_off = state in STARTABLE_STATES or (is_period_over and state is InstanceState.STOPPING)
            if is_off:
                self._start(task)
        return is_off or is_period_over or state in TERMINATING

    def _is_period_over(self, task: BundleTask) -> bool:
        return task.power_recovery_until is not None and task.power_recovery_until < self._records.now()

    def _extend(self, task: BundleTask) -> bool:
        """Extend the recovery of an instance that does not start, once: perhaps no agent has run until now."""
        if task.bundle_id in self._extended:
            return False
        self._extended.add(task.bundle_id)
        self._records.schedule_power_recovery(task.bundle_id, RECOVER_FOR)
        return True

    def _merge(self, task: BundleTask) -> None:
        try:
            if self._records.in_progress(task.instance_id) is not None:
                return
            log.info("merging the overlay of an ended task", instance_id=task.instance_id)
            self._records.require_lease(task.bundle_id)
            self._check()
            RootOverlay(self._instances, self._records, task, check=self._check).merge_with_timeout(MERGE_TIMEOUT)
        except Exception as error:  # noqa: BLE001 (other instances are not affected)
            self._merge_retries.record_failure(task.bundle_id)
            log.warning("overlay merge failed, retrying", instance_id=task.instance_id, error=str(error))
        else:
            self._merge_retries.forget(task.bundle_id)

    def _start(self, task: BundleTask) -> None:
        log.info("starting an instance that is off after its task has ended", instance_id=task.instance_id)

        def check() -> None:
            self._records.require_lease(task.bundle_id)
            self._check()

        with command_guard.using(check), failpoint("instance-started"):
            self._instances.start(task.instance_id)


class ObjectCleanup:
    """Deletes objects that the tasks of one host could not delete, until the store confirms it.

    These are objects of failed tasks, of replaced bundles, and those that a lost request may have stored after their
    deletion (`claims.py`). The service deletes on behalf of the bucket's owner, so an expired or erased upload policy
    does not matter. What the service may not delete is reported to the operator.
    """

    def __init__(
        self,
        records: TaskRepository,
        buckets: ObjectStore,
        host: str,
        *,
        stall_timeout: float,
        before_attempt: WriteCheck = no_check,
    ) -> None:
        """Clean up after the tasks of `host`, and of hosts that were retired.

        Args:
            records: The tasks.
            buckets: The store.
            host: The host.
            stall_timeout: Seconds that a call may take.
            before_attempt: Check made before each call; see `RetryingStore`.
        """
        self._records = records
        self._buckets = buckets
        self._host = host
        self._stall_timeout = stall_timeout
        self._before_attempt = before_attempt
        self._retries = RetrySchedule(OBJECT_CLEANUP_INTERVAL, MAX_OBJECT_CLEANUP_INTERVAL)

    def run_once(self) -> None:
        """Try each task that is due."""
        for task in self._records.cleanups(self._host):
            if self._retries.is_due(task.bundle_id):
                self._try_task(task)

    def _try_task(self, task: BundleTask) -> None:
        """Clean up one task. Its errors do not stop the cleanup of the others."""
        try:
            self._delete_objects(task)
        except Exception as error:
            match kind_of(error):
                case ErrorKind.UNRECORDABLE:
                    raise
                case ErrorKind.RIGHT_LOST:  # another host has adopted it
                    return
            log.exception("object cleanup failed", bundle_id=task.bundle_id)
            self._retries.record_failure(task.bundle_id)

    def _delete_objects(self, task: BundleTask) -> None:
        self._records.require_lease(task.bundle_id)
        journal = self._records.journal(task.bundle_id)
        try:
            owners = self._buckets.on_behalf_of(task.access_key_id)
            buckets = RetryingStore(owners, 0.0, before_attempt=self._before_attempt, unanswered=IN_FLIGHT.unanswered)
            remove = remove_earlier if task.state is BundleTaskState.COMPLETE else remove_objects
            remove(buckets, BundleLocation.of(task), journal, stall_timeout=self._stall_timeout)
        except (TransientError, TaskFailure) as error:
            log.warning("object cleanup incomplete, retrying", bundle_id=task.bundle_id, error=str(error))
        except BucketError as error:
            # Logged at each attempt, in the end once an hour.
            command = f"thrave task show {task.bundle_id}"
            log.warning(
                "store refuses to delete objects; the command lists them and how to delete them",
                bundle_id=task.bundle_id, bucket=task.bucket, error=str(error), command=command,
            )  # fmt: skip
        if self._records.has_orphans(task.bundle_id):
            self._retries.record_failure(task.bundle_id)
        else:
            self._retries.forget(task.bundle_id)


class TaskRetention:
    """Deletes the records of tasks that ended long ago: rows, events, parts, and workflows of the engine.

    A task is kept while something remains to do for it: an instance to recover, an object to delete. Bundles belong to
    their owners and are never touched.
    """

    def __init__(self, records: TaskRepository, delete_workflows: Callable[[datetime], int], keep: timedelta) -> None:
        """Keep tasks for `keep` after their end.

        Args:
            records: The tasks.
            delete_workflows: Deletes workflows that ended before a time; returns how many (`TaskQueue.delete_ended`).
            keep: How long.
        """
        self._records = records
        self._delete_workflows = delete_workflows
        self._keep = keep

    def run_once(self) -> None:
        """Delete tasks that ended more than `keep` ago, and their workflows."""
        while self._delete_batch():
            pass
        before = self._records.now() - self._keep
        while self._delete_workflows(before):
            pass

    def _delete_batch(self) -> int:
        with failpoint("task-deleted"):
            return self._records.delete_ended(self._keep, limit=DELETE_BATCH)
