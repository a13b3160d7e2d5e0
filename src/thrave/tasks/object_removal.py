"""Removes the buckets that requests created, if no task has completed in them.

A task records that its request created the bucket. When the task fails, the bucket is removed if it holds nothing and
no other unfinished task goes there. Requests claim a bucket and record their task under a shared lock of the bucket's
name, and removal holds the lock alone, so that no task loses the bucket that its request has found. The lock is one of
the database (PostgreSQL), or of the process where one process is the whole service (SQLite).

Removes the objects of failed tasks, and of bundles that were replaced.

A failed task leaves what was there before it: what it wrote is deleted, and the manifest that it replaced is put back.
Only what was claimed before is deleted (`claims.py`), and nothing that another bundle's manifest in the bucket names.
What could not be deleted stays recorded, and the agent tries again (`leftovers.py`). A failed task's own manifest keeps
nothing: it may be in the bucket because its deletion hangs, or because an upload of it arrived late.
"""

import threading
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import sqlalchemy as sa
import structlog

from thrave.buckets.base import ObjectStore
from thrave.buckets.errors import AccessDenied, BucketError, TransientError
from thrave.buckets.retrying_store import RetryingStore
from thrave.database import bundle_task, open_engine, task_in_progress
from thrave.retry import poll_until
from thrave.tasks.bundle_location import BundleLocation
from thrave.tasks.errors import TaskFailure
from thrave.tasks.failpoints import failpoint
from thrave.tasks.journal import UploadJournal
from thrave.tasks.models import BundleTask
from thrave.tasks.repository import TaskRepository
from thrave.tasks.store_calls import IN_FLIGHT, CallGroup, InFlightObjects
from thrave.write_guard import WriteCheck, no_check

LOCK_TIMEOUT = 10.0  # seconds


_LOCK_CLASS = 0x7468  # of PostgreSQL's advisory locks with two keys, of which the second is the name's


log = structlog.get_logger()


class BucketBusyError(Exception):
    """The lock of a bucket's name was not free in time: the bucket is being removed, or claimed without end."""


class _SharedLock:
    """A lock that many can share, or one can hold alone."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._sharing = 0
        self._alone = False

    @contextmanager
    def held(self, *, alone: bool, timeout: float) -> Iterator[None]:
        """Hold the lock. Raises BucketBusyError if it is not free within `timeout` seconds."""
        with self._free:
            if not self._free.wait_for(lambda: not self._alone and not (alone and self._sharing), timeout):
                raise BucketBusyError
            self._alone, self._sharing = alone, self._sharing + (not alone)
        try:
            yield
        finally:
            with self._free:
                self._alone, self._sharing = False, self._sharing - (not alone)
                self._free.notify_all()


_LOCKS = tuple(_SharedLock() for _ in range(64))  # of this process; names share them


class CreatedBuckets:
    """The buckets that requests have created, as the API and the agents of one database see them."""

    def __init__(self, engine: sa.Engine, records: TaskRepository, *, before_attempt: WriteCheck = no_check) -> None:
        """Open nothing yet; `before_attempt` is made before a bucket is removed (see `RetryingStore`)."""
        self._records = records
        self._before_attempt = before_attempt
        # A connection of its own for each lock: one that waits must not take the pool's from those it waits for.
        self._server = None
        if engine.dialect.name == "postgresql":
            self._server = open_engine(engine.url.render_as_string(hide_password=False), pooled=False)

    @contextmanager
    def claiming(self, bucket: str) -> Iterator[None]:
        """Keep a bucket from being removed, until the task that goes there has been recorded.

        Raises:
            BucketBusyError: It is just being removed.
        """
        with self._lock(bucket, alone=False):
            yield

    def discard(self, buckets: ObjectStore, bucket: str, owner: str, *, but: str | None = None) -> bool:
        """Remove a bucket that a request has created, if it is empty and no unfinished task goes there.

        Args:
            buckets: The store, on behalf of the bucket's owner.
            bucket: Its name.
            owner: The account that it belongs to.
            but: The id of a task that does not count.

        Returns:
            Whether nothing is to be done about it any more: it is gone, holds something, or may not be removed.
        """
        try:
            with self._lock(bucket, alone=True):
                others = [task for task in self._unfinished(bucket) if task.bundle_id != but]
                if others:
                    return False
                if RetryingStore(buckets, 0.0, before_attempt=self._before_attempt).remove(bucket, owner):
                    log.info("removed the bucket that was created for a task", bucket=bucket)
        except (BucketBusyError, TransientError) as error:
            log.warning("a bucket cannot be removed yet", bucket=bucket, error=str(error))
            return False
        except BucketError as error:
            log.warning("the store does not let a bucket be removed", bucket=bucket, error=str(error))
        return True

    def discard_of(self, buckets: ObjectStore, task: BundleTask) -> None:
        """Remove the bucket that a task's request has created, and record when nothing is to be done any more."""
        if not task.made_bucket:
            return
        try:
            owners = buckets.on_behalf_of(task.access_key_id)
        except BucketError as error:
            log.warning("a bucket stays: its owner's key is gone", bucket=task.bucket, error=str(error))
        else:
            if not self.discard(owners, task.bucket, task.owner_id, but=task.bundle_id):
                return
        self._records.clear_created_bucket(task.bundle_id)

    def look(self, buckets: ObjectStore, host: str) -> None:
        """Remove the buckets of the failed tasks of a host that could not be removed at once."""
        for task in self._records.with_created_buckets(host):
            self.discard_of(buckets, task)

    def _unfinished(self, bucket: str) -> list[BundleTask]:
        return self._records.find(bundle_task.c.bucket == bucket, task_in_progress)

    @contextmanager
    def _lock(self, bucket: str, *, alone: bool) -> Iterator[None]:
        number = zlib.crc32(bucket.encode())
        if self._server is None:
            with _LOCKS[number % len(_LOCKS)].held(alone=alone, timeout=LOCK_TIMEOUT):
                yield
            return
        lock = sa.func.pg_try_advisory_lock if alone else sa.func.pg_try_advisory_lock_shared
        attempt = sa.select(lock(_LOCK_CLASS, number - (1 << 31)))
        with self._server.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            if not poll_until(lambda: connection.execute(attempt).scalar(), timeout=LOCK_TIMEOUT, interval=0.05):
                raise BucketBusyError
            yield  # closing the connection releases the lock


