"""Removes the objects of failed tasks, and of bundles that were replaced.

A failed task leaves what was there before it: what it wrote is deleted, and the manifest that it replaced is put back.
Only what was claimed before is deleted (`claims.py`), and nothing that another bundle's manifest in the bucket names.
What could not be deleted stays recorded, and the agent tries again (`leftovers.py`). A failed task's own manifest keeps
nothing: it may be in the bucket because its deletion hangs, or because an upload of it arrived late.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from thrave.buckets.base import ObjectStore
from thrave.buckets.errors import AccessDenied, BucketError, TransientError
from thrave.buckets.retrying_store import RetryingStore
from thrave.tasks.calls import PLACES, Calls, Places
from thrave.tasks.crash_points import durable
from thrave.tasks.failures import TaskFailure
from thrave.tasks.journal import Journal
from thrave.tasks.places import Place

_KEYS_AT_ONCE = 1000  # of one request to delete: S3's limit
_HEADS_AT_ONCE = 16

_Answer = TypeVar("_Answer")


def remove_objects(buckets: RetryingStore, place: Place, journal: Journal, *, stall_timeout: float) -> None:
    """Delete every object of a task that has failed, or seals from the beginning.

    The manifest that it has replaced is put back. An object to which a call of this process is under way stays
    recorded, and is deleted again later.

    Args:
        buckets: The store, on behalf of the bucket's owner.
        place: Where the task's bundle is.
        journal: The task's.
        stall_timeout: Seconds that a call may take.

    Raises:
        BucketError: The store refuses it.
        TaskFailure: It does not respond for `stall_timeout` seconds.
    """
    removal = _Removal(buckets, place, journal, stall_timeout)
    with removal.claimed(everything=True) as keys, durable("objects removed"):
        if not keys:
            return
        undo = place.manifest_key in keys - removal.busy
        other = removal.within(partial(_undo_manifest, place, journal, keys, undo=undo))
        removal.delete(keys - {place.manifest_key}, other)
        if undo:  # it is deleted, replaced by the earlier one, or somebody else's
            removal.gone.add(place.manifest_key)


def remove_earlier(buckets: RetryingStore, place: Place, journal: Journal, *, stall_timeout: float) -> None:
    """Delete what is left of the bundle that a task has replaced; its manifest is the task's own now.

    Raises:
        BucketError, TaskFailure: As `remove_objects`.
    """
    removal = _Removal(buckets, place, journal, stall_timeout)
    with removal.claimed(everything=False) as keys, durable("earlier bundle removed"):
        if keys:
            removal.delete(keys, removal.within(place.read_manifest))
    if journal.earlier() is not None and not journal.unwanted():
        with durable("removal recorded"):
            journal.replace(None)


class _Removal:
    """One attempt to delete what a task has claimed for deletion."""

    def __init__(
        self,
        buckets: RetryingStore,
        place: Place,
        journal: Journal,
        stall_timeout: float,
        places: Places = PLACES,
    ) -> None:
        self._buckets = buckets
        self._places = places
        self._place = place
        self._journal = journal
        self._stall_timeout = stall_timeout
        self.busy: set[str] = set()
        self.gone: set[str] = set()
        """Keys that the store has confirmed to be gone, or to be another bundle's."""

    @contextmanager
    def claimed(self, *, everything: bool) -> Iterator[set[str]]:
        """Claim what is to be deleted; in the end record what is gone, whatever has failed."""
        self.busy = self._places.taken(self._place.bucket)
        keys = {*self._journal.deleting(self._unanswered(), everything=everything)}
        try:
            yield keys
        except (BucketError, TaskFailure):  # what was abandoned is busy
            self._record()
            raise
        if keys:
            self._record()

    def within(self, call: Callable[[RetryingStore], _Answer]) -> _Answer:
        """Make one call, which may take `stall_timeout` seconds."""
        with _in_time(self._stall_timeout), Calls[_Answer]() as calls:
            calls.begin(partial(call, self._buckets.checking(calls.check_wanted)))
            (answer,) = calls.remaining(within=self._stall_timeout)
        return answer

    def delete(self, keys: set[str], manifest: bytes | None) -> None:
        """Delete objects, but for those of the bundle that this manifest in the bucket names.

        Every other one counts as gone only once the store does not have it.
        """
        in_use = set[str]()
        if manifest is not None:
            in_use = self.within(partial(self._place.keys_in_use, manifest=manifest, keys=keys))
        self.gone |= in_use
        named = sorted(keys - in_use)
        for start in range(0, len(named), _KEYS_AT_ONCE):
            self._delete(named[start : start + _KEYS_AT_ONCE])

    def _delete(self, keys: Sequence[str]) -> None:
        refusal: BucketError | None = None
        try:
            self.within(partial(_delete, bucket=self._place.bucket, keys=keys))
        except AccessDenied as error:  # somebody else may have deleted them
            refusal = error
        exist = self._existing(keys)
        self.gone |= set(keys) - exist
        if exist:
            raise refusal or _kept()

    def _existing(self, keys: Sequence[str]) -> set[str]:
        """Which of these objects are in the bucket: what a store says of a deletion proves nothing."""
        found = set[str]()
        with _in_time(self._stall_timeout), Calls[tuple[str, bool]]() as calls:
            buckets = self._buckets.checking(calls.check_wanted)
            for key in keys:
                if calls.pending >= _HEADS_AT_ONCE:
                    found |= {each for each, exists in calls.results(within=self._stall_timeout) if exists}
                calls.begin(partial(_look_at, buckets, self._place.bucket, key))
            for each, exists in calls.remaining(within=self._stall_timeout):
                found |= {each} if exists else set()
        return found

    def _record(self) -> None:
        busy = self.busy | self._places.taken(self._place.bucket)
        with durable("removal recorded"):
            unanswered = self._unanswered()
            self._journal.forget(self.gone, unanswered=unanswered, busy=busy)
            self._places.are_recorded(self._place.bucket, unanswered)

    def _unanswered(self) -> set[str]:
        return self._places.unanswered_of(self._place.bucket, [item.key for item in self._journal.objects()])


