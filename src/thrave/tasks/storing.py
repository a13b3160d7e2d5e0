"""One bundle's objects in its bucket: sent under the caller's upload policy, written down, checked, removed.

Every key is written down before it is sent, so that clean-up after a crash finds exactly what was sent and nothing
else. It never touches an object that this task did not write, but for the manifest of an earlier bundle in the same
place, and never a bucket. Nobody waits within the store: what hangs there is left behind (`calls.py`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial

import structlog

from thrave.buckets.buckets import Buckets
from thrave.buckets.errors import BucketError, TransientError
from thrave.buckets.naming import split_prefix
from thrave.buckets.policy import UploadPolicy
from thrave.buckets.retrying import RetryingBuckets
from thrave.bundle.crew import StoppedError
from thrave.bundle.names import manifest_filename
from thrave.bundle.sealing import Sealing
from thrave.tasks.calls import Calls, Places
from thrave.tasks.crash_points import durable
from thrave.tasks.failures import TaskFailure
from thrave.tasks.journal import Journal, Left, Stored, StoredObject
from thrave.tasks.task import BundleTask
from thrave.tasks.uploads import Arrived, PartUploads
from thrave.tasks.watch import Watch

_HEADS_AT_ONCE = 16
_KEYS_AT_ONCE = 1000  # of one request to delete: S3's limit
_PLACES = Places()  # this process's

log = structlog.get_logger()


class BundleStore:
    """Where one task's bundle goes."""

    def __init__(
        self,
        buckets: Buckets,
        journal: Journal,
        task: BundleTask,
        policy: UploadPolicy,
        *,
        uploads_at_once: int,
        patience: float,
        stall_timeout: float,
    ) -> None:
        """Send to the task's bucket, under its prefix, what the caller's upload policy allows.

        Args:
            buckets: The store.
            journal: Where what is sent is written down.
            task: Whose bundle it is.
            policy: The caller's.
            uploads_at_once: Parts that are sent at the same time; each is in memory.
            patience: Seconds for which a call is made again that fails in a way that may pass.
            stall_timeout: Seconds without an answer after which removing is given up.
        """
        self._buckets = RetryingBuckets(buckets, patience, self._retried)
        self._retries: list[TransientError] = []
        self._journal = journal
        self._bucket = task.bucket
        self._folder, self.name = split_prefix(task.prefix)
        self._policy = policy
        self._uploads_at_once = uploads_at_once
        self._stall_timeout = stall_timeout

    def make_way(self, watch: Watch) -> bool:
        """Remove the manifest of an earlier bundle, whose parts are about to be overwritten; say if there was one.

        A manifest means that its bundle is complete, and that one is no longer. The policy that allows it to be
        overwritten allows that.
        """
        key = self._folder + manifest_filename(self.name)
        self._policy.check_upload(self._bucket, key, content_length=None, now=datetime.now(UTC))
        with Calls[bool]() as calls:
            watch.over(calls.stop)
            calls.begin(partial(self._remove_if_there, key))
            return calls.results()[0]

    def put_parts(self, sealing: Sealing, left: Left, watch: Watch) -> None:
        """Send the parts of a sealing as they come, several at once; what is `left` of them is not sent again.

        Raises:
            BucketError: The policy or the bucket refuses one. The others are stopped.
            ResumeError: The image is not the one that was sealed before.
        """
        with self._telling(watch), Calls[Arrived](wake=sealing.cancel) as calls:
            watch.over(calls.stop, lambda: sealing.progress)
            uploads = PartUploads(
                calls,
                self._journal,
                left,
                partial(self._upload, calls),
                folder=self._folder,
                at_once=self._uploads_at_once,
                moved=watch.moved,
            )
            try:
                uploads.store(sealing)
            except StoppedError:
                calls.check()  # a failed upload has stopped the sealing
                raise

    def put(self, filename: str, data: bytes, watch: Watch) -> None:
        """Send one file of the bundle, whole, and look that it is there: nobody else will, of the last one.

        Raises:
            BucketError: The policy or the bucket refuses it.
            TaskFailure: The bucket has not got what it took.
        """
        key = self._folder + filename
        self._journal.sending(key)
        with Calls[StoredObject]() as calls:
            watch.over(calls.stop)
            calls.begin(partial(self._upload_surely, calls, key, memoryview(data)))
            self._journal.stored(Stored(calls.results()))

    def check(self, watch: Watch) -> None:
        """Make sure that the bucket has every object that it took. Raises TaskFailure if one is not there, whole."""
        taken = [item for item in self._journal.objects() if item.size is not None]
        done = 0
        with Calls[None]() as calls:
            watch.over(calls.stop, lambda: done / len(taken))
            for item in taken:
                if calls.pending >= _HEADS_AT_ONCE:
                    done += len(calls.results())
                    watch.moved()
                calls.begin(partial(self._check, item))
            while calls.pending:
                done += len(calls.results())
                watch.moved()

    def remove(self) -> None:
        """Take away every object that this task has sent or begun to send; as `remove_objects`."""
        remove_objects(self._buckets, self._bucket, self._journal, stall_timeout=self._stall_timeout)

    def _upload(self, calls: Calls[Arrived] | Calls[StoredObject], key: str, data: memoryview) -> StoredObject:
        with _PLACES.alone(self._bucket, key):
            if calls.stopped:
                raise StoppedError
            try:
                etag = self._buckets.put(self._bucket, key, data, grant=self._policy)
            finally:
                if calls.left:
                    self._take_back(key)
        return StoredObject(key, data.nbytes, etag)

    def _upload_surely(self, calls: Calls[StoredObject], key: str, data: memoryview) -> StoredObject:
        stored = self._upload(calls, key, data)
        self._check(stored)
        return stored

    def _take_back(self, key: str) -> None:
        """Remove what an upload has stored that was left behind: its task has ended, or has begun again."""
        log.warning("an upload came back late", bundle_id=self._journal.bundle_id, key=key)
        with suppress(BucketError):  # it stays written down
            if not self._journal.is_anothers(key):
                self._buckets.delete(self._bucket, [key])

    def _remove_if_there(self, key: str) -> bool:
        if self._buckets.head(self._bucket, key) is None:
            return False
        self._buckets.delete(self._bucket, [key])
        return True

    def _check(self, item: StoredObject) -> None:
        head = self._buckets.head(self._bucket, item.key)
        if head is None:
            raise TaskFailure("Server.S3Error", f"The bucket has lost '{item.key}', which it had taken.")
        if head.size != item.size or (item.etag and head.etag and head.etag != item.etag):
            raise TaskFailure("Client.S3Error", f"The bucket has something else now as '{item.key}'.")

    @contextmanager
    def _telling(self, watch: Watch) -> Iterator[None]:
        """Tell afterwards how often the store had to be asked again."""
        try:
            yield
        finally:
            retries, self._retries = self._retries, []
            if retries:
                watch.tell(f"Calls to the store that were made again: {len(retries)}, the last after {retries[-1]}")

    def _retried(self, reason: TransientError, seconds: float) -> None:
        self._retries.append(reason)
        log.warning(
            "the store failed; trying again",
            bundle_id=self._journal.bundle_id,
            error=str(reason),
            seconds=round(seconds, 1),
        )


