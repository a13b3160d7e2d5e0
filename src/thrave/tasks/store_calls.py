"""Concurrent calls to a store, each in a thread of its own.

A call that hangs in a store or a disk cannot be interrupted. So no thread that must react to a cancellation waits
inside a call: `stop` wakes the threads that wait for results, and calls that still run a second later are abandoned.
An abandoned call makes no further attempt (`CallGroup.check_wanted`). Its last request may still arrive, so its caller
records the object before it starts the call.
"""

import errno
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeVar

from thrave.concurrency import NoThreadError, monotonic, new_condition, start_thread
from thrave.pipeline import StoppedError

STOP_TIMEOUT = 1.0
"""Seconds to wait for calls whose results are no longer needed, before they are abandoned."""
START_TIMEOUT = 60.0
"""Seconds to retry the start of a call while the host has no thread for it."""

_PAUSE = 0.25  # seconds

R = TypeVar("R")


class CallGroup(Generic[R]):
    """A group of concurrent calls; a context manager that abandons calls which do not end in time.

    The `with` block must take every result, with `remaining` at its end. No result and no error is lost: `pending`
    counts a call until its result was taken or its error was raised.

    Args:
        wake: Called when a call has failed, and by `stop`: wakes threads that do not wait for a result.
    """

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self._wake = wake
        self._changed = new_condition()
        self._running = 0
        self._results: list[R] = []
        self._failures: list[BaseException] = []
        self.is_stopped = False
        """Whether the results are no longer needed."""
        self.is_abandoned = False
        """Whether the calls that still run have been abandoned."""

    @property
    def pending(self) -> int:
        """Number of started calls whose results were not taken; a failed call stays pending."""
        with self._changed:
            return self._running + len(self._results) + len(self._failures)

    def start(self, call: Callable[[], R]) -> None:
        """Start a call in a thread of its own.

        Retries for `START_TIMEOUT` seconds while the host has no thread for it.

        Raises:
            StoppedError: The calls were stopped.
            NoThreadError: The host had no thread for it.
            Exception: What an earlier call raised.
        """
        until = monotonic() + START_TIMEOUT
        while not self._started(call):
            if monotonic() > until:
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
            # In the context of the task, so that its log lines name the task.
            work = partial(copy_context().run, self._run, call)
            start_thread("store-call", work, on_failure=self._fail)
        except RuntimeError:  # no thread, no call
            with self._changed:
                self._running -= 1
                self._changed.notify_all()
            return False
        return True

    def results(self, *, wait: bool = True, timeout: float | None = None) -> list[R]:
        """Take the results since the last call, in any order; at least one if `wait`.

        Raises:
            TimeoutError: No call ended within `timeout` seconds.
            StoppedError: The calls were stopped.
            Exception: What a call raised.
        """
        with self._changed:
            if wait and not self._changed.wait_for(lambda: self._results or self._ends, timeout):
                raise TimeoutError
            self._check()
            taken, self._results = self._results, []
        return taken

    def remaining(self, *, timeout: float | None = None) -> Iterator[R]:
        """Yield the results of all pending calls, as they arrive; return when every call has ended.

        Raises as `results`; so it raises whenever a call has failed.
        """
        while self.pending:
            yield from self.results(timeout=timeout)

    def check(self) -> None:
        """Raise the first error of a call, if there is one."""
        if self._failures:
            raise self._failures[0]

    def check_wanted(self) -> None:
        """Raise StoppedError if the results are no longer needed. The calls check this before each attempt."""
        if self.is_stopped:
            raise StoppedError

    def stop(self) -> None:
        """Start no more calls, and wake the threads that wait for results. Any thread may call this."""
        with self._changed:
            self.is_stopped = True
            self._changed.notify_all()
        self._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; wait `STOP_TIMEOUT` seconds for running calls, and abandon the rest.

        Raises:
            Exception: The error of a call, if the block has not raised one.
            RuntimeError: The block has ended without an error and without taking every result.
        """
        pending = self.pending
        self.stop()
        with self._changed:
            self._changed.wait_for(lambda: not self._running, STOP_TIMEOUT)
            self.is_abandoned = True
        if error is None and pending:
            self.check()
            raise RuntimeError(f"the results of {pending} calls were not taken")

    @property
    def _ends(self) -> bool:
        return self.is_stopped or bool(self._failures)

    def _check(self) -> None:
        self.check()
        if self.is_stopped:
            raise StoppedError

    def _run(self, call: Callable[[], R]) -> None:
        failures, results = [], []
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 (raised again where the results are taken)
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
    """The objects that requests of this process may hit: of running calls, and of requests without a response."""

    def __init__(self) -> None:
        self.unanswered: set[tuple[str, str]] = set()
        """Bucket and key of each object for which a request was sent without a response: the request may arrive later.
        An entry stays here until the database has it (`settle_time`)."""
        self._changed = new_condition()
        self._in_use = Counter[tuple[str, str]]()

    def wait_until_free(self, bucket: str, key: str, check: Callable[[], None], timeout: float) -> bool:
        """Wait until no call uses an object; False if one still does after `timeout` seconds.

        Args:
            bucket: Of the object.
            key: Of the object.
            check: Called repeatedly; ends the wait if it raises.
            timeout: Seconds.
        """
        address, until = (bucket, key), monotonic() + timeout
        while True:
            check()
            remaining = until - monotonic()
            with self._changed:
                if self._changed.wait_for(lambda: address not in self._in_use, max(0.0, min(remaining, _PAUSE))):
                    return True
            if remaining <= 0:
                return False

    @contextmanager
    def lock(self, bucket: str, key: str) -> Iterator[None]:
        """Lock an object for one call. Raises TimeoutError if other calls use it for `START_TIMEOUT` seconds."""
        address = bucket, key
        with self._changed:
            if not self._changed.wait_for(lambda: address not in self._in_use, START_TIMEOUT):
                raise TimeoutError(f"another call uses '{key}'")
            self._in_use[address] += 1
        try:
            yield
        finally:
            self._release([address])

    @contextmanager
    def shared(self, bucket: str, keys: Collection[str]) -> Iterator[None]:
        """Use objects together with other calls: a deletion may be repeated while the first one hangs."""
        addresses = [(bucket, key) for key in keys]
        with self._changed:
            self._in_use.update(addresses)
        try:
            yield
        finally:
            self._release(addresses)

    def _release(self, addresses: Iterable[tuple[str, str]]) -> None:
        with self._changed:
            self._in_use.subtract(addresses)
            self._in_use += Counter[tuple[str, str]]()  # removes zero counts
            self._changed.notify_all()

    def in_flight_keys(self, bucket: str) -> set[str]:
        """Return the keys of a bucket that running calls use."""
        with self._changed:
            return {key for its_bucket, key in self._in_use if its_bucket == bucket}

    def unanswered_of(self, bucket: str, keys: Iterable[str]) -> set[str]:
        """Return those of `keys` for which a request has no response."""
        return {key for key in keys if (bucket, key) in self.unanswered}

    def clear_unanswered(self, bucket: str, keys: Iterable[str]) -> None:
        """Remove requests without a response; call this once their `settle_time` is committed."""
        self.unanswered.difference_update([(bucket, key) for key in keys])

    def busy_keys(self, bucket: str) -> set[str]:
        """Return the keys of a bucket that a request of this process may still hit."""
        return self.in_flight_keys(bucket) | {key for its_bucket, key in [*self.unanswered] if its_bucket == bucket}


IN_FLIGHT = InFlightObjects()
"""The objects of this process."""
