"""Timeouts for calls to a hypervisor. libvirt has none: a call for a domain whose QEMU hangs does not return.

A thread that waits for libvirt cannot be interrupted. Once its caller has given up, the thread gives no further command
(`check_command`), and the instance is busy until the thread ends (`is_busy`): its last command may still take effect.
A thread may reach its command minutes after the command was decided; another host may have the instance by then.
Therefore `check_command` also checks, right before each command, whether this process may give it (`write_guard.py`).
How long a merge may make no progress is in `progress_timeout.py`.
"""

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

from thrave.compute.errors import HypervisorUnavailable
from thrave.concurrency import Call, CallTimeoutError, Event, new_event, new_lock
from thrave.write_guard import command_guard

TIMEOUT = 120.0  # seconds; a start may wait a minute for a guest that has just powered off


_Self = TypeVar("_Self")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_given_up: ContextVar[Event | None] = ContextVar("given_up", default=None)
"""An event that is set once the caller of `call_with_timeout` has stopped waiting for this thread."""
_abandoned: Counter[str] = Counter()  # by instance id: number of abandoned commands that have not ended
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
