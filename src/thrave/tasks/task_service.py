"""What callers may do with bundle tasks: create one, describe them, cancel one.

    BundleTaskError
    ├── BundlingInProgress          the instance has a task already
    ├── PrefixInUse                 a task that is not finished goes to the same bucket and prefix
    ├── BundleTaskNotFound          no such task, or somebody else's
    ├── BundleTaskNotCancellable    it has ended, or is being cancelled
    └── TooManyBundleTasks          the account has as many unfinished tasks as it may

Who the caller is and what they may do has been decided before; the task itself runs elsewhere (`bundling.py`), and
nothing here waits for it.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import sqlalchemy as sa

from thrave.database import instance
from thrave.tasks.errors import (
    BundleTaskNotCancellable,
    BundleTaskNotFound,
    BundlingInProgress,
    PrefixInUse,
    TooManyBundleTasks,
)
from thrave.tasks.failpoints import failpoint
from thrave.tasks.models import FINISHED, BundleRequest, BundleTask
from thrave.tasks.object_removal import CreatedBuckets
from thrave.tasks.repository import TaskRepository

ENDED_KEPT = 4096  # tasks in memory, of some 2 KB each


Enqueue = Callable[[sa.Connection, str, str], None]
"""Has a host run a task when the connection's transaction commits: `TaskQueue.enqueue`."""


class BundleTaskService:
    """The bundle tasks of all accounts, as their callers may see and change them."""

    def __init__(
        self,
        engine: sa.Engine,
        records: TaskRepository,
        enqueue: Enqueue,
        *,
        host_of: Callable[[str], str],
        retention: timedelta,
        per_account: int,
    ) -> None:
        """Let an account have `per_account` unfinished tasks; finished ones are shown for `retention` after their end.

        `host_of` tells which host has an instance that no host has reported.
        """
        self._engine = engine
        self._records = records
        self._enqueue = enqueue
        self._host_of = host_of
        self._retention = retention
        self._per_account = per_account
        self.made_buckets = CreatedBuckets(engine, records)
        """The buckets that requests create."""
        # Ended tasks that their owners have seen, and until when (monotonic) they are shown: they never change again.
        self._ended: dict[str, tuple[BundleTask, float]] = {}

    def create(self, request: BundleRequest) -> BundleTask:
        """Record a task and have it run, both or neither.

        Raises:
            BundlingInProgress: The instance has a task already, whoever asked for it.
            PrefixInUse: Another task, whoever asked for it, goes to the same bucket and prefix.
            TooManyBundleTasks: The account may not have another one.
        """
        bundle_id = f"bun-{secrets.token_hex(9)[:17]}"
        try:
            with failpoint("record"), self._engine.begin() as connection:
                host = self._locked_host(connection, request.instance_id)
                self._records.add(connection, bundle_id, host, request)
                self._check_number(connection, request.account_id, self._per_account)
                self._enqueue(connection, bundle_id, host)
        except sa.exc.IntegrityError as refusal:
            earlier = self._records.in_progress(request.instance_id)
            if earlier is not None:
                raise BundlingInProgress(earlier.bundle_id) from refusal
            self.check_place(request.account_id, request.instance_id, request.bucket, request.prefix)
            return self.create(request)  # the other task ended between the two looks
        task = self._records.get(bundle_id)
        assert task is not None
        return task

    def _locked_host(self, connection: sa.Connection, instance_id: str) -> str:
        """The host that has an instance. If it was reported, an adoption of its host comes before or after us."""
        mine = sa.select(instance.c.host).where(instance.c.instance_id == instance_id).with_for_update()
        host: str | None = connection.execute(mine).scalar()
        return self._host_of(instance_id) if host is None else host

    def check_place(self, account_id: str, instance_id: str, bucket: str, prefix: str) -> None:
        """Look whether a task that is not finished, of any account, goes to a bucket and prefix.

        Raises:
            BundlingInProgress: The instance's own task does.
            PrefixInUse: Another one does. The error names it if it is the account's.
        """
        task = self._records.in_progress_at(bucket, prefix)
        if task is not None and task.instance_id == instance_id:
            raise BundlingInProgress(task.bundle_id)
        if task is not None:
            raise PrefixInUse(bucket, prefix, task.bundle_id if task.account_id == account_id else None)

    def check_number(self, account_id: str) -> None:
        """Look whether the account may have another task, before anything is done for it.

        Raises:
            TooManyBundleTasks: It may not.
        """
        with self._engine.connect() as connection:
            self._check_number(connection, account_id, self._per_account - 1)

    def _check_number(self, connection: sa.Connection, account_id: str, most: int) -> None:
        if self._records.count_in_progress(connection, account_id) > most:
            raise TooManyBundleTasks(self._per_account)

    def in_progress(self, instance_id: str) -> BundleTask | None:
        """The unfinished task of an instance, if it has one."""
        return self._records.in_progress(instance_id)

    def describe(self, account_id: str, bundle_ids: Sequence[str] = ()) -> list[BundleTask]:
        """The account's tasks, or those with the given ids, the oldest first.

        Raises:
            BundleTaskNotFound: One of the ids is not a task of this account.
        """
        if not bundle_ids:
            return self._records.of_account(account_id, kept=self._retention)
        tasks = [self._task(account_id, bundle_id) for bundle_id in dict.fromkeys(bundle_ids)]
        return sorted(tasks, key=lambda task: (task.start_time, task.bundle_id))

    def cancel(self, account_id: str, bundle_id: str) -> BundleTask:
        """Have a task end as `failed` with `Client.Cancelled`; give it as it is now.

        Raises:
            BundleTaskNotFound: It is not a task of this account.
            BundleTaskNotCancellable: It has ended, or is being cancelled already.
        """
        self._task(account_id, bundle_id)
        with failpoint("cancellation"):
            cancelled = self._records.cancel(bundle_id)
        task = self._task(account_id, bundle_id)
        if not cancelled:
            raise BundleTaskNotCancellable(task.state)
        return task

    def _task(self, account_id: str, bundle_id: str) -> BundleTask:
        """The task, looked up by the quickest way there is: it is what every waiter asks, again and again."""
        known = self._ended.get(bundle_id)
        if known is None:
            found = self._records.get_with_age(bundle_id)
            if found is None:
                raise BundleTaskNotFound(bundle_id)
            task, age = found
            known = task, time.monotonic() + (self._retention - age).total_seconds()
        task, shown_until = known
        has_ended = task.state in FINISHED
        if task.account_id != account_id or (has_ended and time.monotonic() >= shown_until):
            raise BundleTaskNotFound(bundle_id)
        if has_ended:
            self._keep(task, shown_until)
        return task

    def _keep(self, task: BundleTask, shown_until: float) -> None:
        if len(self._ended) >= ENDED_KEPT:
            self._ended.clear()
        self._ended[task.bundle_id] = task, shown_until
