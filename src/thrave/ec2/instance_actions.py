"""Describing instances: as much of DescribeInstances as finds the instance to bundle.

An instance belongs to one account and nobody else can tell that it exists. Each is shown in a reservation of its own.

Actions on the power of instances: StartInstances, StopInstances, RebootInstances, TerminateInstances.

Each asks and does not wait: the answer says what the state was and which it is changing to, DescribeInstances says what
has become of it. All instances of a request are checked before anything is done to one. What is asked is recorded
before the answer is sent, and takes the place of what was asked before: it is done whatever happens to any process. A
guest is always asked to power off and its power never cut, so `Force` and `SkipOsShutdown` change nothing; an instance
may be stopped whatever its root device is, which AWS allows for EBS only. What the hypervisor refuses at once is
logged, and the state stays.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import structlog

from thrave.compute.errors import IncorrectInstanceState, InstanceCommandFailed, InstanceNotFound, StateChangedError
from thrave.compute.instance import GONE, Instance, InstanceState, VolumeFile
from thrave.ec2.backend import Caller, Ec2Backend
from thrave.ec2.errors import EC2Error
from thrave.ec2.filters import FilterTable, instants, page, select
from thrave.ec2.protocol import Parameters, Result

_INSTANCE_ID = re.compile(r"i-([0-9a-f]{8}|[0-9a-f]{17})")


# Filters of EC2's by what no instance here has; they let none through.
_WITHOUT = (
    "image-id", "instance-type", "instance-lifecycle", "key-name", "kernel-id", "ramdisk-id",
    "client-token", "dns-name", "private-dns-name", "ip-address", "private-ip-address", "subnet-id", "vpc-id",
    "group-id", "group-name", "instance.group-id", "instance.group-name", "iam-instance-profile.arn",
    "placement-group-name", "product-code", "reason", "requester-id", "spot-instance-request-id",
    "block-device-mapping.volume-id", "block-device-mapping.status",
)  # fmt: skip


FILTERS: FilterTable[Instance] = {
    **dict.fromkeys(_WITHOUT, lambda _instance: ()),
    "architecture": lambda instance: [instance.architecture],
    "block-device-mapping.device-name": lambda instance: [volume.device_name for volume in _volumes(instance)],
    "instance-id": lambda instance: [instance.instance_id],
    "instance-state-code": lambda instance: [str(instance.state.code)],
    "instance-state-name": lambda instance: [instance.state],
    "launch-time": lambda instance: instants(instance.launch_time),
    "owner-id": lambda instance: [instance.account_id],
    "platform": lambda instance: [instance.platform],
    "reservation-id": lambda instance: [_reservation_id(instance)],
    "root-device-name": lambda instance: [instance.root_device_name],
    "root-device-type": lambda instance: [instance.root_device_type],
    "tag-key": lambda instance: [*instance.tags],
    "tag:": lambda instance: instance.tags,
}


def describe_instances(door: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Describe the caller's instances, or those with the given ids, as far as the filters let them through.

    Raises:
        EC2Error: InvalidInstanceID.Malformed, InvalidInstanceID.NotFound, InvalidParameterCombination (ids with
            MaxResults), and what filters and pages raise.
    """
    instance_ids = parameters.get("InstanceIds", ())
    if instance_ids and "MaxResults" in parameters:
        raise EC2Error("InvalidParameterCombination", one="instancesSet", other="maxResults")
    chosen = select(
        _asked_for(door, caller, instance_ids),
        parameters.get("Filters", ()),
        {**FILTERS, "availability-zone": lambda _instance: [door.zone]},
        partial(door.charge, caller),
    )
    instances, next_token = page(chosen, parameters, lambda instance: instance.instance_id)
    return {"Reservations": [_reservation(door, instance) for instance in instances], "NextToken": next_token}


def state_of(state: InstanceState) -> Result:
    """Give a state as EC2 does, by number and by name."""
    return {"Code": state.code, "Name": state}


def check_instance_id(instance_id: str) -> None:
    """Check the syntax of an instance's id.

    Raises:
        EC2Error: InvalidInstanceID.Malformed.
    """
    if not _INSTANCE_ID.fullmatch(instance_id):
        raise EC2Error("InvalidInstanceID.Malformed", instance_id=instance_id)


def get_own_instance(door: Ec2Backend, caller: Caller, instance_id: str) -> Instance:
    """Return an instance of the caller's.

    Its owner is looked up in our record first: for nobody else a command of the instance is run or its hypervisor
    asked, so neither the answer nor the time tells a stranger that it exists.

    Raises:
        EC2Error: InvalidInstanceID.Malformed, or InvalidInstanceID.NotFound, whether it does not exist or belongs
            to somebody else.
        InstanceError: It is the caller's, and cannot be read.
    """
    check_instance_id(instance_id)
    try:
        owner = door.instances.owner_of(instance_id)
        instance = door.instances.get(instance_id) if owner == caller.account_id else None
    except InstanceNotFound:
        instance = None
    if instance is None or instance.account_id != caller.account_id:
        raise EC2Error("InvalidInstanceID.NotFound", instance_id=instance_id)
    return instance


def _asked_for(door: Ec2Backend, caller: Caller, instance_ids: Sequence[str]) -> Sequence[Instance]:
    if instance_ids:
        return [get_own_instance(door, caller, instance_id) for instance_id in sorted(set(instance_ids))]
    return door.instances.list(caller.account_id)


