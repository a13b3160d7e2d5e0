"""Concurrent calls to a store, each in a thread of its own.

A call that hangs, in a store or a disk that does not respond, cannot be interrupted. Nobody who must react to a
cancellation waits inside one: `stop` wakes whoever waits for results, and calls that still run a second later are
abandoned. An abandoned call makes no further attempt (`CallGroup.check_wanted`). What its last attempt does is
recorded by
whoever has begun it, since a request that is under way cannot be taken back.

No result and no failure can be lost: `pending` counts a call until its result was taken or its failure was raised, and
a `with` block that ends without an error while one is pending is an error.
"""

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeVar

from thrave.concurrency import NoThreadError, supervised
from thrave.pipeline import StoppedError

PATIENCE = 1.0
"""Seconds that calls have to end when their results are no longer needed."""
START_TIMEOUT = 60.0
"""Seconds for which a call is begun again while the machine has no thread for it."""

_PAUSE = 0.25  # seconds

R = TypeVar("R")


class CallGroup(Generic[R]):
    """A group of concurrent calls; a context manager, which abandons the calls that do not end in time.

    The `with` block takes every result, with `remaining` at its end.

    Args:
        wake: Called when a call has failed, and by `stop`; wakes whoever waits for something else than a result.
    """

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self._wake = wake
        self._changed = threading.Condition()
        self._running = 0
        self._results: list[R] = []
        self._failures: list[BaseException] = []
        self.stopped = False
        """Whether the results are no longer needed."""
        self.abandoned = False
        """Whether the calls that still run have been abandoned."""

    @property
    def pending(self) -> int:
        """Number of calls that have started and whose results were not taken; a failed call stays one of them."""
        with self._changed:
            return self._running + len(self._results) + len(self._failures)

    def start(self, call: Callable[[], R]) -> None:
        """Start a call in a thread of its own.

        While the machine has no thread for it, it is tried again for `START_TIMEOUT` seconds.

        Raises:
            StoppedError: The calls were stopped.
            NoThreadError: There was no thread for it.
            Exception: What an earlier call raised.
        """
        until = time.monotonic() + START_TIMEOUT
        while not self._started(call):
            if time.monotonic() > until:
                error = NoThreadError(errno.EAGAIN, "no thread can be started")
                error.waited = START_TIMEOUT
                raise error
            with self._changed:
                self._changed.wait(_PAUSE)

    def _started(self, call: Callable[[], R]) -> bool:
        with self._changed:
            self._check()
            self._running += 1
        try:
            supervised("store-call", partial(self._run, call), on_failure=self._fail)
        except RuntimeError:  # no thread, no call
            with self._changed:
                self._running -= 1
                self._changed.notify_all()
            return False
        return True

    def results(self, *, wait: bool = True, within: float | None = None) -> list[R]:
        """Take the results that arrived since the last time, in any order; at least one if `wait`.

        Raises:
            TimeoutError: No call ended `within` so many seconds.
            StoppedError: The calls were stopped.
            Exception: What a call raised.
        """
        with self._changed:
            if wait and not self._changed.wait_for(lambda: self._results or self._ends, within):
                raise TimeoutError
            self._check()
            taken, self._results = self._results, []
        return taken

    def remaining(self, *, within: float | None = None) -> Iterator[R]:
        """Yield the results of all calls that are pending, as they arrive; return when every call has ended.

        This is how a group of calls ends. Raises as `results`, and so whenever a call has failed.
        """
        while self.pending:
            yield from self.results(within=within)

    def check(self) -> None:
        """Raise what a call raised, if one did."""
        if self._failures:
            raise self._failures[0]

    def check_wanted(self) -> None:
        """Raise StoppedError if the results are no longer needed; for the calls themselves, before each attempt."""
        if self.stopped:
            raise StoppedError

    def stop(self) -> None:
        """Start no more calls, and wake whoever waits for a result; any thread may call this."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()
        self._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; wait `PATIENCE` seconds for the calls that still run, and abandon the rest.

        Raises:
            Exception: What a call raised, if the block ended as if none had.
            RuntimeError: The block ended without an error, and has not taken every result.
        """
        pending = self.pending
        self.stop()
        with self._changed:
            self._changed.wait_for(lambda: not self._running, PATIENCE)
            self.abandoned = True
        if error is None and pending:
            self.check()
            raise RuntimeError(f"the results of {pending} calls were not taken")

    @property
    def _ends(self) -> bool:
        return self.stopped or bool(self._failures)

    def _check(self) -> None:
        self.check()
        if self.stopped:
            raise StoppedError

    def _run(self, call: Callable[[], R]) -> None:
        failures, results = [], []
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 (it is raised again where the results are taken)
            failures.append(error)
        with self._changed:
            self._running -= 1
            self._results += results
            self._failures += failures
            self._changed.notify_all()
        if failures:
            self._wake()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failures.append(error)
            self._changed.notify_all()


