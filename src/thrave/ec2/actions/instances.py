"""Describing instances: as much of DescribeInstances as finds the instance to bundle.

An instance belongs to one account and nobody else can tell that it exists. Each is shown in a reservation of its own.
"""

import re
from collections.abc import Sequence
from functools import partial

from thrave.compute.errors import InstanceNotFound
from thrave.compute.instance import Instance, InstanceState, VolumeFile
from thrave.ec2.door import Caller, Door
from thrave.ec2.errors import EC2Error
from thrave.ec2.filters import FilterTable, instants, select
from thrave.ec2.paging import page
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


def describe_instances(door: Door, caller: Caller, parameters: Parameters) -> Result:
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


def own_instance(door: Door, caller: Caller, instance_id: str) -> Instance:
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


def _asked_for(door: Door, caller: Caller, instance_ids: Sequence[str]) -> Sequence[Instance]:
    if instance_ids:
        return [own_instance(door, caller, instance_id) for instance_id in sorted(set(instance_ids))]
    return door.instances.list(caller.account_id)


def _reservation(door: Door, instance: Instance) -> Result:
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