def remove_objects(buckets: Buckets, bucket: str, journal: Journal, *, stall_timeout: float) -> None:
    """Take away every object that a task has sent or begun to send, by the service's own right.

    What an upload that was left behind is still under way to stays written down, and is taken away at its end.

    Raises:
        BucketError: The store refuses it.
        TaskFailure: It does not answer for `stall_timeout` seconds.
    """
    keys = journal.left_over()
    with durable("objects removed"), Calls[None]() as calls:
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            calls.begin(partial(_delete, buckets, bucket, keys[start : start + _KEYS_AT_ONCE]))
            _await(calls, stall_timeout)
    with durable("removal recorded"):
        journal.forget(but=_PLACES.taken(bucket))


def _delete(buckets: Buckets, bucket: str, keys: Sequence[str]) -> None:
    """Delete objects of one request; a look at the last of them tells whether the store has done what it said."""
    buckets.delete(bucket, keys)
    if buckets.head(bucket, keys[-1]) is not None:
        raise TransientError("InternalError", 500, "The store has kept what it said it had deleted")


def _await(calls: Calls[None], stall_timeout: float) -> None:
    try:
        calls.results(within=stall_timeout)
    except TimeoutError:
        words = f"The store did not answer for {stall_timeout:g} seconds when objects were to be removed."
        raise TaskFailure("Server.NoProgress", words) from None
