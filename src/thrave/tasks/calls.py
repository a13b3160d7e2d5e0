"""Concurrent calls to a store, each in a thread of its own.

A call that hangs, in a store or a disk that does not respond, cannot be interrupted. Nobody who must react to a
cancellation waits inside one: `stop` wakes whoever waits for results, and calls that still run a second later are
abandoned. An abandoned call can see that (`Calls.left`), and must undo what it does afterwards.

No result and no failure can be lost: `pending` counts a call until its result was taken or its failure was raised, and
a `with` block that ends without an error while one is pending is an error.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeVar

from thrave.bundle.crew import StoppedError
from thrave.concurrency import supervised

PATIENCE = 1.0
"""Seconds that calls have to end when their results are no longer needed."""

R = TypeVar("R")


class Calls(Generic[R]):
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
        self.left = False
        """Whether the calls that still run have been abandoned."""

    @property
    def pending(self) -> int:
        """Number of calls that have started and whose results were not taken; a failed call stays one of them."""
        with self._changed:
            return self._running + len(self._results) + len(self._failures)

    def begin(self, call: Callable[[], R]) -> None:
        """Start a call in a thread of its own. Raises what an earlier one raised, or StoppedError."""
        with self._changed:
            self._check()
            self._running += 1
        try:
            supervised("store-call", partial(self._run, call), on_failure=self._fail)
        except BaseException:  # no thread, no call
            with self._changed:
                self._running -= 1
                self._changed.notify_all()
            raise

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
            self.left = True
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


class Places:
    """One lock per object key. Two uploads to one key never overlap, even if the first was abandoned."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken: set[tuple[str, str]] = set()

    @contextmanager
    def alone(self, bucket: str, key: str) -> Iterator[None]:
        """Have an object to oneself; waits until nobody else has it."""
        place = bucket, key
        with self._changed:
            self._changed.wait_for(lambda: place not in self._taken)
            self._taken.add(place)
        try:
            yield
        finally:
            with self._changed:
                self._taken.remove(place)
                self._changed.notify_all()

    def taken(self, bucket: str) -> set[str]:
        """The keys of a bucket that calls are under way to."""
        with self._changed:
            return {key for of, key in self._taken if of == bucket}
