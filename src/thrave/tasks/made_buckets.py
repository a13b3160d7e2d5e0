"""Removes the buckets that requests created, if no task has completed in them.

A task records that its request created the bucket. When the task fails, the bucket is removed if it holds nothing and
no other unfinished task goes there. Requests claim a bucket and record their task under a shared lock of the bucket's
name, and removal holds the lock alone, so that no task loses the bucket that its request has found. The lock is one of
the database (PostgreSQL), or of the process where one process is the whole service (SQLite).
"""

import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
import structlog

from thrave.buckets.attempts import Check, no_check
from thrave.buckets.base import ObjectStore
from thrave.buckets.errors import BucketError, TransientError
from thrave.buckets.retrying_store import RetryingStore
from thrave.database import bundle_task, open_engine, task_in_progress
from thrave.tasks.records import Records
from thrave.tasks.task import BundleTask

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


class MadeBuckets:
    """The buckets that requests have created, as the API and the agents of one database see them."""

    def __init__(self, engine: sa.Engine, records: Records, *, before_attempt: Check = no_check) -> None:
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
        self._records.settle_bucket(task.bundle_id)

    def look(self, buckets: ObjectStore, host: str) -> None:
        """Remove the buckets of the failed tasks of a host that could not be removed at once."""
        for task in self._records.with_made_buckets(host):
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
            until = time.monotonic() + LOCK_TIMEOUT
            while not connection.execute(attempt).scalar():
                if time.monotonic() > until:
                    raise BucketBusyError
                time.sleep(0.05)
            yield  # closing the connection releases the lock
