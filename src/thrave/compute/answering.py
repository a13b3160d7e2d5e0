"""Questions to a hypervisor that have a timeout: libvirt has none for what it asks a QEMU that hangs."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from thrave.compute.errors import HypervisorGoneError
from thrave.concurrency import Call, CallTimeoutError

TIMEOUT = 120.0  # seconds; a start may wait a minute for a guest that has just powered off
_Self = TypeVar("_Self")
_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")


def answered(instance_id: str, ask: Callable[[], _Answer]) -> _Answer:
    """Ask in a thread of its own, and wait `TIMEOUT` seconds for the answer.

    Raises:
        HypervisorGoneError: There is none by then. What was asked for may still be done.
        Exception: What `ask` raises.
    """
    try:
        return Call(f"ask {instance_id}", ask).result(TIMEOUT)
    except CallTimeoutError:
        message = f"the hypervisor has not answered within {TIMEOUT:g} seconds"
        raise HypervisorGoneError(instance_id, message, waited=TIMEOUT) from None


def with_timeout(
    method: Callable[Concatenate[_Self, str, _Arguments], _Answer],
) -> Callable[Concatenate[_Self, str, _Arguments], _Answer]:
    """A method whose first argument is an instance's id, as `answered`."""

    @wraps(method)
    def ask(self: _Self, instance_id: str, *args: _Arguments.args, **options: _Arguments.kwargs) -> _Answer:
        return answered(instance_id, lambda: method(self, instance_id, *args, **options))

    return ask  # type: ignore[return-value]  # Concatenate has no names, and callers may give one
