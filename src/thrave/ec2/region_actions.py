"""GetCallerIdentity of AWS STS: whose access key signs. What many tools ask first of all.

Actions on where we are: DescribeRegions, DescribeAvailabilityZones, DescribeAccountAttributes.

There is one region, with the name that the operator gave it, and one availability zone in it. There is no VPC, so
accounts are on the platform that EC2 had before there were any.
"""

from collections.abc import Collection, Mapping, Sequence

from thrave.ec2.backend import Caller, Ec2Backend
from thrave.ec2.errors import EC2Error
from thrave.ec2.filters import FilterTable, select
from thrave.ec2.protocol import Parameters, Result


def get_caller_identity(_backend: Ec2Backend, caller: Caller, _parameters: Parameters) -> Result:
    """Tell callers who they are, in IAM's words: the account's own key is its root user's."""
    if caller.user is not None:
        return {"UserId": caller.user.user_id, "Account": caller.account_id, "Arn": caller.user.arn}
    return {"UserId": caller.account_id, "Account": caller.account_id, "Arn": f"arn:aws:iam::{caller.account_id}:root"}


REGION_FILTERS: FilterTable[Result] = {
    "endpoint": lambda region: [region["Endpoint"]],
    "opt-in-status": lambda region: [region["OptInStatus"]],
    "region-name": lambda region: [region["RegionName"]],
}


ZONE_FILTERS: FilterTable[Result] = {
    "group-name": lambda zone: [zone["GroupName"]],
    "message": lambda _zone: (),
    "opt-in-status": lambda zone: [zone["OptInStatus"]],
    "parent-zone-id": lambda _zone: (),
    "parent-zone-name": lambda _zone: (),
    "region-name": lambda zone: [zone["RegionName"]],
    "state": lambda zone: [zone["State"]],
    "zone-id": lambda zone: [zone["ZoneId"]],
    "zone-name": lambda zone: [zone["ZoneName"]],
    "zone-type": lambda zone: [zone["ZoneType"]],
}


# As AWS answers for an account that is not on VPC only and has no default VPC.
ATTRIBUTES: Mapping[str, Sequence[str]] = {"supported-platforms": ("EC2",), "default-vpc": ("none",)}


def describe_regions(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Describe the region. Its endpoint is the one that the caller has used: boto 2 connects to it.

    Raises:
        EC2Error: InvalidParameterValue (another region's name), and what filters raise.
    """
    region = {"RegionName": backend.region, "Endpoint": caller.endpoint, "OptInStatus": "opt-in-not-required"}
    _check_names("RegionName", parameters.get("RegionNames", ()), {backend.region})
    return {"Regions": select([region], parameters.get("Filters", ()), REGION_FILTERS)}


def describe_availability_zones(backend: Ec2Backend, _caller: Caller, parameters: Parameters) -> Result:
    """Describe the availability zone.

    Raises:
        EC2Error: InvalidParameterValue (another zone's name or id), and what filters raise.
    """
    zone_id = f"{backend.region}-az1"
    zone = {
        "State": "available",
        "OptInStatus": "opt-in-not-required",
        "Messages": [],
        "RegionName": backend.region,
        "ZoneName": backend.zone,
        "ZoneId": zone_id,
        "GroupName": backend.region,
        "NetworkBorderGroup": backend.region,
        "ZoneType": "availability-zone",
    }
    _check_names("ZoneName", parameters.get("ZoneNames", ()), {backend.zone})
    _check_names("ZoneId", parameters.get("ZoneIds", ()), {zone_id})
    return {"AvailabilityZones": select([zone], parameters.get("Filters", ()), ZONE_FILTERS)}


def describe_account_attributes(_backend: Ec2Backend, _caller: Caller, parameters: Parameters) -> Result:
    """Describe those attributes of an account that the model names.

    Raises:
        EC2Error: InvalidParameterValue (another attribute).
    """
    names = parameters.get("AttributeNames") or [*ATTRIBUTES]
    _check_names("AttributeName", names, ATTRIBUTES.keys())
    return {"AccountAttributes": [_attribute(name) for name in dict.fromkeys(names)]}


def _attribute(name: str) -> Result:
    return {"AttributeName": name, "AttributeValues": [{"AttributeValue": value} for value in ATTRIBUTES[name]]}


def _check_names(parameter: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise EC2Error("InvalidParameterValue", name=parameter, value=name)
