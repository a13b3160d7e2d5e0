"""Background threads, and calls with a timeout. No other module of this package starts a thread (ruff, TID251).

A thread never ends unnoticed. Whatever its work raises, also what is no `Exception`, is given to a function of its
owner, or is logged and the work repeated. Every thread is a daemon: one that hangs in a system call, which nothing can
interrupt, does not keep the process from ending.
"""

import errno
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeAlias, TypeVar

log = logging.getLogger(__name__)

R = TypeVar("R")
Background: TypeAlias = threading.Thread
"""A thread that was started here. Join it with a timeout."""
OnFailure = Callable[[BaseException], object]
"""Told what the work of a thread raised. It must not raise; if it does, both errors are logged."""


class NoThreadError(OSError, RuntimeError):
    """No more threads can be started, for now: `errno` is EAGAIN.

    Attributes:
        waited: Seconds for which it was tried.
    """

    waited: float = 0.0


class CallTimeoutError(Exception):
    """A call has not ended in time. It may still be running."""


def supervised(name: str, work: Callable[[], object], *, on_failure: OnFailure) -> Background:
    """Do something once, in a thread of its own.

    Args:
        name: Of the thread.
        work: What to do.
        on_failure: Must end or restart what depends on the work. Called in the same thread.

    Returns:
        The thread, which has been started.

    Raises:
        NoThreadError: No more threads can be started.
    """
    thread = threading.Thread(target=_run, args=(name, work, on_failure), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise NoThreadError(errno.EAGAIN, "no thread can be started") from error
    return thread


def repeat(
    name: str,
    interval: float,
    work: Callable[[], object],
    *,
    on_failure: OnFailure | None = None,
    stop: threading.Event | None = None,
    at_once: bool = True,
) -> Background:
    """Do something again and again, in a thread of its own, whatever it raises.

    Args:
        name: Of the thread.
        interval: Seconds between the end of the work and its next beginning.
        work: What to do.
        on_failure: Told each time that the work fails; by default the failure is logged.
        stop: Ends the thread when it is set, after the work that is being done. It never ends if none is given.
        at_once: Do it for the first time now, not in `interval` seconds.

    Raises:
        NoThreadError: No more threads can be started.
    """
    ended = stop or threading.Event()
    report = on_failure or partial(_log_failure, name)

    def loop() -> None:
        if not at_once and ended.wait(interval):
            return
        while True:
            _run(name, work, report)
            if ended.wait(interval):
                return

    return supervised(name, loop, on_failure=partial(_log_failure, name))


def later(name: str, seconds: float, work: Callable[[], object]) -> Callable[[], None]:
    """Do something in so many seconds, unless the function that is returned is called before.

    Raises:
        NoThreadError: No more threads can be started.
    """
    cancelled = threading.Event()

    def wait_and_work() -> None:
        if not cancelled.wait(seconds):
            work()

    supervised(name, wait_and_work, on_failure=partial(_log_failure, name))
    return cancelled.set


class Call(Generic[R]):
    """A call that may hang, in a thread of its own, so that its caller can abandon it.

    Args:
        name: Of the thread.
        work: The call.

    Raises:
        NoThreadError: No more threads can be started.
    """

    def __init__(self, name: str, work: Callable[[], R]) -> None:
        self._work = work
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._followers: list[Callable[[], object]] = []
        self._results: list[R] = []
        self._failure: BaseException | None = None
        supervised(name, self._call, on_failure=self._fail)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return not self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended, so many seconds at the most; say whether it has."""
        return self._ended.wait(seconds)

    def when_ended(self, follow: Callable[[], object]) -> None:
        """Have something done once the call has ended, in its thread; in this one if it has. Failures are logged."""
        with self._lock:
            if self.is_running:
                self._followers.append(follow)
                return
        _run("after a call", follow, partial(_log_failure, "after a call"))

    def result(self, timeout: float) -> R:
        """Wait for what the call returns.

        Args:
            timeout: Seconds.

        Raises:
            CallTimeoutError: It has not ended by then.
            BaseException: What the call raised.
        """
        if not self._ended.wait(timeout):
            raise CallTimeoutError(f"not ended within {timeout:g} seconds")
        if self._failure is not None:
            raise self._failure
        return self._results[0]

    def _call(self) -> None:
        self._results.append(self._work())
        self._end()

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        self._end()

    def _end(self) -> None:
        with self._lock:
            self._ended.set()
        for follow in self._followers:
            _run("after a call", follow, partial(_log_failure, "after a call"))


def _run(name: str, work: Callable[[], object], on_failure: OnFailure) -> None:
    try:
        work()
    except BaseException as error:  # noqa: BLE001 (a thread must not end without anybody being told)
        try:
            on_failure(error)
        except BaseException:
            log.exception("the failure of the background job %r could not be handled", name)


def _log_failure(name: str, error: BaseException) -> None:
    log.error("background job failed: %s", name, exc_info=error)
