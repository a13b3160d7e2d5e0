"""One bundle's objects in its bucket: sent under the caller's upload policy, written down, checked, removed.

Every key is written down before it is sent, so that clean-up after a crash finds exactly what was sent and nothing
else. It never touches an object that this task did not write, and never a bucket.
"""

from thrave.buckets.buckets import Buckets
from thrave.buckets.naming import split_prefix
from thrave.buckets.policy import UploadPolicy
from thrave.bundle.sealed import Part
from thrave.tasks.crash_points import durable
from thrave.tasks.failures import TaskFailure
from thrave.tasks.journal import Journal
from thrave.tasks.task import BundleTask
from thrave.tasks.watch import Watch


class BundleStore:
    """Where one task's bundle goes."""

    def __init__(self, buckets: Buckets, journal: Journal, task: BundleTask, policy: UploadPolicy) -> None:
        """Send to the task's bucket, under its prefix, what the caller's upload policy allows."""
        self._buckets = buckets
        self._journal = journal
        self._bucket = task.bucket
        self._folder, self.name = split_prefix(task.prefix)
        self._policy = policy

    def put(self, filename: str, data: bytes) -> None:
        """Send one file of the bundle, whole. Raises BucketError if the policy or the bucket refuses it."""
        key = self._folder + filename
        self._journal.sending(key)
        self._buckets.put(self._bucket, key, data, grant=self._policy)
        self._journal.stored(key, len(data))

    def put_part(self, part: Part) -> None:
        """Send one part; once it is there, sealing never goes back behind it. Raises BucketError as `put`."""
        key = self._folder + part.filename
        with durable("part sealed"):
            self._journal.sending(key)
        with durable("part stored"):
            self._buckets.put(self._bucket, key, part.data, grant=self._policy)
        with durable("part recorded"):
            self._journal.stored_part(key, part)

    def check(self, watch: Watch) -> None:
        """Make sure that the bucket has every object that it took. Raises TaskFailure if one is not there, whole."""
        taken = [item for item in self._journal.objects() if item.size is not None]
        for item in watch.each(taken):
            head = self._buckets.head(self._bucket, item.key)
            if head is None or head.size != item.size:
                raise TaskFailure("Client.S3Error", f"The bucket has lost the part '{item.key}' that it had taken.")

    def remove(self) -> None:
        """Take away every object that this task has sent or begun to send."""
        with durable("objects removed"):
            self._buckets.delete(self._bucket, [item.key for item in self._journal.objects()])
        with durable("removal recorded"):
            self._journal.forget()