_KEYS_AT_ONCE = 1000  # of one request to delete: S3's limit


_HEADS_AT_ONCE = 16


_Answer = TypeVar("_Answer")


def remove_objects(
    buckets: RetryingStore, place: BundleLocation, journal: UploadJournal, *, stall_timeout: float
) -> None:
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
    with removal.claimed(everything=True) as keys, failpoint("objects removed"):
        if not keys:
            return
        undo = place.manifest_key in keys - removal.busy
        other = removal.within(partial(_undo_manifest, place, journal, keys, undo=undo))
        removal.delete(keys - {place.manifest_key}, other)
        if undo:  # it is deleted, replaced by the earlier one, or somebody else's
            removal.gone.add(place.manifest_key)


def remove_earlier(
    buckets: RetryingStore, place: BundleLocation, journal: UploadJournal, *, stall_timeout: float
) -> None:
    """Delete what is left of the bundle that a task has replaced; its manifest is the task's own now.

    Raises:
        BucketError, TaskFailure: As `remove_objects`.
    """
    removal = _Removal(buckets, place, journal, stall_timeout)
    with removal.claimed(everything=False) as keys, failpoint("earlier bundle removed"):
        if keys:
            removal.delete(keys, removal.within(place.read_manifest))
    if journal.earlier() is not None and not journal.orphaned_objects():
        with failpoint("removal recorded"):
            journal.record_earlier(None)


class _Removal:
    """One attempt to delete what a task has claimed for deletion."""

    def __init__(
        self,
        buckets: RetryingStore,
        place: BundleLocation,
        journal: UploadJournal,
        stall_timeout: float,
        places: InFlightObjects = IN_FLIGHT,
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
        self.busy = self._places.in_flight_keys(self._place.bucket)
        keys = {*self._journal.start_deletion(self._unanswered(), everything=everything)}
        try:
            yield keys
        except (BucketError, TaskFailure):  # what was abandoned is busy
            self._record()
            raise
        if keys:
            self._record()

    def within(self, call: Callable[[RetryingStore], _Answer]) -> _Answer:
        """Make one call, which may take `stall_timeout` seconds."""
        with _in_time(self._stall_timeout), CallGroup[_Answer]() as calls:
            calls.start(partial(call, self._buckets.checking(calls.check_wanted)))
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
        with _in_time(self._stall_timeout), CallGroup[tuple[str, bool]]() as calls:
            buckets = self._buckets.checking(calls.check_wanted)
            for key in keys:
                if calls.pending >= _HEADS_AT_ONCE:
                    found |= {each for each, exists in calls.results(within=self._stall_timeout) if exists}
                calls.start(partial(_look_at, buckets, self._place.bucket, key))
            for each, exists in calls.remaining(within=self._stall_timeout):
                found |= {each} if exists else set()
        return found

    def _record(self) -> None:
        busy = self.busy | self._places.in_flight_keys(self._place.bucket)
        with failpoint("removal recorded"):
            unanswered = self._unanswered()
            self._journal.end_deletion(self.gone, unanswered=unanswered, busy=busy)
            self._places.clear_unanswered(self._place.bucket, unanswered)

    def _unanswered(self) -> set[str]:
        return self._places.unanswered_of(self._place.bucket, [item.key for item in self._journal.objects()])


def _undo_manifest(
    place: BundleLocation, journal: UploadJournal, keys: Collection[str], buckets: RetryingStore, *, undo: bool
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
    with IN_FLIGHT.shared(place.bucket, [place.manifest_key]):
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
    with IN_FLIGHT.shared(bucket, keys):
        buckets.delete(bucket, keys)


def _look_at(buckets: ObjectStore, bucket: str, key: str) -> tuple[str, bool]:
    return key, _exists(buckets, bucket, key)


def _exists(buckets: ObjectStore, bucket: str, key: str) -> bool:
    return buckets.head(bucket, key) is not None


def _kept() -> TransientError:
    return TransientError("InternalError", 500, "The store has kept what it said it had deleted")
