"""Deletes the objects of failed tasks and of replaced bundles.

Only objects that the task has claimed are deleted (`claims.py`), and none that another bundle's manifest in the bucket
names. Objects that could not be deleted stay recorded, and the agent retries (`housekeeping.py`).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import structlog

from thrave.buckets.base import ObjectStore
from thrave.buckets.errors import AccessDenied, BucketError, TransientError
from thrave.buckets.retrying_store import RetryingStore
from thrave.tasks.bundle_location import BundleLocation
from thrave.tasks.errors import TaskFailure
from thrave.tasks.failpoints import failpoint
from thrave.tasks.journal import UploadJournal
from thrave.tasks.store_calls import IN_FLIGHT, CallGroup

_DELETE_BATCH = 1000  # keys in one request to delete: S3's limit
_MAX_HEADS = 16  # concurrent HEAD requests

log = structlog.get_logger()
_Result = TypeVar("_Result")


def remove_objects(
    buckets: RetryingStore, location: BundleLocation, journal: UploadJournal, *, stall_timeout: float
) -> None:
    """Delete every object of a task that has failed or seals from the beginning, and restore the manifest it replaced.

    An object with a call of this process in flight stays recorded, and is deleted again later. A failed task's own
    manifest does not keep its objects: it may be in the bucket because its deletion hangs, or because an upload of it
    arrived late. Only while such an upload may still replace the manifest of an earlier bundle, the objects stay:
    the bucket must not have a manifest whose parts are deleted instead of a bundle that can be opened.

    Args:
        buckets: The store, on behalf of the bucket's owner.
        location: Location of the task's bundle.
        journal: The task's journal.
        stall_timeout: Seconds that a call may take.

    Raises:
        BucketError: The store refuses a request.
        TaskFailure: The store does not respond for `stall_timeout` seconds.
    """
    removal = _Removal(buckets, location, journal, stall_timeout)
    with removal.claimed(everything=True) as keys, failpoint("objects-deleted"):
        if not keys:
            return
        undo = location.manifest_key in keys - removal.busy
        other = removal.call(partial(_undo_manifest, location, journal, keys, undo=undo))
        if not removal.may_replace_earlier():
            removal.delete(keys - {location.manifest_key}, other)
        if undo:  # deleted, replaced by the earlier one, or another bundle's
            removal.gone.add(location.manifest_key)


def remove_earlier(
    buckets: RetryingStore, location: BundleLocation, journal: UploadJournal, *, stall_timeout: float
) -> None:
    """Delete the remaining objects of the bundle that a task has replaced. The manifest is the task's own now.

    Raises:
        BucketError, TaskFailure: As `remove_objects`.
    """
    removal = _Removal(buckets, location, journal, stall_timeout)
    with removal.claimed(everything=False) as keys, failpoint("earlier-bundle-deleted"):
        if keys:
            removal.delete(keys, removal.call(location.read_manifest))
    if journal.earlier() is not None and not journal.orphaned_objects():
        with failpoint("deletion-recorded"):
            journal.record_earlier(None)


class _Removal:
    """One attempt to delete what a task has claimed for deletion."""

    def __init__(
        self,
        buckets: RetryingStore,
        location: BundleLocation,
        journal: UploadJournal,
        stall_timeout: float,
    ) -> None:
        self._buckets = buckets
        self._location = location
        self._journal = journal
        self._stall_timeout = stall_timeout
        self.busy: set[str] = set()
        self.gone: set[str] = set()
        """Keys that are not in the store any more, by its own response, or that belong to another bundle."""

    @contextmanager
    def claimed(self, *, everything: bool) -> Iterator[set[str]]:
        """Claim the objects to delete. At the end record which are gone, also after an error."""
        self.busy = IN_FLIGHT.in_flight_keys(self._location.bucket)
        keys = {*self._journal.start_deletion(self._unanswered(), everything=everything)}
        try:
            yield keys
        except (BucketError, TaskFailure):  # abandoned calls count as busy
            self._record()
            raise
        if keys:
            self._record()

    def call(self, call: Callable[[RetryingStore], _Result]) -> _Result:
        """Make one call with the timeout `stall_timeout`."""
        with _task_timeout(self._stall_timeout), CallGroup[_Result]() as calls:
            calls.start(partial(call, self._buckets.checking(calls.check_wanted)))
            (answer,) = calls.remaining(timeout=self._stall_timeout)
        return answer

    def may_replace_earlier(self) -> bool:
        """Whether an upload of the task's manifest may still arrive, and replace the manifest of an earlier bundle."""
        earlier, key = self._journal.earlier(), self._location.manifest_key
        if earlier is None or earlier.is_replaced:
            return False
        return key in self.busy or self._journal.may_arrive_late(key)

    def delete(self, keys: set[str], manifest: bytes | None) -> None:
        """Delete objects except those of the bundle whose manifest is in the bucket.

        A deleted object counts as gone only when the store no longer has it.
        """
        in_use = set[str]()
        if manifest is not None:
            in_use = self.call(partial(self._location.keys_in_use, manifest=manifest, keys=keys))
        self.gone |= in_use
        to_delete = sorted(keys - in_use)
        for start in range(0, len(to_delete), _DELETE_BATCH):
            self._delete_batch(to_delete[start : start + _DELETE_BATCH])

    def _delete_batch(self, keys: Sequence[str]) -> None:
        refusal: BucketError | None = None
        try:
            self.call(partial(_delete, bucket=self._location.bucket, keys=keys))
        except AccessDenied as error:  # another program may have deleted the objects
            refusal = error
        exist = self._existing(keys)
        self.gone |= set(keys) - exist
        if exist:
            raise refusal or _not_deleted()

    def _existing(self, keys: Sequence[str]) -> set[str]:
        """Return the keys that are still in the bucket: a successful response to a deletion proves nothing."""
        found = set[str]()
        with _task_timeout(self._stall_timeout), CallGroup[tuple[str, bool]]() as calls:
            buckets = self._buckets.checking(calls.check_wanted)
            for key in keys:
                if calls.pending >= _MAX_HEADS:
                    found |= {each for each, exists in calls.results(timeout=self._stall_timeout) if exists}
                calls.start(partial(_head, buckets, self._location.bucket, key))
            for each, exists in calls.remaining(timeout=self._stall_timeout):
                found |= {each} if exists else set()
        return found

    def _record(self) -> None:
        busy = self.busy | IN_FLIGHT.in_flight_keys(self._location.bucket)
        with failpoint("deletion-recorded"):
            unanswered = self._unanswered()
            self._journal.end_deletion(self.gone, unanswered=unanswered, busy=busy)
            IN_FLIGHT.clear_unanswered(self._location.bucket, unanswered)

    def _unanswered(self) -> set[str]:
        return IN_FLIGHT.unanswered_of(self._location.bucket, [item.key for item in self._journal.objects()])