def _reservation(door: Ec2Backend, instance: Instance) -> Result:
    return {
        "ReservationId": _reservation_id(instance),
        "OwnerId": instance.account_id,
        "Groups": [],
        "Instances": [{**_instance(instance), "Placement": {"AvailabilityZone": door.zone}}],
    }


def _instance(instance: Instance) -> Result:
    return {
        "InstanceId": instance.instance_id,
        "State": state_of(instance.state),
        "LaunchTime": instance.launch_time,
        "Platform": instance.platform,
        "Architecture": instance.architecture,
        "RootDeviceType": instance.root_device_type,
        "RootDeviceName": instance.root_device_name,
        "BlockDeviceMappings": [{"DeviceName": volume.device_name} for volume in _volumes(instance)],
        "Tags": _tags(instance) or None,  # EC2 leaves the set out of an instance that has none
    }


def _tags(instance: Instance) -> Sequence[Result]:
    return [{"Key": key, "Value": value} for key, value in sorted(instance.tags.items())]


def _volumes(instance: Instance) -> Sequence[VolumeFile]:
    return (instance.root_volume, *instance.volumes)


def _reservation_id(instance: Instance) -> str:
    return "r-" + instance.instance_id.removeprefix("i-")


log = structlog.get_logger()


class PowerChange(NamedTuple):
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
    ask: Callable[[Ec2Backend, str, str], None]
    while_bundled: bool = False


_UP = frozenset({InstanceState.PENDING, InstanceState.RUNNING})


_OFF = frozenset({InstanceState.STOPPED})


_TERMINATED = frozenset({InstanceState.TERMINATED})


START = PowerChange(
    "started", _OFF, InstanceState.PENDING, _UP, lambda door, instance_id, by: door.power.start(instance_id, by)
)


STOP = PowerChange(
    "stopped",
    _UP | {InstanceState.STOPPING},
    InstanceState.STOPPING,
    _OFF,
    lambda door, instance_id, by: door.power.stop(instance_id, by),
    while_bundled=True,
)


# "Requests to reboot terminated instances are ignored": AWS, EC2 API Reference.
REBOOT = PowerChange(
    "rebooted", _UP, InstanceState.RUNNING, GONE, lambda door, instance_id, by: door.power.reboot(instance_id, by)
)


TERMINATE = PowerChange(
    "terminated",
    frozenset(InstanceState) - _TERMINATED,
    InstanceState.SHUTTING_DOWN,
    _TERMINATED,
    lambda door, instance_id, by: door.power.terminate(instance_id, by),
    while_bundled=True,
)


def start_instances(door: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Have instances started.

    Raises:
        EC2Error: As `_change`.
    """
    return {"StartingInstances": _change(door, caller, parameters, START)}


def stop_instances(door: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Have guests power off.

    Raises:
        EC2Error: UnsupportedOperation (Hibernate), and as `_change`.
    """
    if parameters.get("Hibernate"):
        raise EC2Error("UnsupportedOperation", what="Hibernating instances")
    return {"StoppingInstances": _change(door, caller, parameters, STOP)}


def reboot_instances(door: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Have guests power off and their instances started again.

    Raises:
        EC2Error: As `_change`.
    """
    _change(door, caller, parameters, REBOOT)
    return {}


def terminate_instances(door: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Have guests power off for good. A bundle task that has such an instance fails.

    Raises:
        EC2Error: As `_change`.
    """
    return {"TerminatingInstances": _change(door, caller, parameters, TERMINATE)}


def _change(door: Ec2Backend, caller: Caller, parameters: Parameters, change: PowerChange) -> list[Result]:
    """Ask a change of every instance that is named, once all have been checked.

    Raises:
        EC2Error: InvalidInstanceID.Malformed, InvalidInstanceID.NotFound, IncorrectInstanceState,
            OperationNotPermitted (there is no way to do it).
    """
    named = dict.fromkeys(parameters["InstanceIds"])
    instances = [get_own_instance(door, caller, instance_id) for instance_id in named]
    for instance in instances:
        _check(door, instance, change)
    return [_changed(door, caller, instance, change) for instance in instances]


def _check(door: Ec2Backend, instance: Instance, change: PowerChange) -> None:
    which = {"instance_id": instance.instance_id, "done": change.done}
    task = None if change.while_bundled else door.tasks.in_progress(instance.instance_id)
    if task is not None:
        raise EC2Error("IncorrectInstanceState", **which, why=f"it is being bundled by {task.bundle_id}")
    if instance.state not in change.possible | change.settled:
        raise EC2Error("IncorrectInstanceState", **which, why=f"it is {instance.state}")


def _changed(door: Ec2Backend, caller: Caller, instance: Instance, change: PowerChange) -> Result:
    before = after = instance.state
    if before not in GONE or change is TERMINATE:
        accepted = before not in _TERMINATED and _asked(door, caller, instance, change)
        after = change.becomes if accepted and before in change.possible else before
    return {"InstanceId": instance.instance_id, "PreviousState": state_of(before), "CurrentState": state_of(after)}


def _asked(door: Ec2Backend, caller: Caller, instance: Instance, change: PowerChange) -> bool:
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
