"""Retries of calls to an object store that end with a TransientError: busy, cut off, no response, damaged bytes.

The wait between two attempts doubles, with jitter, and is not shorter than the store's `Retry-After`. All other errors
(403, expired policy, no such bucket) are raised at once. Every call of a store may be repeated (see ObjectStore).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import structlog

from thrave.buckets.base import ObjectHead, ObjectStore
from thrave.buckets.errors import BucketError, NoConnectionError, TransientError, UnreachableError
from thrave.buckets.upload_policy import UploadPolicy
from thrave.concurrency import monotonic, sleep
from thrave.retry import FailedAttempt, backoff, retry
from thrave.write_guard import WriteCheck, no_check, store_guard

FIRST_WAIT = 0.25  # seconds
LONGEST_WAIT = 15.0  # seconds

_GATEWAY = frozenset({502, 504})
"""Statuses of a server in between: the request may have reached the store, or may reach it later."""

log = structlog.get_logger()
_Result = TypeVar("_Result")
OnRetry = Callable[[TransientError, float], None]
"""Called before a retry, with the error and the seconds until the next attempt."""


def retry_store(
    call: Callable[[], _Result],
    timeout: float,
    on_retry: OnRetry,
    *,
    unreachable_attempts: int | None = None,
    before_attempt: WriteCheck = no_check,
) -> _Result:
    """Repeat a call while it ends with a TransientError.

    Args:
        call: Must be safe to repeat.
        timeout: Seconds from the first failure after which the last error is raised; 0: the call is made once.
        on_retry: Reports the failure.
        unreachable_attempts: Attempts after which an UnreachableError is raised; None: it is like any other.
        before_attempt: Check made before each attempt, and within it (`write_guard.store_guard`). What it raises ends
            the call, so that a process that has lost the right to write sends nothing.

    Raises:
        TransientError: The last one.
    """
    attempts, waited = 0, 0.0

    def attempt() -> _Result:
        nonlocal attempts, waited
        while True:
            started = monotonic()
            attempts += 1
            try:
                with store_guard.using(before_attempt):
                    return call()
            except NoConnectionError as error:
                # A wait for a free connection proves nothing about the store: other requests of this process are slow.
                # It is not counted if a check, such as a task's monitor, can end the call.
                if not timeout or before_attempt is no_check:
                    raise
                waited += monotonic() - started
                on_retry(error, 0.0)

    def is_retryable(error: Exception) -> bool:
        if isinstance(error, UnreachableError) and attempts == unreachable_attempts:
            return False
        return isinstance(error, TransientError)

    def on_failure(failed: FailedAttempt) -> None:
        if failed.wait is not None and isinstance(failed.error, TransientError):
            on_retry(failed.error, failed.wait)

    return retry(
        attempt,
        on=is_retryable,
        timeout=timeout,
        interval=backoff(FIRST_WAIT, LONGEST_WAIT),
        is_timeout_strict=True,
        # A store that asks for more than the remaining time gets all of it, and one last attempt.
        min_wait=lambda error: error.retry_after if isinstance(error, TransientError) else 0.0,
        on_failure=on_failure,
        sleep=sleep,
        clock=lambda: monotonic() - waited,
    )


def may_arrive(error: BucketError) -> bool:
    """Whether the request that ended with this error may be executed later: it was sent, and no response came."""
    if isinstance(error, UnreachableError) or not isinstance(error, TransientError):
        return False
    return error.status == 0 or error.status in _GATEWAY


class RetryingStore:
    """Another object store whose calls are retried."""

    def __init__(
        self,
        buckets: ObjectStore,
        retry_timeout: float,
        on_retry: OnRetry | None = None,
        *,
        before_attempt: WriteCheck = no_check,
        unanswered: set[tuple[str, str]] | None = None,
    ) -> None:
        """Retry the calls of `buckets`.

        Args:
            buckets: The store.
            retry_timeout: Seconds from a call's first failure; see `retry_store`.
            on_retry: See `retry_store`; by default the failure is logged.
            before_attempt: See `retry_store`; made before each attempt of each call.
            unanswered: The set for the attribute `unanswered`, if several stores share one.
        """
        self._buckets = buckets
        self._retry_timeout = retry_timeout
        self._on_retry = on_retry or _log_retry
        self._before_attempt = before_attempt
        self.unanswered = set[tuple[str, str]]() if unanswered is None else unanswered
        """Bucket and key of each object whose write or deletion was sent and got no response. The request may still be
        executed, even after a later attempt has succeeded."""

    def on_behalf_of(self, access_key_id: str) -> "RetryingStore":
        """See ObjectStore."""
        return self._copy(self._buckets.on_behalf_of(access_key_id), self._before_attempt)

    def checking(self, check: WriteCheck) -> "RetryingStore":
        """Return this store with another check before each attempt, made before the existing one."""

        def both() -> None:
            check()
            self._before_attempt()

        return self._copy(self._buckets, both)

    def owner(self, bucket: str) -> str | None:
        """See ObjectStore."""
        return self._retry(lambda: self._buckets.owner(bucket))

    def create(self, bucket: str, owner: str, *, probe: str | None = None) -> bool:
        """See ObjectStore."""
        is_created = False

        def create() -> None:
            nonlocal is_created
            is_created = self._buckets.create(bucket, owner, probe=probe) or is_created

        self._retry(create)
        return is_created

    def remove(self, bucket: str, owner: str) -> bool:
        """See ObjectStore."""
        return self._retry(lambda: self._buckets.remove(bucket, owner))

    def put(self, bucket: str, key: str, data: bytes | memoryview, *, policy: UploadPolicy | None = None) -> str | None:
        """See ObjectStore."""
        return self._write(bucket, [key], lambda: self._buckets.put(bucket, key, data, policy=policy))

    def head(self, bucket: str, key: str) -> ObjectHead | None:
        """See ObjectStore."""
        return self._retry(lambda: self._buckets.head(bucket, key))

    def get(self, bucket: str, key: str) -> bytes:
        """See ObjectStore."""
        return self._retry(lambda: self._buckets.get(bucket, key))

    def get_range(self, bucket: str, key: str, start: int, length: int) -> bytes:
        """See ObjectStore."""
        return self._retry(lambda: self._buckets.get_range(bucket, key, start, length))

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """See ObjectStore. After an error the listing starts again, without the keys that were returned already."""
        returned: set[str] = set()
        keys = self._buckets.list(bucket, prefix)

        def read_next() -> str | None:
            nonlocal keys
            try:
                return next((key for key in keys if key not in returned), None)
            except TransientError:
                keys = self._buckets.list(bucket, prefix)
                raise

        while (key := self._retry(read_next)) is not None:
            returned.add(key)
            yield key

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """See ObjectStore."""
        key_list = [*keys]
        self._write(bucket, key_list, lambda: self._buckets.delete(bucket, key_list))

    def _write(self, bucket: str, keys: Iterable[str], call: Callable[[], _Result]) -> _Result:
        def write() -> _Result:
            try:
                return call()
            except TransientError as error:
                if may_arrive(error):
                    self.unanswered.update((bucket, key) for key in keys)
                raise

        return self._retry(write)

    def _retry(self, call: Callable[[], _Result]) -> _Result:
        return retry_store(call, self._retry_timeout, self._on_retry, before_attempt=self._before_attempt)

    def _copy(self, buckets: ObjectStore, before_attempt: WriteCheck) -> "RetryingStore":
        return RetryingStore(
            buckets,
            self._retry_timeout,
            self._on_retry,
            before_attempt=before_attempt,
            unanswered=self.unanswered,
        )


def _log_retry(error: TransientError, seconds: float) -> None:
    log.warning("store call failed, retrying", error=str(error), wait=round(seconds, 1))
