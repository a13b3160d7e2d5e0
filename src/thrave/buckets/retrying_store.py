"""Retries calls of an object store while they fail in a way that may pass.

A call that ends in a TransientError (busy, cut off, no response, damaged bytes) is made again after a pause that
doubles, up to `LONGEST_PAUSE`, with jitter, so that many that met the same fault do not come back at once. A store that
sends `Retry-After` is not called earlier. When the time is up, the last error is raised. All other errors (403, an
expired policy, no such bucket) are final at once. Every call of a store may be repeated (see Buckets).

A wait for a free connection says nothing about the store: other requests of this process are slow. It uses up no time
where a check can end the call, as the watch of a task does.

Before each attempt a check is made, which may end the call: whoever has lost the right to write, or is not waited for
any more, sends nothing.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import structlog

from thrave.buckets.attempts import Check, attempt, no_check
from thrave.buckets.base import ObjectHead, ObjectStore
from thrave.buckets.errors import BucketError, NoConnectionError, TransientError, UnreachableError
from thrave.buckets.upload_policy import UploadPolicy

FIRST_PAUSE = 0.25  # seconds
LONGEST_PAUSE = 15.0  # seconds

_GATEWAY = frozenset({502, 504})
"""Statuses of a server in between: the request may have reached the store, or may reach it later."""

log = structlog.get_logger()
_Answer = TypeVar("_Answer")


def retry_store(
    call: Callable[[], _Answer],
    patience: float,
    tell: Callable[[TransientError, float], None],
    *,
    unreachable: int | None = None,
    before_attempt: Check = no_check,
) -> _Answer:
    """Make a call again while it ends in a TransientError.

    Args:
        call: Must be safe to repeat.
        patience: Seconds from its first failure on, after which the last error is raised. With a `before_attempt` no
            wait for a free connection is counted; with 0 the call is made once.
        tell: Called with a failure and the seconds until the next attempt.
        unreachable: Attempts after which an UnreachableError is raised; None: as any other.
        before_attempt: Made before each attempt, and within it (`attempts.py`); what it raises ends the call.

    Raises:
        TransientError: The last one.
    """
    until, pause, attempts = 0.0, FIRST_PAUSE, 0
    while True:
        began = time.monotonic()
        try:
            with attempt(before_attempt):
                return call()
        except TransientError as error:
            now, attempts = time.monotonic(), attempts + 1
            if isinstance(error, NoConnectionError) and patience and before_attempt is not no_check:
                until += (now - began) if until else 0.0
                tell(error, 0.0)
                continue
            until = until or now + patience
            wait = pause * random.uniform(0.5, 1)  # noqa: S311 (no secret hangs on it)
            if now + wait > until or (isinstance(error, UnreachableError) and attempts == unreachable):
                raise
            # A store that asks for more time than there is gets all that is left, and one last attempt.
            wait = max(wait, min(error.retry_after, until - now))
            tell(error, wait)
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)


def may_arrive(error: BucketError) -> bool:
    """Whether the request that ended in this error may be carried out later: it was sent, and not answered."""
    if isinstance(error, UnreachableError) or not isinstance(error, TransientError):
        return False
    return error.status == 0 or error.status in _GATEWAY


class RetryingStore:
    """The Buckets of another driver, whose calls are retried."""

    def __init__(
        self,
        buckets: ObjectStore,
        patience: float,
        told: Callable[[TransientError, float], None] | None = None,
        *,
        before_attempt: Check = no_check,
        unanswered: set[tuple[str, str]] | None = None,
    ) -> None:
        """Retry the calls of `buckets` for `patience` seconds after a call's first failure.

        Args:
            buckets: The store.
            patience: Seconds.
            told: As `patiently` has it.
            before_attempt: As `patiently` has it, of each attempt of each call.
            unanswered: Where the attribute of that name is kept, if several share it.
        """
        self._buckets = buckets
        self._patience = patience
        self._told = told or _log
        self._before_attempt = before_attempt
        self.unanswered = set[tuple[str, str]]() if unanswered is None else unanswered
        """Bucket and key of each object that a request was sent to write or delete, which was not answered. It may yet
        arrive, even if a later attempt has succeeded."""

    def on_behalf_of(self, access_key_id: str) -> "RetryingStore":
        """See Buckets."""
        return self._like(self._buckets.on_behalf_of(access_key_id), self._before_attempt)

    def checking(self, check: Check) -> "RetryingStore":
        """Return the same store; before each attempt `check` is made as well."""

        def both() -> None:
            check()
            self._before_attempt()

        return self._like(self._buckets, both)

    def owner(self, bucket: str) -> str | None:
        """See Buckets."""
        return self._patiently(lambda: self._buckets.owner(bucket))

    def create(self, bucket: str, owner: str, *, probe: str | None = None) -> bool:
        """See Buckets."""
        made = False

        def create() -> None:
            nonlocal made
            made = self._buckets.create(bucket, owner, probe=probe) or made

        self._patiently(create)
        return made

    def remove(self, bucket: str, owner: str) -> bool:
        """See Buckets."""
        return self._patiently(lambda: self._buckets.remove(bucket, owner))

    def put(self, bucket: str, key: str, data: bytes | memoryview, *, grant: UploadPolicy | None = None) -> str | None:
        """See Buckets."""
        return self._write(bucket, [key], lambda: self._buckets.put(bucket, key, data, grant=grant))

    def head(self, bucket: str, key: str) -> ObjectHead | None:
        """See Buckets."""
        return self._patiently(lambda: self._buckets.head(bucket, key))

    def get(self, bucket: str, key: str) -> bytes:
        """See Buckets."""
        return self._patiently(lambda: self._buckets.get(bucket, key))

    def get_range(self, bucket: str, key: str, start: int, length: int) -> bytes:
        """See Buckets."""
        return self._patiently(lambda: self._buckets.get_range(bucket, key, start, length))

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """See Buckets. One that failed is begun again, without what it has given."""
        given: set[str] = set()
        keys = self._buckets.list(bucket, prefix)

        def following() -> str | None:
            nonlocal keys
            try:
                return next((key for key in keys if key not in given), None)
            except TransientError:
                keys = self._buckets.list(bucket, prefix)
                raise

        while (key := self._patiently(following)) is not None:
            given.add(key)
            yield key

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """See Buckets."""
        named = [*keys]
        self._write(bucket, named, lambda: self._buckets.delete(bucket, named))

    def _write(self, bucket: str, keys: Iterable[str], call: Callable[[], _Answer]) -> _Answer:
        def write() -> _Answer:
            try:
                return call()
            except TransientError as error:
                if may_arrive(error):
                    self.unanswered.update((bucket, key) for key in keys)
                raise

        return self._patiently(write)

    def _patiently(self, call: Callable[[], _Answer]) -> _Answer:
        return retry_store(call, self._patience, self._told, before_attempt=self._before_attempt)

    def _like(self, buckets: ObjectStore, before_attempt: Check) -> "RetryingStore":
        return RetryingStore(
            buckets, self._patience, self._told, before_attempt=before_attempt, unanswered=self.unanswered
        )


def _log(error: TransientError, seconds: float) -> None:
    log.warning("the store failed; trying again", error=str(error), seconds=round(seconds, 1))