def _undo_manifest(
    location: BundleLocation, journal: UploadJournal, keys: Collection[str], buckets: RetryingStore, *, undo: bool
) -> bytes | None:
    """Delete or replace the manifest that a task has written; return the manifest of another bundle at its key.

    Without `undo` the task's own manifest stays in the bucket; it is not returned.
    """
    found = location.read_manifest(buckets)
    earlier, documents = journal.earlier(), journal.documents()
    if found is None or (earlier is not None and (earlier.is_replaced or found == earlier.manifest)):
        return found
    if not journal.is_manifest_sent():
        # Another bundle's. Or the database was restored from a backup of a time before this task sent its manifest:
        # then the bundle is complete.
        return found
    own = None if documents is None else documents["manifest"].encode()
    part_keys = location.part_keys(found)
    # An unreadable manifest is a damaged one of ours; a manifest of other parts is another bundle's.
    if found != own and part_keys and not set(part_keys) & set(keys):
        return found
    if not undo:
        return None
    with IN_FLIGHT.shared(location.bucket, [location.manifest_key]):
        if earlier is None:
            buckets.delete(location.bucket, [location.manifest_key])
            if _exists(buckets, location.bucket, location.manifest_key):
                raise _not_deleted()
            return None
        buckets.put(location.bucket, location.manifest_key, earlier.manifest)
    return earlier.manifest


@contextmanager
def _task_timeout(stall_timeout: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        message = f"The store did not respond for {stall_timeout:g} seconds while objects were being deleted."
        raise TaskFailure("Server.NoProgress", message) from None


def _delete(buckets: RetryingStore, bucket: str, keys: Sequence[str]) -> None:
    with IN_FLIGHT.shared(bucket, keys):
        buckets.delete(bucket, keys)


def _head(buckets: ObjectStore, bucket: str, key: str) -> tuple[str, bool]:
    return key, _exists(buckets, bucket, key)


def _exists(buckets: ObjectStore, bucket: str, key: str) -> bool:
    return buckets.head(bucket, key) is not None


def _not_deleted() -> TransientError:
    return TransientError("InternalError", 500, "The store confirmed a deletion, but still has the object")