def _undo_manifest(
    place: Place, journal: Journal, keys: Collection[str], buckets: RetryingStore, *, undo: bool
) -> bytes | None:
    """Take back the manifest that a task has written; return the manifest of another bundle that is at its key then.

    Without `undo` the task's own one stays where it is; it is not returned.
    """
    there = place.read_manifest(buckets)
    earlier, documents = journal.earlier(), journal.documents()
    if there is None or (earlier is not None and (earlier.is_replaced or there == earlier.manifest)):
        return there
    own = None if documents is None else documents["manifest"].encode()
    named = place.part_keys(there)
    # What cannot be read is what the store has made of ours; a manifest of other parts is somebody else's.
    if there != own and named and not set(named) & set(keys):
        return there
    if not undo:
        return None
    with PLACES.shared(place.bucket, [place.manifest_key]):
        if earlier is None:
            buckets.delete(place.bucket, [place.manifest_key])
            if _exists(buckets, place.bucket, place.manifest_key):
                raise _kept()
            return None
        buckets.put(place.bucket, place.manifest_key, earlier.manifest)
    return earlier.manifest


@contextmanager
def _in_time(stall_timeout: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        words = f"The store did not respond for {stall_timeout:g} seconds when objects were to be removed."
        raise TaskFailure("Server.NoProgress", words) from None


def _delete(buckets: RetryingStore, bucket: str, keys: Sequence[str]) -> None:
    with PLACES.shared(bucket, keys):
        buckets.delete(bucket, keys)


def _look_at(buckets: ObjectStore, bucket: str, key: str) -> tuple[str, bool]:
    return key, _exists(buckets, bucket, key)


def _exists(buckets: ObjectStore, bucket: str, key: str) -> bool:
    return buckets.head(bucket, key) is not None


def _kept() -> TransientError:
    return TransientError("InternalError", 500, "The store has kept what it said it had deleted")
