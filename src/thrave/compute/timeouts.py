"""Timeouts for calls to a hypervisor. libvirt has none: a call for a domain whose QEMU hangs does not return.

A thread that waits for libvirt cannot be interrupted. Once its caller has given up, the thread gives no further command
(`check_command`), and the instance is busy until the thread ends (`is_busy`): its last command may still take effect.
A command may come minutes after the decision to give it; another host may have the instance by then. Therefore a driver
also checks right before each command whether this process may give it (`write_guard.py`).

`ProgressPause` ends a long operation, such as a merge, only if it makes no progress.
"""

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

from thrave.compute.errors import HypervisorError, HypervisorUnavailable
from thrave.concurrency import Call, CallTimeoutError, Event, monotonic, new_event, new_lock
from thrave.write_guard import command_guard

TIMEOUT = 120.0  # seconds; a start may wait a minute for a guest that has just powered off


_Self = TypeVar("_Self")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_given_up: ContextVar[Event | None] = ContextVar("given_up", default=None)
"""Set if the caller of this thread does not wait any more."""
_abandoned: Counter[str] = Counter()  # number of commands by instance id
_lock = new_lock()


def call_with_timeout(instance_id: str, function: Callable[[], _Result], *, is_command: bool = False) -> _Result:
    """Call a function in another thread, with this thread's context variables, and wait `TIMEOUT` seconds for it.

    Args:
        instance_id: The instance.
        function: The call.
        is_command: Whether the call changes something. Then the instance is busy until an abandoned call has ended.

    Raises:
        HypervisorUnavailable: The call did not end in time. A command may still be carried out.
        Exception: What `function` raises.
    """
    given_up = new_event()

    def run() -> _Result:
        _given_up.set(given_up)
        return function()

    call = Call(f"hypervisor {instance_id}", partial(copy_context().run, run))
    try:
        return call.result(TIMEOUT)
    except CallTimeoutError:
        given_up.set()
        if is_command:
            _keep_busy(instance_id, call)
        raise _timeout_error(instance_id) from None


def check_command(instance_id: str) -> None:
    """Check, right before a command, that it may be given.

    Raises:
        HypervisorUnavailable: The caller has given up.
        Exception: What the check of `command_guard` raises.
    """
    given_up = _given_up.get()
    if given_up is not None and given_up.is_set():
        raise _timeout_error(instance_id)
    command_guard.check()


def is_busy(instance_id: str) -> bool:
    """Return whether an abandoned command may still be carried out."""
    with _lock:
        return _abandoned[instance_id] > 0


def with_timeout(
    method: Callable[Concatenate[_Self, str, _Arguments], _Result],
) -> Callable[Concatenate[_Self, str, _Arguments], _Result]:
    """Decorate a method whose first argument is an instance id: `call_with_timeout` calls it."""
    return _decorate(method, is_command=False)


def command_with_timeout(
    method: Callable[Concatenate[_Self, str, _Arguments], _Result],
) -> Callable[Concatenate[_Self, str, _Arguments], _Result]:
    """As `with_timeout`, for a method that changes something."""
    return _decorate(method, is_command=True)


def _decorate(
    method: Callable[Concatenate[_Self, str, _Arguments], _Result], *, is_command: bool
) -> Callable[Concatenate[_Self, str, _Arguments], _Result]:
    @wraps(method)
    def call(self: _Self, instance_id: str, *args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        return call_with_timeout(
            instance_id, lambda: method(self, instance_id, *args, **options), is_command=is_command
        )

    return call  # type: ignore[return-value]  # Concatenate cannot express that callers may use keyword arguments


def _keep_busy(instance_id: str, call: Call[_Result]) -> None:
    with _lock:
        _abandoned[instance_id] += 1
    call.add_done_callback(lambda: _release(instance_id))


def _release(instance_id: str) -> None:
    with _lock:
        _abandoned[instance_id] -= 1
        if not _abandoned[instance_id]:
            del _abandoned[instance_id]


def _timeout_error(instance_id: str) -> HypervisorUnavailable:
    message = f"the hypervisor has not responded within {TIMEOUT:g} seconds"
    return HypervisorUnavailable(instance_id, message, waited=TIMEOUT)


Pause = Callable[[float], object]
"""Waits some seconds; may raise, to end the operation."""

_MAX_COUNTED_INTERVAL = 2.0  # seconds between two pauses; the process was stopped for the rest


class RunningTime:
    """Measures the time in which this process ran. It may be stopped, or its machine paused, for hours.

    Args:
        max_interval: Seconds between two calls that count at most; the process was stopped for the rest.
        clock: Seconds of a monotonic clock.
    """

    def __init__(self, max_interval: float, clock: Callable[[], float] = monotonic) -> None:
        self._max_interval = max_interval
        self._clock = clock
        self._last_call = clock()

    def passed(self) -> float:
        """Return the counted seconds since the last call."""
        now = self._clock()
        passed, self._last_call = min(now - self._last_call, self._max_interval), now
        return passed


class ProgressPause:
    """A `Pause` that raises an error if the operation makes no progress.

    Args:
        instance_id: The instance of the operation.
        pause: Waits.
        timeout: Seconds without progress.
    """

    def __init__(self, instance_id: str, pause: Pause, timeout: float) -> None:
        self._instance_id = instance_id
        self._pause = pause
        self._timeout = timeout
        self._running_time = RunningTime(_MAX_COUNTED_INTERVAL)
        self._seconds_without_progress = 0.0

    def __call__(self, seconds: float) -> None:
        """Wait. Raises HypervisorError after `timeout` seconds without progress, and the errors of `pause`."""
        self._pause(seconds)
        self._seconds_without_progress += max(seconds, self._running_time.passed())
        if self._seconds_without_progress >= self._timeout:
            raise HypervisorError(self._instance_id, f"no progress for {self._timeout:g} seconds")

    def record_progress(self) -> None:
        """Count the timeout from now."""
        self._seconds_without_progress = 0.0


def report_progress(pause: Pause) -> None:
    """Record progress of the operation if its pause is a `ProgressPause`."""
    if isinstance(pause, ProgressPause):
        pause.record_progress()
