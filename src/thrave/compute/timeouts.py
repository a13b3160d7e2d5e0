"""Questions and commands to a hypervisor that have a timeout: libvirt has none for what it asks a QEMU that hangs.

A thread that waits for libvirt cannot be interrupted. Once its caller has given up, it gives no command that it has not
given yet (`check_command`), and the instance counts as busy until the thread has ended (`is_busy`): its command may
still be carried out.

A command may come minutes after it was decided upon. So a driver checks right before it gives one whether this process
still may (`write_guard.py`): another host may have the instance by then.

Waits for work that goes on by itself, for as long as it makes progress.
"""

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

from thrave.compute.errors import HypervisorError, HypervisorUnavailable
from thrave.concurrency import Call, CallTimeoutError, Event, monotonic, new_event, new_lock
from thrave.write_guard import start_guard

TIMEOUT = 120.0  # seconds; a start may wait a minute for a guest that has just powered off


_Self = TypeVar("_Self")


_Arguments = ParamSpec("_Arguments")


_Answer = TypeVar("_Answer")


_given_up: ContextVar[Event | None] = ContextVar("given_up", default=None)


_abandoned: Counter[str] = Counter()  # commands by instance id


_lock = new_lock()


def call_with_deadline(instance_id: str, ask: Callable[[], _Answer], *, is_command: bool = False) -> _Answer:
    """Ask in a thread of its own, with the context variables of this one, and wait `TIMEOUT` seconds for the answer.

    Args:
        instance_id: The instance.
        ask: Asks.
        is_command: Whether it changes something, so that the instance is busy for as long as it may still do so.

    Raises:
        HypervisorGoneError: There is none by then. What was asked for may still be done.
        Exception: What `ask` raises.
    """
    given_up = new_event()

    def ask_here() -> _Answer:
        _given_up.set(given_up)
        return ask()

    call = Call(f"ask {instance_id}", partial(copy_context().run, ask_here))
    try:
        return call.result(TIMEOUT)
    except CallTimeoutError:
        given_up.set()
        if is_command:
            _keep_busy(instance_id, call)
        raise _gone(instance_id) from None


def check_command(instance_id: str) -> None:
    """Check right before a command that it may be given.

    Raises:
        HypervisorGoneError: The caller does not wait for it any more.
        Exception: What the check of `start_guard` raises.
    """
    given_up = _given_up.get()
    if given_up is not None and given_up.is_set():
        raise _gone(instance_id)
    start_guard.check()


def is_busy(instance_id: str) -> bool:
    """Whether a command that nobody waits for any more may still be carried out."""
    with _lock:
        return _abandoned[instance_id] > 0


def with_timeout(
    method: Callable[Concatenate[_Self, str, _Arguments], _Answer],
) -> Callable[Concatenate[_Self, str, _Arguments], _Answer]:
    """A method whose first argument is an instance's id, as `answered`."""
    return _bounded(method, is_command=False)


def command_with_timeout(
    method: Callable[Concatenate[_Self, str, _Arguments], _Answer],
) -> Callable[Concatenate[_Self, str, _Arguments], _Answer]:
    """The same, of one that changes something."""
    return _bounded(method, is_command=True)


def _bounded(
    method: Callable[Concatenate[_Self, str, _Arguments], _Answer], *, is_command: bool
) -> Callable[Concatenate[_Self, str, _Arguments], _Answer]:
    @wraps(method)
    def ask(self: _Self, instance_id: str, *args: _Arguments.args, **options: _Arguments.kwargs) -> _Answer:
        return call_with_deadline(
            instance_id, lambda: method(self, instance_id, *args, **options), is_command=is_command
        )

    return ask  # type: ignore[return-value]  # Concatenate has no names, and callers may give one


def _keep_busy(instance_id: str, call: Call[_Answer]) -> None:
    with _lock:
        _abandoned[instance_id] += 1
    call.when_ended(lambda: _release(instance_id))


def _release(instance_id: str) -> None:
    with _lock:
        _abandoned[instance_id] -= 1
        if not _abandoned[instance_id]:
            del _abandoned[instance_id]


def _gone(instance_id: str) -> HypervisorUnavailable:
    message = f"the hypervisor has not answered within {TIMEOUT:g} seconds"
    return HypervisorUnavailable(instance_id, message, waited=TIMEOUT)


Pause = Callable[[float], object]
"""Waits some seconds; may raise, to end it all."""


_LONGEST = 2.0  # seconds between two calls that count


class RunningTime:
    """Measures time in which this process ran: it may be stopped, or its machine paused, for hours.

    Args:
        longest: Seconds between two calls that count; the process itself stood still for the rest.
        clock: Seconds of a monotonic clock.
    """

    def __init__(self, longest: float, clock: Callable[[], float] = monotonic) -> None:
        self._longest = longest
        self._clock = clock
        self._called = clock()

    def passed(self) -> float:
        """Return the seconds since this was last called."""
        now = self._clock()
        passed, self._called = min(now - self._called, self._longest), now
        return passed


class ProgressPause:
    """A pause that raises once nothing has moved for too long.

    Args:
        instance_id: The instance that is worked on.
        pause: Waits.
        timeout: Seconds without progress.
    """

    def __init__(self, instance_id: str, pause: Pause, timeout: float) -> None:
        self._instance_id = instance_id
        self._pause = pause
        self._timeout = timeout
        self._time = RunningTime(_LONGEST)
        self._idle = 0.0

    def __call__(self, seconds: float) -> None:
        """Wait. Raises HypervisorError if nothing has moved for too long, and whatever the pause inside raises."""
        self._pause(seconds)
        self._idle += max(seconds, self._time.passed())
        if self._idle >= self._timeout:
            raise HypervisorError(self._instance_id, f"no progress for {self._timeout:g} seconds")

    def moved(self) -> None:
        """Take note of progress."""
        self._idle = 0.0


def report_progress(pause: Pause) -> None:
    """Tell whoever waits by a pause that the work has moved, if that ends what does not move."""
    if isinstance(pause, ProgressPause):
        pause.moved()
