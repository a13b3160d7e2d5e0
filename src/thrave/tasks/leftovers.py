"""Takes away what failed tasks could not: objects that a bucket would not delete, at the time, or could not.

What a task had in its bucket is written down until it is deleted (`journal.py`). A failed task whose journal is not
empty has left something; here it is tried again, at longer and longer intervals, for as long as it takes, also after a
restart. Deleting is the service's own right: that the task's upload policy has expired, or was erased, does not matter.
It deletes exactly what is written down, and never touches a task that has not failed.
"""

from datetime import datetime, timedelta

import structlog

from thrave.buckets.buckets import Buckets
from thrave.buckets.errors import BucketError
from thrave.database import utc_now
from thrave.tasks.failures import TaskFailure
from thrave.tasks.records import Records
from thrave.tasks.retries import Retries
from thrave.tasks.storing import remove_objects
from thrave.tasks.task import BundleTask

INTERVAL = 15.0  # seconds between two looks
LONGEST = 3600.0  # seconds between two attempts, at last

_OVERLAP = timedelta(minutes=5)  # by which the clocks of hosts may differ

log = structlog.get_logger()


class LeftOvers:
    """What failed tasks have left, as one host's agent sees to it."""

    def __init__(self, records: Records, buckets: Buckets, host: str, *, stall_timeout: float) -> None:
        """Take away what the tasks of `host`, and of hosts that were given up, have left in `buckets`."""
        self._records = records
        self._buckets = buckets
        self._host = host
        self._stall_timeout = stall_timeout
        self._seen: datetime | None = None
        self._known: dict[str, BundleTask] = {}
        self._retries = Retries(INTERVAL, LONGEST)

    def look(self) -> None:
        """Take away what is due to be tried."""
        now = utc_now()
        for task in self._records.left_over(self._host, ended_after=self._seen):
            self._known.setdefault(task.bundle_id, task)
        self._seen = now - _OVERLAP
        for task in [*self._known.values()]:
            if self._retries.is_due(task.bundle_id):
                self._try(task)

    def _try(self, task: BundleTask) -> None:
        if task.host == self._host:
            self._records.check_mine(task.bundle_id)
        journal = self._records.journal(task.bundle_id)
        try:
            remove_objects(self._buckets, task.bucket, journal, stall_timeout=self._stall_timeout)
        except (BucketError, TaskFailure) as error:
            log.warning("objects cannot be removed", bundle_id=task.bundle_id, reason=str(error))
        if journal.objects():
            self._retries.failed(task.bundle_id)
        else:
            self._retries.over(task.bundle_id)
            del self._known[task.bundle_id]