class InFlightObjects:
    """Which objects the calls of this process are under way to, those among them that were abandoned."""

    def __init__(self) -> None:
        self.unanswered: set[tuple[str, str]] = set()
        """Bucket and key of each object that a request was sent about which was not answered: it may arrive later.
        One stays here until the database has it (`settle_time`)."""
        self._changed = threading.Condition()
        self._taken = Counter[tuple[str, str]]()

    def wait_until_free(self, bucket: str, key: str, check: Callable[[], None], timeout: float) -> bool:
        """Wait until no call is under way to an object; say whether that is so after `timeout` seconds.

        Args:
            bucket: Where it is.
            key: The object's.
            check: Called again and again; what it raises ends the wait.
            timeout: Seconds.
        """
        place, until = (bucket, key), time.monotonic() + timeout
        while True:
            check()
            left = until - time.monotonic()
            with self._changed:
                if self._changed.wait_for(lambda: place not in self._taken, max(0.0, min(left, _PAUSE))):
                    return True
            if left <= 0:
                return False

    @contextmanager
    def lock(self, bucket: str, key: str) -> Iterator[None]:
        """Have an object to oneself. Raises TimeoutError if others have it for `START_TIMEOUT` seconds."""
        place = bucket, key
        with self._changed:
            if not self._changed.wait_for(lambda: place not in self._taken, START_TIMEOUT):
                raise TimeoutError(f"another call is under way to '{key}'")
            self._taken[place] += 1
        try:
            yield
        finally:
            self._release([place])

    @contextmanager
    def shared(self, bucket: str, keys: Collection[str]) -> Iterator[None]:
        """Be under way to objects, together with others: a deletion may be repeated while the first one hangs."""
        places = [(bucket, key) for key in keys]
        with self._changed:
            self._taken.update(places)
        try:
            yield
        finally:
            self._release(places)

    def _release(self, places: Iterable[tuple[str, str]]) -> None:
        with self._changed:
            self._taken.subtract(places)
            self._taken += Counter[tuple[str, str]]()  # drops what is 0
            self._changed.notify_all()

    def in_flight_keys(self, bucket: str) -> set[str]:
        """The keys of a bucket that calls are under way to."""
        with self._changed:
            return {key for of, key in self._taken if of == bucket}

    def unanswered_of(self, bucket: str, keys: Iterable[str]) -> set[str]:
        """Those of these keys that a request was sent about which was not answered."""
        return {key for key in keys if (bucket, key) in self.unanswered}

    def clear_unanswered(self, bucket: str, keys: Iterable[str]) -> None:
        """Forget such requests; call this once their `settle_time` is committed."""
        self.unanswered.difference_update([(bucket, key) for key in keys])

    def busy_keys(self, bucket: str) -> set[str]:
        """The keys of a bucket that requests of this process may be under way to."""
        return self.in_flight_keys(bucket) | {key for of, key in [*self.unanswered] if of == bucket}


IN_FLIGHT = InFlightObjects()
"""Those of this process."""
