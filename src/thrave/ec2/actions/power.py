"""Actions on the power of instances: StartInstances, StopInstances, RebootInstances, TerminateInstances.

Each asks and does not wait: the answer says what the state was and which it is changing to, DescribeInstances says what
has become of it. All instances of a request are checked before anything is done to one. What is asked is recorded
before the answer is sent, and takes the place of what was asked before: it is done whatever happens to any process. A
guest is always asked to power off and its power never cut, so `Force` and `SkipOsShutdown` change nothing; an instance
may be stopped whatever its root device is, which AWS allows for EBS only. What the hypervisor refuses at once is
logged, and the state stays.
"""

from collections.abc import Callable
from typing import NamedTuple

import structlog

from thrave.compute.errors import IncorrectInstanceState, InstanceCommandFailed, StateChangedError
from thrave.compute.instance import GONE, Instance, InstanceState
from thrave.ec2.actions.instances import own_instance, state_of
from thrave.ec2.door import Caller, Door
from thrave.ec2.errors import EC2Error
from thrave.ec2.protocol import Parameters, Result

log = structlog.get_logger()


class Change(NamedTuple):
    """What can be asked of an instance's power.

    Attributes:
        done: What it has been then, in a message.
        possible: From which states.
        becomes: The state that it leads to at once.
        settled: In which states nothing changes at once. It is asked all the same: something else may be under way.
        ask: Asks it of an instance on behalf of an account.
        while_bundled: Whether it can be asked while a bundle task has the instance.
    """

    done: str
    possible: frozenset[InstanceState]
    becomes: InstanceState
    settled: frozenset[InstanceState]
    ask: Callable[[Door, str, str], None]
    while_bundled: bool = False


_UP = frozenset({InstanceState.PENDING, InstanceState.RUNNING})
_OFF = frozenset({InstanceState.STOPPED})
_TERMINATED = frozenset({InstanceState.TERMINATED})

START = Change(
    "started", _OFF, InstanceState.PENDING, _UP, lambda door, instance_id, by: door.power.start(instance_id, by)
)
STOP = Change(
    "stopped",
    _UP | {InstanceState.STOPPING},
    InstanceState.STOPPING,
    _OFF,
    lambda door, instance_id, by: door.power.stop(instance_id, by),
    while_bundled=True,
)
# "Requests to reboot terminated instances are ignored": AWS, EC2 API Reference.
REBOOT = Change(
    "rebooted", _UP, InstanceState.RUNNING, GONE, lambda door, instance_id, by: door.power.reboot(instance_id, by)
)
TERMINATE = Change(
    "terminated",
    frozenset(InstanceState) - _TERMINATED,
    InstanceState.SHUTTING_DOWN,
    _TERMINATED,
    lambda door, instance_id, by: door.power.terminate(instance_id, by),
    while_bundled=True,
)


def start_instances(door: Door, caller: Caller, parameters: Parameters) -> Result:
    """Have instances started.

    Raises:
        EC2Error: As `_change`.
    """
    return {"StartingInstances": _change(door, caller, parameters, START)}


def stop_instances(door: Door, caller: Caller, parameters: Parameters) -> Result:
    """Have guests power off.

    Raises:
        EC2Error: UnsupportedOperation (Hibernate), and as `_change`.
    """
    if parameters.get("Hibernate"):
        raise EC2Error("UnsupportedOperation", what="Hibernating instances")
    return {"StoppingInstances": _change(door, caller, parameters, STOP)}


def reboot_instances(door: Door, caller: Caller, parameters: Parameters) -> Result:
    """Have guests power off and their instances started again.

    Raises:
        EC2Error: As `_change`.
    """
    _change(door, caller, parameters, REBOOT)
    return {}


def terminate_instances(door: Door, caller: Caller, parameters: Parameters) -> Result:
    """Have guests power off for good. A bundle task that has such an instance fails.

    Raises:
        EC2Error: As `_change`.
    """
    return {"TerminatingInstances": _change(door, caller, parameters, TERMINATE)}


def _change(door: Door, caller: Caller, parameters: Parameters, change: Change) -> list[Result]:
    """Ask a change of every instance that is named, once all have been checked.

    Raises:
        EC2Error: InvalidInstanceID.Malformed, InvalidInstanceID.NotFound, IncorrectInstanceState,
            OperationNotPermitted (there is no way to do it).
    """
    named = dict.fromkeys(parameters["InstanceIds"])
    instances = [own_instance(door, caller, instance_id) for instance_id in named]
    for instance in instances:
        _check(door, instance, change)
    return [_changed(door, caller, instance, change) for instance in instances]


def _check(door: Door, instance: Instance, change: Change) -> None:
    which = {"instance_id": instance.instance_id, "done": change.done}
    task = None if change.while_bundled else door.tasks.in_progress(instance.instance_id)
    if task is not None:
        raise EC2Error("IncorrectInstanceState", **which, why=f"it is being bundled by {task.bundle_id}")
    if instance.state not in change.possible | change.settled:
        raise EC2Error("IncorrectInstanceState", **which, why=f"it is {instance.state}")


def _changed(door: Door, caller: Caller, instance: Instance, change: Change) -> Result:
    before = after = instance.state
    if before not in GONE or change is TERMINATE:
        accepted = before not in _TERMINATED and _asked(door, caller, instance, change)
        after = change.becomes if accepted and before in change.possible else before
    return {"InstanceId": instance.instance_id, "PreviousState": state_of(before), "CurrentState": state_of(after)}


def _asked(door: Door, caller: Caller, instance: Instance, change: Change) -> bool:
    """Ask, and say whether it is recorded: unless the hypervisor has refused it at once."""
    instance_id = instance.instance_id
    try:
        change.ask(door, instance_id, caller.account_id)
    except StateChangedError as error:
        which = {"instance_id": instance_id, "done": change.done, "why": f"it is {error.state}"}
        raise EC2Error("IncorrectInstanceState", **which) from None
    except IncorrectInstanceState as error:
        raise EC2Error("OperationNotPermitted", reason=str(error)) from None
    except InstanceCommandFailed as error:
        log.warning("a hypervisor refuses", what=change.done, instance_id=instance_id, error=str(error))
        return False
    return True
