"""Calls to a store, several at once, each in a thread of its own.

A call that hangs, in a store or a disk that does not answer, cannot be interrupted. So nobody who has to hear of a
cancellation waits inside one: who waits here is woken by `stop`, and what still hangs a second later is left behind.
What is left behind must know it (`Calls.left`), and make good what it may have done. Nothing here knows what is called.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, Self, TypeVar

from thrave.bundle.crew import StoppedError

PATIENCE = 1.0
"""Seconds that calls have to end when nobody wants their results any more."""

R = TypeVar("R")


class Calls(Generic[R]):
    """Calls under way; a context manager, which leaves behind what does not end in time.

    Args:
        wake: wakes whoever waits for something else than a result; called when a call has failed, and by `stop`.
    """

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self._wake = wake
        self._changed = threading.Condition()
        self._running = 0
        self._results: list[R] = []
        self._failure: BaseException | None = None
        self.stopped = False
        """Whether nobody wants the results any more."""
        self.left = False
        """Whether the calls that still run have been left behind."""

    @property
    def pending(self) -> int:
        """How many calls have been begun whose results have not been taken."""
        with self._changed:
            return self._running + len(self._results)

    def begin(self, call: Callable[[], R]) -> None:
        """Make a call in a thread of its own. Raises what an earlier one raised, or StoppedError."""
        with self._changed:
            self._check()
            self._running += 1
        threading.Thread(target=self._run, args=(call,), name="store-call", daemon=True).start()

    def results(self, *, wait: bool = True, within: float | None = None) -> list[R]:
        """What has come back since the last time, in any order; at least one result if `wait`.

        Raises:
            TimeoutError: Nothing came back `within` so many seconds.
            StoppedError: The calls were told to stop.
            Exception: What a call raised.
        """
        with self._changed:
            if wait and not self._changed.wait_for(lambda: self._results or self._ends, within):
                raise TimeoutError
            self._check()
            taken, self._results = self._results, []
        return taken

    def check(self) -> None:
        """Raise what a call raised, if one did."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Begin no more, and wake whoever waits for a result; any thread may call this."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()
        self._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; wait `PATIENCE` seconds for what is under way, and leave the rest behind."""
        self.stop()
        with self._changed:
            self._changed.wait_for(lambda: not self._running, PATIENCE)
            self.left = True

    @property
    def _ends(self) -> bool:
        return self.stopped or self._failure is not None

    def _check(self) -> None:
        self.check()
        if self.stopped:
            raise StoppedError

    def _run(self, call: Callable[[], R]) -> None:
        failure, results = None, []
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 (it is raised again where the results are taken)
            failure = error
        with self._changed:
            self._running -= 1
            self._results += results
            self._failure = self._failure or failure
            self._changed.notify_all()
        if failure is not None:
            self._wake()


class Places:
    """Objects that a call is under way to: no second one is made before the first has come back, left behind or not."""

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
