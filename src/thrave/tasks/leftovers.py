"""Tries again to remove objects that could not be removed at once, for as long as it takes, also after a restart.

These are the objects of failed tasks, those of bundles that were replaced, and those that a lost request may have
stored after they were removed (`claims.py`). Deleting is the right of the bucket's owner, in whose name the service
acts: that the task's upload policy has expired, or was erased, does not matter. What the service may not delete is
reported to the operator. What is deleted, and what never, is decided in `removal.py`.
"""

import structlog

from thrave.buckets.attempts import Check, no_check
from thrave.buckets.base import ObjectStore
from thrave.buckets.errors import BucketError, TransientError
from thrave.buckets.retrying_store import RetryingStore
from thrave.tasks.calls import PLACES
from thrave.tasks.failures import Kind, TaskFailure, kind_of
from thrave.tasks.places import Place
from thrave.tasks.records import Records
from thrave.tasks.removal import remove_earlier, remove_objects
from thrave.tasks.retries import Retries
from thrave.tasks.states import BundleTaskState
from thrave.tasks.task import BundleTask

INTERVAL = 15.0  # seconds between two looks
LONGEST = 3600.0  # seconds between two attempts, at last

log = structlog.get_logger()


class LeftOvers:
    """Removes what the tasks of one host could not remove."""

    def __init__(
        self,
        records: Records,
        buckets: ObjectStore,
        host: str,
        *,
        stall_timeout: float,
        before_attempt: Check = no_check,
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
        self._retries = Retries(INTERVAL, LONGEST)

    def look(self) -> None:
        """Remove what is due to be tried."""
        for task in self._records.to_clean_up(self._host):
            if self._retries.is_due(task.bundle_id):
                self._try_alone(task)

    def _try_alone(self, task: BundleTask) -> None:
        """Try to clean up one task; what it raises does not keep the others from being cleaned up."""
        try:
            self._try(task)
        except Exception as error:
            match kind_of(error):
                case Kind.UNRECORDABLE:
                    raise
                case Kind.RIGHT_LOST:  # another host has adopted it
                    return
            log.exception("objects cannot be removed", bundle_id=task.bundle_id)
            self._retries.failed(task.bundle_id)

    def _try(self, task: BundleTask) -> None:
        self._records.check_mine(task.bundle_id)
        journal = self._records.journal(task.bundle_id)
        try:
            owners = self._buckets.on_behalf_of(task.access_key_id)
            buckets = RetryingStore(owners, 0.0, before_attempt=self._before_attempt, unanswered=PLACES.unanswered)
            remove = remove_earlier if task.state is BundleTaskState.COMPLETE else remove_objects
            remove(buckets, Place.of(task), journal, stall_timeout=self._stall_timeout)
        except (TransientError, TaskFailure) as error:
            log.warning("objects cannot be removed yet", bundle_id=task.bundle_id, error=str(error))
        except BucketError as error:
            # Each attempt logs this once, at last once an hour.
            command = f"thrave task show {task.bundle_id}"
            log.warning(
                "the store does not let objects be removed; the command shows which, and how to remove them",
                bundle_id=task.bundle_id, bucket=task.bucket, error=str(error), command=command,
            )  # fmt: skip
        if self._records.has_left_over(task.bundle_id):
            self._retries.failed(task.bundle_id)
        else:
            self._retries.over(task.bundle_id)
