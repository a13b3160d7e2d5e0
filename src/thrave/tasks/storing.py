"""One bundle's objects in its bucket: sent under the caller's upload policy, written down, checked, removed.

Every key is written down before it is sent, so that clean-up after a crash finds exactly what was sent and nothing
else. It never touches an object that this task did not write, and never a bucket.
"""

from thrave.buckets.buckets import Buckets
from thrave.buckets.naming import split_prefix
from thrave.buckets.policy import UploadPolicy
from thrave.tasks.failures import TaskFailure
from thrave.tasks.records import Records
from thrave.tasks.task import BundleTask
from thrave.tasks.watch import Watch


class BundleStore:
    """Where one task's bundle goes."""

    def __init__(self, buckets: Buckets, records: Records, task: BundleTask) -> None:
        """Send to the task's bucket, under its prefix, what the caller's upload policy allows."""
        self._buckets = buckets
        self._records = records
        self._task = task
        self._folder, self.name = split_prefix(task.prefix)
        self._policy = UploadPolicy.trusted(*records.grant(task.bundle_id), task.access_key_id)

    def put(self, filename: str, data: bytes | memoryview) -> None:
        """Send one object of the bundle, whole. Raises BucketError if the policy or the bucket refuses it."""
        key = self._folder + filename
        self._records.sending(self._task.bundle_id, key)
        self._buckets.put(self._task.bucket, key, data, grant=self._policy)
        self._records.stored(self._task.bundle_id, key, len(data))

    def check(self, watch: Watch) -> None:
        """Make sure that the bucket has every object that it took. Raises TaskFailure if one is not there, whole."""
        taken = [item for item in self._records.objects(self._task.bundle_id) if item.size is not None]
        for item in watch.each(taken):
            head = self._buckets.head(self._task.bucket, item.key)
            if head is None or head.size != item.size:
                raise TaskFailure("Client.S3Error", f"The bucket has lost the part '{item.key}' that it had taken.")

    def remove(self) -> None:
        """Take away every object that this task has sent or begun to send."""
        keys = [item.key for item in self._records.objects(self._task.bundle_id)]
        self._buckets.delete(self._task.bucket, keys)
        self._records.forget_objects(self._task.bundle_id)
