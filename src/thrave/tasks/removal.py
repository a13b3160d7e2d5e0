"""Removes the objects of failed tasks, and of bundles that were replaced.

A failed task leaves what was there before it: what it wrote is deleted, and the manifest that it replaced is put back.
Nothing that the manifest in the bucket names is ever deleted. What could not be deleted stays recorded, and the agent
tries again (`leftovers.py`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from thrave.buckets.buckets import Buckets
from thrave.buckets.errors import AccessDenied, BucketError, TransientError
from thrave.tasks.calls import Calls, Places
from thrave.tasks.crash_points import durable
from thrave.tasks.failures import TaskFailure
from thrave.tasks.journal import Journal
from thrave.tasks.places import Place

PLACES = Places()
"""Objects that this process is uploading, abandoned uploads included."""

_KEYS_AT_ONCE = 1000  # of one request to delete: S3's limit
_HEADS_AT_ONCE = 16

_Answer = TypeVar("_Answer")


def remove_objects(buckets: Buckets, place: Place, journal: Journal, *, stall_timeout: float) -> None:
    """Delete every object that a task has sent or begun to send, and put back the manifest that it replaced.

    An object to which an abandoned upload is still under way stays recorded, and is removed later.

    Args:
        buckets: The store, on behalf of the bucket's owner.
        place: Where the task's bundle is.
        journal: The task's.
        stall_timeout: Seconds that a call may take.

    Raises:
        BucketError: The store refuses it.
        TaskFailure: It does not respond for `stall_timeout` seconds.
    """
    busy = PLACES.taken(place.bucket)
    keys = {item.key for item in journal.objects()}
    with durable("objects removed"):
        if keys:
            undo = place.manifest_key in keys - busy
            there = _within(stall_timeout, partial(_undo_manifest, buckets, place, journal, keys, undo=undo))
            in_use = _within(stall_timeout, partial(place.keys_in_use, buckets, there, keys)) if there else set()
            _delete(buckets, place.bucket, keys - in_use - {place.manifest_key}, stall_timeout)
    with durable("removal recorded"):
        journal.forget(keys - busy - PLACES.taken(place.bucket))


def remove_earlier(buckets: Buckets, place: Place, journal: Journal, *, stall_timeout: float) -> None:
    """Delete what is left of the bundle that a task has replaced; its manifest is the task's own now.

    Raises:
        BucketError, TaskFailure: As `remove_objects`.
    """
    earlier = journal.earlier()
    if earlier is None:
        return
    with durable("earlier bundle removed"):
        there = _within(stall_timeout, partial(place.read_manifest, buckets))
        keys = set(earlier.keys)
        in_use = _within(stall_timeout, partial(place.keys_in_use, buckets, there, keys)) if there else set()
        _delete(buckets, place.bucket, keys - in_use, stall_timeout)
    with durable("removal recorded"):
        journal.replace(None)


def _undo_manifest(
    buckets: Buckets, place: Place, journal: Journal, keys: Collection[str], *, undo: bool
) -> bytes | None:
    """Take back the manifest that a task has written; return what is at its key then."""
    there = place.read_manifest(buckets)
    earlier, documents = journal.earlier(), journal.documents()
    if not undo or there is None or (earlier is not None and earlier.is_replaced):
        return there
    own = None if documents is None else documents["manifest"].encode()
    named = place.part_keys(there)
    # What cannot be read is what the store has made of ours; a manifest of other parts is somebody else's.
    if there != own and named and not set(named) & set(keys):
        return there
    if earlier is None:
        _delete_now(buckets, place.bucket, place.manifest_key)
        return None
    if there != earlier.manifest:
        buckets.put(place.bucket, place.manifest_key, earlier.manifest)
    return earlier.manifest


def _within(stall_timeout: float, call: Callable[[], _Answer]) -> _Answer:
    """Make one call, which may take `stall_timeout` seconds."""
    with _in_time(stall_timeout), Calls[_Answer]() as calls:
        calls.begin(call)
        (answer,) = calls.remaining(within=stall_timeout)
    return answer


@contextmanager
def _in_time(stall_timeout: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        words = f"The store did not respond for {stall_timeout:g} seconds when objects were to be removed."
        raise TaskFailure("Server.NoProgress", words) from None


def _delete(buckets: Buckets, bucket: str, keys: Iterable[str], stall_timeout: float) -> None:
    named = sorted(keys)
    for start in range(0, len(named), _KEYS_AT_ONCE):
        batch = named[start : start + _KEYS_AT_ONCE]
        refusal: BucketError | None = None
        try:
            _within(stall_timeout, partial(buckets.delete, bucket, batch))
        except AccessDenied as error:  # somebody else may have deleted them
            refusal = error
        if _exist(buckets, bucket, batch, stall_timeout):
            raise refusal or _kept()


def _exist(buckets: Buckets, bucket: str, keys: Sequence[str], stall_timeout: float) -> bool:
    """Whether one of these objects is in the bucket: what a store says of a deletion proves nothing."""
    found = False
    with _in_time(stall_timeout), Calls[bool]() as calls:
        for key in keys:
            if calls.pending >= _HEADS_AT_ONCE:
                found |= any(calls.results(within=stall_timeout))
            calls.begin(partial(_exists, buckets, bucket, key))
        for exists in calls.remaining(within=stall_timeout):
            found |= exists
    return found


def _exists(buckets: Buckets, bucket: str, key: str) -> bool:
    return buckets.head(bucket, key) is not None


def _delete_now(buckets: Buckets, bucket: str, key: str) -> None:
    buckets.delete(bucket, [key])
    if _exists(buckets, bucket, key):
        raise _kept()


def _kept() -> TransientError:
    return TransientError("InternalError", 500, "The store has kept what it said it had deleted")
