"""Tries again to remove objects that could not be removed at once, for as long as it takes, also after a restart.

These are the objects of failed tasks (`bundle_part` has their keys until they are deleted) and those of bundles that
were replaced. Deleting is the right of the bucket's owner, in whose name the service acts: that the task's upload
policy has expired, or was erased, does not matter. What is deleted, and what never, is decided in `removal.py`.
"""

from datetime import datetime, timedelta

import structlog

from thrave.buckets.buckets import Buckets
from thrave.buckets.errors import BucketError
from thrave.database import utc_now
from thrave.tasks.failures import TaskFailure
from thrave.tasks.places import Place
from thrave.tasks.records import Records
from thrave.tasks.removal import remove_earlier, remove_objects
from thrave.tasks.retries import Retries
from thrave.tasks.states import BundleTaskState
from thrave.tasks.task import BundleTask

INTERVAL = 15.0  # seconds between two looks
LONGEST = 3600.0  # seconds between two attempts, at last

_OVERLAP = timedelta(minutes=5)  # by which the clocks of hosts may differ

log = structlog.get_logger()


class LeftOvers:
    """Removes what the tasks of one host could not remove."""

    def __init__(self, records: Records, buckets: Buckets, host: str, *, stall_timeout: float) -> None:
        """Remove what the tasks of `host`, and of hosts that were given up, have left in `buckets`."""
        self._records = records
        self._buckets = buckets
        self._host = host
        self._stall_timeout = stall_timeout
        self._seen: datetime | None = None
        self._known: dict[str, BundleTask] = {}
        self._retries = Retries(INTERVAL, LONGEST)

    def look(self) -> None:
        """Remove what is due to be tried."""
        now = utc_now()
        failed = self._records.left_over(self._host, ended_after=self._seen)
        for task in [*failed, *self._records.replacing(self._host)]:
            self._known.setdefault(task.bundle_id, task)
        self._seen = now - _OVERLAP
        for task in [*self._known.values()]:
            if self._retries.is_due(task.bundle_id):
                self._try(task)

    def _try(self, task: BundleTask) -> None:
        if task.host == self._host:
            self._records.check_mine(task.bundle_id)
        if self._records.in_progress_at(task.bucket, task.prefix) is not None:
            return  # that task may be about to store its manifest
        journal = self._records.journal(task.bundle_id)
        try:
            buckets = self._buckets.on_behalf_of(task.access_key_id)
            remove = remove_earlier if task.state is BundleTaskState.COMPLETE else remove_objects
            remove(buckets, Place.of(task), journal, stall_timeout=self._stall_timeout)
        except (BucketError, TaskFailure) as error:
            log.warning("objects cannot be removed", bundle_id=task.bundle_id, error=str(error))
        if self._records.has_left_over(task.bundle_id):
            self._retries.failed(task.bundle_id)
        else:
            self._retries.over(task.bundle_id)
            del self._known[task.bundle_id]
