"""Background threads, and calls with a timeout. No other module of this package starts a thread (ruff, TID251).

No thread fails silently: every error of its work, also one that is no `Exception`, is passed to a function of its owner
or logged. Every thread is a daemon, since a thread that hangs in a system call must not keep the process from ending.
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
"""A thread started by this module. Join it with a timeout."""
OnFailure = Callable[[BaseException], object]
"""Receives the error of a thread's work. It must not raise; if it does, its error is logged."""


class NoThreadError(OSError, RuntimeError):
    """No thread can be started at the moment; `errno` is EAGAIN.

    Attributes:
        waited: Seconds that were spent on attempts.
    """

    waited: float = 0.0


class CallTimeoutError(Exception):
    """A call did not end within its timeout. It may still be running."""


def supervised(name: str, work: Callable[[], object], *, on_failure: OnFailure) -> Background:
    """Start a thread that does `work` once.

    Args:
        name: Name of the thread.
        work: Called in the thread.
        on_failure: Called in the thread with the error; must end or restart what depends on the work.

    Returns:
        The started thread.

    Raises:
        NoThreadError: No thread can be started.
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
    """Start a thread that does `work` at an interval, also after errors.

    Args:
        name: Name of the thread.
        interval: Seconds between the end of the work and its next start.
        work: Called in the thread.
        on_failure: Called with each error; by default the error is logged.
        stop: Ends the thread when set, after the current call of `work`. None: the thread never ends.
        at_once: Whether the first call is made now, not after `interval` seconds.

    Raises:
        NoThreadError: No thread can be started.
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
    """Start a thread that does `work` after some seconds; return a function that cancels it.

    Raises:
        NoThreadError: No thread can be started.
    """
    cancelled = threading.Event()

    def wait_and_work() -> None:
        if not cancelled.wait(seconds):
            work()

    supervised(name, wait_and_work, on_failure=partial(_log_failure, name))
    return cancelled.set


class Call(Generic[R]):
    """A call in its own thread, which its caller can abandon if the call hangs.

    Args:
        name: Name of the thread.
        work: The call.

    Raises:
        NoThreadError: No thread can be started.
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
        """Whether the call has not ended."""
        return not self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` for the end of the call; return whether it has ended."""
        return self._ended.wait(seconds)

    def when_ended(self, follow: Callable[[], object]) -> None:
        """Call `follow` when the call has ended, in its thread; at once if it has ended already. Errors are logged."""
        with self._lock:
            if self.is_running:
                self._followers.append(follow)
                return
        _run("after a call", follow, partial(_log_failure, "after a call"))

    def result(self, timeout: float) -> R:
        """Return the result of the call.

        Args:
            timeout: Seconds.

        Raises:
            CallTimeoutError: The call has not ended within `timeout`.
            BaseException: The error of the call.
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
    except BaseException as error:  # noqa: BLE001 (a thread must not fail silently)
        try:
            on_failure(error)
        except BaseException:
            log.exception("error handler of background job failed: %s", name)


def _log_failure(name: str, error: BaseException) -> None:
    log.error("background job failed: %s", name, exc_info=error)
