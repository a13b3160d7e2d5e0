"""Actions on instances: DescribeInstances; StartInstances, StopInstances, RebootInstances, TerminateInstances.

DescribeInstances has what clients need to find the instance to bundle. The power actions do not wait: the response has
the state before and the state that follows, and DescribeInstances has the result. The work is done in `PowerControl`.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import structlog

from thrave.compute.errors import IncorrectInstanceState, InstanceCommandFailed, InstanceNotFound, StateChangedError
from thrave.compute.instance import TERMINATING, Instance, InstanceState, VolumeFile
from thrave.ec2.backend import Caller, Ec2Backend
from thrave.ec2.errors import EC2Error
from thrave.ec2.filters import FilterTable, format_instant, page, select
from thrave.ec2.protocol import Parameters, Result

log = structlog.get_logger()

_INSTANCE_ID = re.compile(r"i-([0-9a-f]{8}|[0-9a-f]{17})")

# EC2's filters for attributes that no instance here has; they match none.
_ABSENT_ATTRIBUTES = (
    "image-id", "instance-type", "instance-lifecycle", "key-name", "kernel-id", "ramdisk-id",
    "client-token", "dns-name", "private-dns-name", "ip-address", "private-ip-address", "subnet-id", "vpc-id",
    "group-id", "group-name", "instance.group-id", "instance.group-name", "iam-instance-profile.arn",
    "placement-group-name", "product-code", "reason", "requester-id", "spot-instance-request-id",
    "block-device-mapping.volume-id", "block-device-mapping.status",
)  # fmt: skip

FILTERS: FilterTable[Instance] = {
    **dict.fromkeys(_ABSENT_ATTRIBUTES, lambda _instance: ()),
    "architecture": lambda instance: [instance.architecture],
    "block-device-mapping.device-name": lambda instance: [volume.device_name for volume in _volumes(instance)],
    "instance-id": lambda instance: [instance.instance_id],
    "instance-state-code": lambda instance: [str(instance.state.code)],
    "instance-state-name": lambda instance: [instance.state],
    "launch-time": lambda instance: format_instant(instance.launch_time),
    "owner-id": lambda instance: [instance.account_id],
    "platform": lambda instance: [instance.platform],
    "reservation-id": lambda instance: [_reservation_id(instance)],
    "root-device-name": lambda instance: [instance.root_device_name],
    "root-device-type": lambda instance: [instance.root_device_type],
    "tag-key": lambda instance: [*instance.tags],
    "tag:": lambda instance: instance.tags,
}


def describe_instances(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Describe the caller's instances, or those with the given ids, if they match the filters.

    Each instance has its own reservation.

    Raises:
        EC2Error: InvalidInstanceID.Malformed, InvalidInstanceID.NotFound, InvalidParameterCombination (ids with
            MaxResults), and the errors of `select` and `page`.
    """
    instance_ids = parameters.get("InstanceIds", ())
    if instance_ids and "MaxResults" in parameters:
        raise EC2Error("InvalidParameterCombination", one="instancesSet", other="maxResults")
    found: Sequence[Instance]
    if instance_ids:
        found = [get_own_instance(backend, caller, instance_id) for instance_id in sorted(set(instance_ids))]
    else:
        found = backend.instances.list(caller.account_id)
    selected = select(
        found,
        parameters.get("Filters", ()),
        {**FILTERS, "availability-zone": lambda _instance: [backend.zone]},
        partial(backend.charge, caller),
    )
    instances, next_token = page(selected, parameters, lambda instance: instance.instance_id)
    return {"Reservations": [_to_reservation(backend, instance) for instance in instances], "NextToken": next_token}


def check_instance_id(instance_id: str) -> None:
    """Check the syntax of an instance id.

    Raises:
        EC2Error: InvalidInstanceID.Malformed.
    """
    if not _INSTANCE_ID.fullmatch(instance_id):
        raise EC2Error("InvalidInstanceID.Malformed", instance_id=instance_id)


def get_own_instance(backend: Ec2Backend, caller: Caller, instance_id: str) -> Instance:
    """Return an instance that belongs to the caller.

    Raises:
        EC2Error: InvalidInstanceID.Malformed; InvalidInstanceID.NotFound if there is none or another account owns it.
        InstanceError: The instance belongs to the caller and cannot be read.
    """
    check_instance_id(instance_id)
    try:
        # The owner is read from our own records first. No command runs and no hypervisor is called for another account,
        # so neither response nor timing shows other accounts that the instance exists.
        owner = backend.instances.get_owner(instance_id)
        instance = backend.instances.get(instance_id) if owner == caller.account_id else None
    except InstanceNotFound:
        instance = None
    if instance is None or instance.account_id != caller.account_id:
        raise EC2Error("InvalidInstanceID.NotFound", instance_id=instance_id)
    return instance


def _to_reservation(backend: Ec2Backend, instance: Instance) -> Result:
    described = {
        "InstanceId": instance.instance_id,
        "State": _to_state(instance.state),
        "LaunchTime": instance.launch_time,
        "Platform": instance.platform,
        "Architecture": instance.architecture,
        "RootDeviceType": instance.root_device_type,
        "RootDeviceName": instance.root_device_name,
        "BlockDeviceMappings": [{"DeviceName": volume.device_name} for volume in _volumes(instance)],
        # EC2's response has no tag set if there are no tags.
        "Tags": [{"Key": key, "Value": value} for key, value in sorted(instance.tags.items())] or None,
        "Placement": {"AvailabilityZone": backend.zone},
    }
    return {
        "ReservationId": _reservation_id(instance),
        "OwnerId": instance.account_id,
        "Groups": [],
        "Instances": [described],
    }


def _to_state(state: InstanceState) -> Result:
    return {"Code": state.code, "Name": state}


