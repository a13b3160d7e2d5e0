"""DescribeRegions, DescribeAvailabilityZones, DescribeAccountAttributes and GetCallerIdentity."""

import re
import urllib.request
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ClientError

from thrave.ec2.actions import ACTIONS
from thrave.ec2.app import create_app

REGION = {"RegionName": "eu-west-9", "OptInStatus": "opt-in-not-required"}


def test_describe_regions_returns_one_region_with_the_called_endpoint(ec2, endpoint):
    assert ec2.describe_regions()["Regions"] == [{**REGION, "Endpoint": urlsplit(endpoint).netloc}]


def test_describe_availability_zones_returns_one_zone(ec2):
    assert ec2.describe_availability_zones(AllAvailabilityZones=True)["AvailabilityZones"] == [
        {
            **REGION,
            "State": "available",
            "Messages": [],
            "ZoneName": "eu-west-9a",
            "ZoneId": "eu-west-9-az1",
            "GroupName": "eu-west-9",
            "NetworkBorderGroup": "eu-west-9",
            "ZoneType": "availability-zone",
        }
    ]


@pytest.mark.parametrize(
    ("ask", "parameters", "found"),
    [
        ("regions", {"RegionNames": ["eu-west-9"]}, 1),
        ("regions", {"Filters": [{"Name": "region-name", "Values": ["eu-*"]}]}, 1),
        ("regions", {"Filters": [{"Name": "region-name", "Values": ["us-*"]}]}, 0),
        ("regions", {"Filters": [{"Name": "endpoint", "Values": ["127.0.0.1:*"]}]}, 1),
        ("regions", {"Filters": [{"Name": "opt-in-status", "Values": ["opted-in"]}]}, 0),
        ("availability_zones", {"ZoneNames": ["eu-west-9a"]}, 1),
        ("availability_zones", {"ZoneIds": ["eu-west-9-az1"]}, 1),
        ("availability_zones", {"Filters": [{"Name": "state", "Values": ["available"]}]}, 1),
        ("availability_zones", {"Filters": [{"Name": "zone-type", "Values": ["local-zone"]}]}, 0),
        ("availability_zones", {"Filters": [{"Name": "parent-zone-id", "Values": ["*"]}]}, 0),
    ],
)
def test_regions_and_zones_are_selected_by_name_and_filter(ec2, ask, parameters, found):
    response = getattr(ec2, f"describe_{ask}")(**parameters)
    response.pop("ResponseMetadata")
    assert [len(members) for members in response.values()] == [found]


@pytest.mark.parametrize(
    ("ask", "parameters"),
    [
        ("regions", {"RegionNames": ["us-east-1"]}),
        ("regions", {"Filters": [{"Name": "color", "Values": ["*"]}]}),
        ("availability_zones", {"ZoneNames": ["eu-west-9a", "eu-west-9b"]}),
        ("availability_zones", {"ZoneIds": ["use1-az1"]}),
        ("account_attributes", {"AttributeNames": ["shoe-size"]}),
    ],
)
def test_unknown_region_zone_or_attribute_is_refused(ec2, ask, parameters):
    with pytest.raises(ClientError) as refusal:
        getattr(ec2, f"describe_{ask}")(**parameters)
    assert refusal.value.response["Error"]["Code"] == "InvalidParameterValue"


def attributes(response):
    return {
        attribute["AttributeName"]: [value["AttributeValue"] for value in attribute["AttributeValues"]]
        for attribute in response["AccountAttributes"]
    }


def test_describe_account_attributes_returns_the_platform_without_vpc(ec2):
    platforms = {"supported-platforms": ["EC2"]}
    assert attributes(ec2.describe_account_attributes()) == platforms | {"default-vpc": ["none"]}
    assert attributes(ec2.describe_account_attributes(AttributeNames=["supported-platforms"])) == platforms


@pytest.mark.parametrize("ask", ["regions", "availability_zones", "account_attributes"])
def test_dry_run_reports_success(ec2, ask):
    with pytest.raises(ClientError) as refusal:
        getattr(ec2, f"describe_{ask}")(DryRun=True)
    assert refusal.value.response["Error"]["Code"] == "DryRunOperation"


@pytest.mark.parametrize("action", sorted(name for name, action in ACTIONS.items() if not action.no_permission_needed))
def test_every_action_checks_permission_first(service, current_app, client_of, action):
    asked = []
    client = client_of(service.key)
    current_app.app = create_app(replace(service.backend, is_allowed=lambda caller, name, resource: asked.append(name)))
    shape = ACTIONS[action].service.operation(action).input_shape
    required = {name: ["i-12345678"] if name.endswith("s") else "i-12345678" for name in shape.required_members}
    if action == "BundleInstance":
        names = ("AWSAccessKeyId", "Bucket", "Prefix", "UploadPolicy", "UploadPolicySignature")
        required["Storage"] = {"S3": dict.fromkeys(names, "x")}
    for options in ({}, {"DryRun": True}):
        with pytest.raises(ClientError) as refusal:
            getattr(client, "_".join(re.findall("[A-Z][a-z]+", action)).lower())(**required, **options)
        assert refusal.value.response["Error"]["Code"] == "UnauthorizedOperation"
    assert asked == [f"ec2:{action}"] * 2


def test_get_caller_identity_returns_root_for_an_account_key(service, client_of):
    account_id = service.key.account_id
    response = client_of(service.key, "sts").get_caller_identity()
    assert response.pop("ResponseMetadata")["RequestId"]
    assert response == {"UserId": account_id, "Account": account_id, "Arn": f"arn:aws:iam::{account_id}:root"}


def test_get_caller_identity_ignores_policies(service, current_app, client_of):
    sts = client_of(service.key, "sts")
    current_app.app = create_app(replace(service.backend, is_allowed=lambda caller, name, resource: False))
    assert sts.get_caller_identity()["Account"] == service.key.account_id


@pytest.mark.parametrize("change", [{"access_key_id": "AKIDNOBODY"}, {"secret_access_key": "x" * 40}])
def test_get_caller_identity_with_wrong_credentials_gets_the_error_of_sts(service, client_of, change):
    with pytest.raises(ClientError) as refusal:
        client_of(replace(service.key, **change), "sts").get_caller_identity()
    assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert refusal.value.response["Error"] == {
        "Type": "Sender",
        "Code": "InvalidClientTokenId",
        "Message": "The security token included in the request is invalid.",
    }


def test_get_caller_identity_works_as_a_presigned_url(service, client_of):
    url = client_of(service.key, "sts").generate_presigned_url("get_caller_identity", HttpMethod="GET")
    with urllib.request.urlopen(url, timeout=20) as response:
        assert f"<Account>{service.key.account_id}</Account>".encode() in response.read()
