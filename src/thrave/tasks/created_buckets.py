"""Buckets that requests created for their tasks: removed if the task fails, the bucket is empty and nothing uses it."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
import structlog

from thrave.buckets.base import ObjectStore
from thrave.buckets.errors import BucketError, TransientError
from thrave.buckets.retrying_store import RetryingStore
from thrave.concurrency import new_condition
from thrave.database import bundle_task, open_engine, task_in_progress
from thrave.retry import poll_until
from thrave.tasks.models import BundleTask
from thrave.tasks.repository import TaskRepository
from thrave.write_guard import WriteCheck, no_check

LOCK_TIMEOUT = 10.0  # seconds
_LOCK_INTERVAL = 0.05  # seconds between two attempts to get an advisory lock
_LOCK_CLASS = 0x7468  # first of the two keys of PostgreSQL's advisory locks; the second one is a hash of the name

log = structlog.get_logger()


class BucketBusyError(Exception):
    """The lock of a bucket's name was not available in time: the bucket is being removed, or requests keep using it."""


class _SharedLock:
    """A lock with shared and exclusive holders."""

    def __init__(self) -> None:
        self._changed = new_condition()
        self._shared = 0
        self._is_exclusive = False

    @contextmanager
    def held(self, *, exclusive: bool, timeout: float) -> Iterator[None]:
        """Hold the lock. Raises BucketBusyError if it is not available within `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._is_exclusive and not (exclusive and self._shared), timeout):
                raise BucketBusyError
            self._is_exclusive, self._shared = exclusive, self._shared + (not exclusive)
        try:
            yield
        finally:
            with self._changed:
                self._is_exclusive, self._shared = False, self._shared - (not exclusive)
                self._changed.notify_all()


_LOCKS = tuple(_SharedLock() for _ in range(64))  # several names share one


class CreatedBuckets:
    """Buckets that requests have created for their tasks.

    When such a task fails, its bucket is removed if it is empty and no other unfinished task uses it. A request uses a
    bucket and records its task under a shared lock of the bucket's name. Removal holds the lock exclusively, so that no
    task loses the bucket that its request has found. PostgreSQL has the lock; with SQLite one process is the whole
    service, and has it in memory.
    """

    def __init__(self, engine: sa.Engine, records: TaskRepository, *, before_attempt: WriteCheck = no_check) -> None:
        """Open no connection yet. `before_attempt` is checked before a bucket is removed (see `RetryingStore`)."""
        self._records = records
        self._before_attempt = before_attempt
        # Each lock has its own connection: a waiting one must not use up the pool that the lock's holder needs.
        self._lock_engine = None
        if engine.dialect.name == "postgresql":
            self._lock_engine = open_engine(engine.url.render_as_string(hide_password=False), pooled=False)

    @contextmanager
    def in_use(self, bucket: str) -> Iterator[None]:
        """Prevent the removal of a bucket within the block, in which a task for it is recorded.

        Raises:
            BucketBusyError: The bucket is being removed.
        """
        with self._lock(bucket, exclusive=False):
            yield

    def remove(self, buckets: ObjectStore, bucket: str, owner: str, *, except_task: str | None = None) -> bool:
        """Remove a bucket that a request has created, if it is empty and no unfinished task uses it.

        Args:
            buckets: The store, on behalf of the bucket's owner.
            bucket: Its name.
            owner: The account that it belongs to.
            except_task: The id of a task that does not count.

        Returns:
            Whether nothing remains to do: the bucket was removed, has objects that nobody is to delete, or may not be
            removed.
        """
        try:
            with self._lock(bucket, exclusive=True):
                others = [task for task in self._unfinished(bucket) if task.bundle_id != except_task]
                if others:
                    return False
                if not RetryingStore(buckets, 0.0, before_attempt=self._before_attempt).remove(bucket, owner):
                    return not self._records.has_cleanups(bucket)  # it may be empty after them
                log.info("removed the bucket of a failed task", bucket=bucket)
        except (BucketBusyError, TransientError) as error:
            log.warning("bucket removal failed, retrying", bucket=bucket, error=str(error))
            return False
        except BucketError as error:
            log.warning("store refuses to remove a bucket", bucket=bucket, error=str(error))
        return True

    def remove_of(self, buckets: ObjectStore, task: BundleTask) -> None:
        """Remove the bucket that a task's request has created, and record it when nothing remains to do."""
        if not task.created_bucket:
            return
        try:
            owners = buckets.on_behalf_of(task.access_key_id)
        except BucketError as error:
            log.warning("bucket not removed: no key of its owner", bucket=task.bucket, error=str(error))
        else:
            if not self.remove(owners, task.bucket, task.owner_id, except_task=task.bundle_id):
                return
        self._records.clear_created_bucket(task.bundle_id)

    def remove_all(self, buckets: ObjectStore, host: str) -> None:
        """Try again to remove the buckets of a host's failed tasks."""
        for task in self._records.with_created_buckets(host):
            self.remove_of(buckets, task)

    def _unfinished(self, bucket: str) -> list[BundleTask]:
        return self._records.find(bundle_task.c.bucket == bucket, task_in_progress)

    @contextmanager
    def _lock(self, bucket: str, *, exclusive: bool) -> Iterator[None]:
        number = zlib.crc32(bucket.encode())
        if self._lock_engine is None:
            with _LOCKS[number % len(_LOCKS)].held(exclusive=exclusive, timeout=LOCK_TIMEOUT):
                yield
            return
        lock = sa.func.pg_try_advisory_lock if exclusive else sa.func.pg_try_advisory_lock_shared
        attempt = sa.select(lock(_LOCK_CLASS, number - (1 << 31)))
        with self._lock_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            if not poll_until(
                lambda: connection.execute(attempt).scalar(), timeout=LOCK_TIMEOUT, interval=_LOCK_INTERVAL
            ):
                raise BucketBusyError
            yield  # closing the connection releases the lock