def _volumes(instance: Instance) -> Sequence[VolumeFile]:
    return (instance.root_volume, *instance.volumes)


def _reservation_id(instance: Instance) -> str:
    return "r-" + instance.instance_id.removeprefix("i-")


class PowerChange(NamedTuple):
    """An action on an instance's power.

    Attributes:
        participle: The action in a message: the instance "can be stopped".
        start_states: States in which the action changes the state at once.
        next_state: The state that follows at once.
        final_states: States in which the action changes nothing at once. It is requested anyway, since another power
            request may be in progress.
        request: Requests the action for an instance on behalf of an account.
        is_allowed_while_bundling: Whether it may be requested while a bundle task uses the instance.
    """

    participle: str
    start_states: frozenset[InstanceState]
    next_state: InstanceState
    final_states: frozenset[InstanceState]
    request: Callable[[Ec2Backend, str, str], None]
    is_allowed_while_bundling: bool = False


_ON = frozenset({InstanceState.PENDING, InstanceState.RUNNING})
_OFF = frozenset({InstanceState.STOPPED})
_TERMINATED = frozenset({InstanceState.TERMINATED})

# A guest is always asked to power off, and its power is never cut, so `Force` and `SkipOsShutdown` change nothing.
# An instance with any root device may be stopped; AWS allows it for EBS only.

START = PowerChange(
    "started", _OFF, InstanceState.PENDING, _ON, lambda backend, instance_id, by: backend.power.start(instance_id, by)
)
STOP = PowerChange(
    "stopped",
    _ON | {InstanceState.STOPPING},
    InstanceState.STOPPING,
    _OFF,
    lambda backend, instance_id, by: backend.power.stop(instance_id, by),
    is_allowed_while_bundling=True,
)
# "Requests to reboot terminated instances are ignored": AWS, EC2 API Reference.
REBOOT = PowerChange(
    "rebooted",
    _ON,
    InstanceState.RUNNING,
    TERMINATING,
    lambda backend, instance_id, by: backend.power.reboot(instance_id, by),
)
TERMINATE = PowerChange(
    "terminated",
    frozenset(InstanceState) - _TERMINATED,
    InstanceState.SHUTTING_DOWN,
    _TERMINATED,
    lambda backend, instance_id, by: backend.power.terminate(instance_id, by),
    is_allowed_while_bundling=True,
)


def start_instances(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Start instances in the background.

    Raises:
        EC2Error: As `_change_power`.
    """
    return {"StartingInstances": _change_power(backend, caller, parameters, START)}


def stop_instances(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Ask guests to power off.

    Raises:
        EC2Error: UnsupportedOperation (Hibernate), and as `_change_power`.
    """
    if parameters.get("Hibernate"):
        raise EC2Error("UnsupportedOperation", operation="Hibernating instances")
    return {"StoppingInstances": _change_power(backend, caller, parameters, STOP)}


def reboot_instances(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Ask guests to power off, then start their instances again.

    Raises:
        EC2Error: As `_change_power`.
    """
    _change_power(backend, caller, parameters, REBOOT)
    return {}


def terminate_instances(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Ask guests to power off, and never start their instances again. Bundle tasks of these instances fail.

    Raises:
        EC2Error: As `_change_power`.
    """
    return {"TerminatingInstances": _change_power(backend, caller, parameters, TERMINATE)}


def _change_power(backend: Ec2Backend, caller: Caller, parameters: Parameters, change: PowerChange) -> list[Result]:
    """Check all instances of a request, then request the change of each.

    The request is recorded before the response is sent, and replaces an earlier one. It is carried out even if a
    process crashes.

    Raises:
        EC2Error: InvalidInstanceID.Malformed, InvalidInstanceID.NotFound, IncorrectInstanceState,
            OperationNotPermitted (the instance has no command for the change).
    """
    instance_ids = dict.fromkeys(parameters["InstanceIds"])
    instances = [get_own_instance(backend, caller, instance_id) for instance_id in instance_ids]
    for instance in instances:
        _check_change(backend, instance, change)
    return [_request_change(backend, caller, instance, change) for instance in instances]


def _check_change(backend: Ec2Backend, instance: Instance, change: PowerChange) -> None:
    task = None if change.is_allowed_while_bundling else backend.tasks.in_progress(instance.instance_id)
    if task is not None:
        raise _state_error(instance, change, f"it is being bundled by {task.bundle_id}")
    if instance.state not in change.start_states | change.final_states:
        raise _state_error(instance, change, f"it is {instance.state}")


def _request_change(backend: Ec2Backend, caller: Caller, instance: Instance, change: PowerChange) -> Result:
    """Request the change of one instance; return the state before and the state that follows.

    If the hypervisor refuses at once, the refusal is logged and the state does not change.
    """
    before = after = instance.state
    is_ignored = before in _TERMINATED or (before in TERMINATING and change is not TERMINATE)
    if not is_ignored:
        try:
            change.request(backend, instance.instance_id, caller.account_id)
        except StateChangedError as error:
            raise _state_error(instance, change, f"it is {error.state}") from None
        except IncorrectInstanceState as error:
            raise EC2Error("OperationNotPermitted", reason=str(error)) from None
        except InstanceCommandFailed as error:
            log.warning(
                "hypervisor refuses power request",
                request=change.participle,
                instance_id=instance.instance_id,
                error=str(error),
            )
        else:
            after = change.next_state if before in change.start_states else before
    return {"InstanceId": instance.instance_id, "PreviousState": _to_state(before), "CurrentState": _to_state(after)}


def _state_error(instance: Instance, change: PowerChange, reason: str) -> EC2Error:
    return EC2Error("IncorrectInstanceState", instance_id=instance.instance_id, change=change.participle, reason=reason)
