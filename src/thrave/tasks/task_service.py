"""Bundle tasks for the API: create, describe, cancel.

    BundleTaskError
    ├── BundlingInProgress          the instance already has a task
    ├── PrefixInUse                 an unfinished task has the same bucket and prefix
    ├── BundleTaskNotFound          no such task, or another account's
    ├── BundleTaskNotCancellable    it has ended, or is being cancelled
    └── TooManyBundleTasks          the account has its maximum of unfinished tasks

Identity and permissions of the caller were checked before (`ec2/`). The task runs elsewhere (`workflow.py`); nothing
here waits for it.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta

import sqlalchemy as sa

from thrave.compute.errors import InstanceNotFound
from thrave.concurrency import monotonic, random_hex
from thrave.database import instance
from thrave.log_events import log_event
from thrave.tasks.created_buckets import CreatedBuckets
from thrave.tasks.errors import (
    BundleTaskNotCancellable,
    BundleTaskNotFound,
    BundlingInProgress,
    PrefixInUse,
    TooManyBundleTasks,
)
from thrave.tasks.failpoints import failpoint
from thrave.tasks.models import FINISHED, BundleRequest, BundleTask
from thrave.tasks.repository import TaskRepository

MAX_CACHED = 4096  # ended tasks in memory, of about 2 KB each

Enqueue = Callable[[sa.Connection, str, str], None]
"""Enqueues a task for a host when the connection's transaction commits: `TaskQueue.enqueue`."""


class BundleTaskService:
    """The bundle tasks of all accounts."""

    def __init__(
        self,
        engine: sa.Engine,
        records: TaskRepository,
        enqueue: Enqueue,
        *,
        default_host: str | None,
        retention: timedelta,
        max_per_account: int,
    ) -> None:
        """Use the tasks of `records`.

        Args:
            engine: The database of `records`.
            records: The tasks.
            enqueue: See `Enqueue`.
            default_host: Host of the instances that no host has reported; None: a task for such an instance is refused.
            retention: How long after their end tasks are shown.
            max_per_account: Maximum number of unfinished tasks of an account.
        """
        self._engine = engine
        self._records = records
        self._enqueue = enqueue
        self._default_host = default_host
        self._retention = retention
        self._max_per_account = max_per_account
        self.created_buckets = CreatedBuckets(engine, records)
        """Buckets that requests create."""
        # Ended tasks, which never change, with the monotonic time until which they are shown.
        self._ended: dict[str, tuple[BundleTask, float]] = {}

    def create(self, request: BundleRequest) -> BundleTask:
        """Record and enqueue a task, in one transaction.

        Raises:
            BundlingInProgress: The instance has an unfinished task, of any account.
            PrefixInUse: Another unfinished task, of any account, has the same bucket and prefix.
            TooManyBundleTasks: The account has its maximum of unfinished tasks.
            InstanceNotFound: No host has the instance.
        """
        bundle_id = f"bun-{random_hex(9)[:17]}"
        try:
            with failpoint("task-recorded"), self._engine.begin() as connection:
                host = self._locked_host(connection, request.instance_id)
                self._records.add(connection, bundle_id, host, request)
                self._check_quota(connection, request.account_id, self._max_per_account)
                self._enqueue(connection, bundle_id, host)
        except sa.exc.IntegrityError as refusal:
            earlier = self._records.in_progress(request.instance_id)
            if earlier is not None:
                raise BundlingInProgress(earlier.bundle_id) from refusal
            self.check_location(request.account_id, request.instance_id, request.bucket, request.prefix)
            return self.create(request)  # the other task ended between the insert and the check
        task = self._records.get(bundle_id)
        assert task is not None
        log_event(
            "task accepted", bundle_id=bundle_id, instance_id=task.instance_id, account_id=task.account_id,
            host=task.host, bucket=task.bucket, prefix=task.prefix,
        )  # fmt: skip
        return task

    def _locked_host(self, connection: sa.Connection, instance_id: str) -> str:
        """Return the host of an instance. Locks the row of a reported one, so that its host is not adopted now."""
        query = sa.select(instance.c.host).where(instance.c.instance_id == instance_id).with_for_update()
        host: str | None = connection.execute(query).scalar()
        if (host := host or self._default_host) is None:
            raise InstanceNotFound(instance_id)
        return host

    def check_location(self, account_id: str, instance_id: str, bucket: str, prefix: str) -> None:
        """Check that no unfinished task, of any account, has a bucket and prefix.

        Raises:
            BundlingInProgress: The instance's own task has them.
            PrefixInUse: Another task has them. The error names the task if it is the account's.
        """
        task = self._records.in_progress_at(bucket, prefix)
        if task is not None and task.instance_id == instance_id:
            raise BundlingInProgress(task.bundle_id)
        if task is not None:
            raise PrefixInUse(bucket, prefix, task.bundle_id if task.account_id == account_id else None)

    def check_quota(self, account_id: str) -> None:
        """Check that the account may have another task.

        Raises:
            TooManyBundleTasks: It has its maximum of unfinished tasks.
        """
        with self._engine.connect() as connection:
            self._check_quota(connection, account_id, self._max_per_account - 1)

    def _check_quota(self, connection: sa.Connection, account_id: str, limit: int) -> None:
        if self._records.count_in_progress(connection, account_id) > limit:
            raise TooManyBundleTasks(self._max_per_account)

    def in_progress(self, instance_id: str) -> BundleTask | None:
        """Return the unfinished task of an instance, or None."""
        return self._records.in_progress(instance_id)

    def describe(self, account_id: str, bundle_ids: Sequence[str] = ()) -> list[BundleTask]:
        """Return the account's tasks, or those with the given ids, oldest first.

        Raises:
            BundleTaskNotFound: One of the ids is not a task of this account.
        """
        if not bundle_ids:
            return self._records.of_account(account_id, kept=self._retention)
        tasks = [self._task(account_id, bundle_id) for bundle_id in dict.fromkeys(bundle_ids)]
        return sorted(tasks, key=lambda task: (task.start_time, task.bundle_id))

    def cancel(self, account_id: str, bundle_id: str) -> BundleTask:
        """Have a task end as `failed` with `Client.Cancelled`; return its current state.

        Raises:
            BundleTaskNotFound: The account has no such task.
            BundleTaskNotCancellable: The task has ended, or is already being cancelled.
        """
        self._task(account_id, bundle_id)
        with failpoint("cancellation-recorded"):
            cancelled = self._records.cancel(bundle_id)
        task = self._task(account_id, bundle_id)
        if not cancelled:
            raise BundleTaskNotCancellable(task.state)
        log_event("task cancelled", bundle_id=bundle_id)
        return task

    def _task(self, account_id: str, bundle_id: str) -> BundleTask:
        """Return a task. Ended tasks are cached, since clients that wait for a task describe it often."""
        cached = self._ended.get(bundle_id)
        if cached is None:
            found = self._records.get_with_age(bundle_id)
            if found is None:
                raise BundleTaskNotFound(bundle_id)
            task, age = found
            cached = task, monotonic() + (self._retention - age).total_seconds()
        task, shown_until = cached
        has_ended = task.state in FINISHED
        if task.account_id != account_id or (has_ended and monotonic() >= shown_until):
            raise BundleTaskNotFound(bundle_id)
        if has_ended:
            self._cache(task, shown_until)
        return task

    def _cache(self, task: BundleTask, shown_until: float) -> None:
        if len(self._ended) >= MAX_CACHED:
            self._ended.clear()
        self._ended[task.bundle_id] = task, shown_until
