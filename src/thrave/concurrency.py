"""Threads, locks, waits, clocks and random numbers. All other modules must use these functions (ruff, TID251).

All of them come from one `System`. A test can replace it, to decide which thread runs next and what time it is.

No thread fails silently: every error of its work, also one that is not an `Exception`, is passed to `on_failure` or
logged. Every thread is a daemon, since a thread that hangs in a system call must not prevent the process from ending.
"""

import errno
import logging
import secrets
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Generic, Protocol, TypeAlias, TypeVar

log = logging.getLogger(__name__)

R = TypeVar("R")
Lock: TypeAlias = threading.Lock
Event: TypeAlias = threading.Event
Condition: TypeAlias = threading.Condition
Semaphore: TypeAlias = threading.BoundedSemaphore
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


class RunningThread(Protocol):
    """A thread started by this module."""

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread, at most `timeout` seconds."""

    def is_alive(self) -> bool:
        """Whether the thread has not ended."""


class System:
    """The threads, locks, clocks and random numbers of the operating system. The functions below describe the methods.

    A test replaces it with `use_system`.
    """

    lock = staticmethod(threading.Lock)
    event = staticmethod(threading.Event)
    condition = staticmethod(threading.Condition)
    semaphore = staticmethod(threading.BoundedSemaphore)
    sleep = staticmethod(time.sleep)
    monotonic = staticmethod(time.monotonic)
    wall_time = staticmethod(time.time)
    random_bytes = staticmethod(secrets.token_bytes)
    random_below = staticmethod(secrets.randbelow)

    def start_thread(self, name: str, run: Callable[[], None]) -> RunningThread:
        """Start a daemon thread. Raises RuntimeError if the operating system has no thread."""
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def boot_time(self) -> float:
        """See `boot_time`."""
        return time.clock_gettime(_BOOT_CLOCK)


# Linux's CLOCK_MONOTONIC stops while the machine is suspended. Other systems have no CLOCK_BOOTTIME.
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_system = System()


def use_system(system: System) -> System:
    """Take threads, locks, clocks and random numbers from `system` from now on; return the one used before.

    Locks and threads that exist already are not replaced.
    """
    global _system  # one for the process, so that no constructor has to pass it on
    before, _system = _system, system
    return before


def in_main_thread() -> bool:
    """Whether the caller runs in the main thread, the only one in which Python lets a program set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def new_lock() -> Lock:
    """Return a new lock."""
    return _system.lock()


def new_event() -> Event:
    """Return a new event."""
    return _system.event()


def new_condition() -> Condition:
    """Return a new condition with a lock of its own."""
    return _system.condition()


def new_semaphore(value: int = 1) -> Semaphore:
    """Return a new semaphore that at most `value` threads hold at a time."""
    return _system.semaphore(value)


def sleep(seconds: float) -> None:
    """Wait in this thread."""
    _system.sleep(seconds)


def monotonic() -> float:
    """Return seconds of a clock that is never set. Its start has no meaning."""
    return _system.monotonic()


def boot_time() -> float:
    """Return seconds of a clock that is never set and, on Linux, also counts while the machine is suspended."""
    return _system.boot_time()


def wall_time() -> float:
    """Return seconds since 1970 by the clock of this machine. An administrator may set that clock."""
    return _system.wall_time()


def utc_now() -> datetime:
    """Return the time of this machine, aware, in UTC. For times that other machines compare, see `database.now`."""
    return datetime.fromtimestamp(wall_time(), UTC)


def random_bytes(count: int) -> bytes:
    """Return cryptographically secure random bytes."""
    return _system.random_bytes(count)


def random_hex(count: int) -> str:
    """Return `count` random bytes as lower-case hexadecimal digits."""
    return random_bytes(count).hex()


def random_below(limit: int) -> int:
    """Return a cryptographically secure random number from 0 to `limit` - 1."""
    return _system.random_below(limit)


def start_thread(name: str, work: Callable[[], object], *, on_failure: OnFailure) -> RunningThread:
    """Start a thread that calls `work` once.

    Args:
        name: Name of the thread.
        work: Called in the thread.
        on_failure: Called in the thread with the error; must end or restart what depends on the work.

    Returns:
        The started thread.

    Raises:
        NoThreadError: No thread can be started.
    """
    try:
        return _system.start_thread(name, partial(_run, name, work, on_failure))
    except RuntimeError as error:
        raise NoThreadError(errno.EAGAIN, "no thread can be started") from error


def start_repeating(
    name: str,
    interval: float,
    work: Callable[[], object],
    *,
    on_failure: OnFailure | None = None,
    stop: Event | None = None,
    at_once: bool = True,
) -> RunningThread:
    """Start a thread that calls `work` at an interval, also after errors.

    Args:
        name: Name of the thread.
        interval: Seconds between the end of a call and the next call.
        work: Called in the thread.
        on_failure: Called with each error; by default the error is logged.
        stop: Ends the thread when set, after the current call of `work`. None: the thread never ends.
        at_once: Whether the first call is made now, not after `interval` seconds.

    Raises:
        NoThreadError: No thread can be started.
    """
    ended = stop or new_event()
    report = on_failure or partial(_log_failure, name)

    def loop() -> None:
        if not at_once and ended.wait(interval):
            return
        while True:
            _run(name, work, report)
            if ended.wait(interval):
                return

    return start_thread(name, loop, on_failure=partial(_log_failure, name))


def start_later(name: str, seconds: float, work: Callable[[], object]) -> Callable[[], None]:
    """Start a thread that calls `work` after some seconds; return a function that cancels it.

    Raises:
        NoThreadError: No thread can be started.
    """
    cancelled = new_event()

    def wait_and_work() -> None:
        if not cancelled.wait(seconds):
            work()

    start_thread(name, wait_and_work, on_failure=partial(_log_failure, name))
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
        self._ended = new_event()
        self._lock = new_lock()
        self._callbacks: list[Callable[[], object]] = []
        self._results: list[R] = []
        self._failure: BaseException | None = None
        start_thread(name, self._call, on_failure=self._fail)

    @property
    def is_running(self) -> bool:
        """Whether the call has not ended."""
        return not self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` for the end of the call; return whether it has ended."""
        return self._ended.wait(seconds)

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Call `callback` in the thread of the call when it has ended; at once if it has ended already. Logs errors."""
        with self._lock:
            if self.is_running:
                self._callbacks.append(callback)
                return
        _run("after a call", callback, partial(_log_failure, "after a call"))

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
        for callback in self._callbacks:
            _run("after a call", callback, partial(_log_failure, "after a call"))


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
