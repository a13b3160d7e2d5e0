"""DescribeRegions, DescribeAvailabilityZones, DescribeAccountAttributes, and GetCallerIdentity of AWS STS.

There is one region, named by the setting `region`, and one availability zone in it. There is no VPC, so accounts have
the platform that EC2 had before VPCs.
"""

from collections.abc import Collection, Mapping, Sequence

from thrave.ec2.backend import Caller, Ec2Backend
from thrave.ec2.errors import EC2Error
from thrave.ec2.filters import FilterTable, select
from thrave.ec2.protocol import Parameters, Result


def get_caller_identity(_backend: Ec2Backend, caller: Caller, _parameters: Parameters) -> Result:
    """Return the caller's identity as in IAM: an account's own key is that of its root user."""
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

# AWS's response for an account that also has the old platform and no default VPC.
ATTRIBUTES: Mapping[str, Sequence[str]] = {"supported-platforms": ("EC2",), "default-vpc": ("none",)}


def describe_regions(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Describe the region. Its endpoint is the host of the request, since boto 2 connects to the endpoint.

    Raises:
        EC2Error: InvalidParameterValue (the name of another region), and the errors of `select`.
    """
    region = {"RegionName": backend.region, "Endpoint": caller.endpoint, "OptInStatus": "opt-in-not-required"}
    _check_names("RegionName", parameters.get("RegionNames", ()), {backend.region})
    return {"Regions": select([region], parameters.get("Filters", ()), REGION_FILTERS)}


def describe_availability_zones(backend: Ec2Backend, _caller: Caller, parameters: Parameters) -> Result:
    """Describe the availability zone.

    Raises:
        EC2Error: InvalidParameterValue (the name or id of another zone), and the errors of `select`.
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
    """Describe the account attributes that the request names; all by default.

    Raises:
        EC2Error: InvalidParameterValue (another attribute).
    """
    names = parameters.get("AttributeNames") or [*ATTRIBUTES]
    _check_names("AttributeName", names, ATTRIBUTES.keys())
    return {
        "AccountAttributes": [
            {"AttributeName": name, "AttributeValues": [{"AttributeValue": value} for value in ATTRIBUTES[name]]}
            for name in dict.fromkeys(names)
        ]
    }


def _check_names(parameter: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise EC2Error("InvalidParameterValue", name=parameter, value=name)
