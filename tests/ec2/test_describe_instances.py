"""DescribeInstances, through boto3."""

from datetime import UTC, datetime

import pytest
from botocore.exceptions import ClientError

from thrave.compute.instance import InstanceState, VolumeFile

LAUNCHED = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def three_instances(service, tmp_path):
    data = VolumeFile(path=tmp_path / "disk.raw", device_name="xvdb")
    service.add_instance(
        "i-0000000a", launch_time=LAUNCHED, volumes=(data,), tags={"team:cost": "7", "Name": "web & 1"}
    )
    tags = {"Name": "db", "empty": ""}
    service.add_instance("i-0000000b", platform=None, architecture="arm64", state=InstanceState.STOPPED, tags=tags)
    service.add_instance("i-0000000c", root_device_type="ebs", root_device_name="xvda")
    service.add_instance("i-0000000d", account_id="999999999999")


def ids(response):
    return [instance["InstanceId"] for reservation in response["Reservations"] for instance in reservation["Instances"]]


def test_describe_instances_returns_the_members_of_ec2(service, ec2, three_instances):
    (reservation,) = ec2.describe_instances(InstanceIds=["i-0000000a"])["Reservations"]
    assert reservation == {
        "ReservationId": "r-0000000a",
        "OwnerId": service.key.account_id,
        "Groups": [],
        "Instances": [
            {
                "InstanceId": "i-0000000a",
                "State": {"Code": 16, "Name": "running"},
                "LaunchTime": LAUNCHED,
                "Platform": "windows",
                "Architecture": "x86_64",
                "RootDeviceType": "instance-store",
                "RootDeviceName": "/dev/sda1",
                "BlockDeviceMappings": [{"DeviceName": "/dev/sda1"}, {"DeviceName": "xvdb"}],
                "Placement": {"AvailabilityZone": "eu-west-9a"},
                "Tags": [{"Key": "Name", "Value": "web & 1"}, {"Key": "team:cost", "Value": "7"}],
            }
        ],
    }


def test_describe_instances_returns_only_own_instances(ec2, client_of, service, three_instances):
    assert ids(ec2.describe_instances()) == ["i-0000000a", "i-0000000b", "i-0000000c"]
    assert client_of(service.another_key()).describe_instances()["Reservations"] == []


def test_describe_instances_omits_an_empty_tag_set(ec2, three_instances):
    (reservation,) = ec2.describe_instances(InstanceIds=["i-0000000c"])["Reservations"]
    assert "Tags" not in reservation["Instances"][0]


def test_describe_instances_omits_other_platforms(ec2, three_instances):
    (reservation,) = ec2.describe_instances(InstanceIds=["i-0000000b"])["Reservations"]
    assert "Platform" not in reservation["Instances"][0]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("architecture", "arm64", "b"),
        ("block-device-mapping.device-name", "xvdb", "a"),
        ("instance-id", "*[ac]", ""),
        ("instance-id", "*c", "c"),
        ("instance-state-code", "80", "b"),
        ("instance-state-name", "running", "ac"),
        ("launch-time", "2026-11-01T12:00:00.000Z", "a"),
        ("owner-id", "*", "abc"),
        ("owner-id", "999999999999", ""),
        ("platform", "windows", "ac"),
        ("platform", "*", "ac"),
        ("reservation-id", "r-0000000b", "b"),
        ("root-device-name", "xvda", "c"),
        ("root-device-type", "instance-store", "ab"),
        ("availability-zone", "eu-west-9?", "abc"),
        ("availability-zone", "eu-west-9b", ""),
        ("tag:Name", "*", "ab"),
        ("tag:Name", "web*", "a"),
        ("tag:name", "*", ""),
        ("tag:team:cost", "7", "a"),
        ("tag:empty", "", "b"),
        ("tag:empty", "x", ""),
        ("tag:", "*", ""),
        ("tag-key", "*", "ab"),
        ("tag-key", "e*", "b"),
        ("tag-key", "db", ""),
        ("instance-type", "*", ""),
    ],
)
def test_describe_instances_filters(ec2, three_instances, name, value, expected):
    response = ec2.describe_instances(Filters=[{"Name": name, "Values": [value]}])
    assert ids(response) == [f"i-0000000{letter}" for letter in expected]


@pytest.mark.parametrize(
    ("instance_ids", "code", "message"),
    [
        (["i-0000000a", "i-0000000e"], "InvalidInstanceID.NotFound", "The instance ID 'i-0000000e' does not exist"),
        (["i-0000000d"], "InvalidInstanceID.NotFound", "The instance ID 'i-0000000d' does not exist"),
        (["i-0000000a", "i-a"], "InvalidInstanceID.Malformed", 'Invalid id: "i-a" (expecting "i-...")'),
    ],
)
def test_describe_instances_rejects_unknown_ids(ec2, three_instances, instance_ids, code, message):
    with pytest.raises(ClientError) as refusal:
        ec2.describe_instances(InstanceIds=instance_ids)
    assert refusal.value.response["Error"] == {"Code": code, "Message": message}


def test_describe_instances_ignores_duplicate_ids(ec2, three_instances):
    assert ids(ec2.describe_instances(InstanceIds=["i-0000000a", "i-0000000a"])) == ["i-0000000a"]


@pytest.fixture
def twelve_instances(service):
    return [service.add_instance(f"i-{number:08x}") for number in range(12)]


def test_describe_instances_paginates(ec2, twelve_instances):
    pages = ec2.get_paginator("describe_instances").paginate(PaginationConfig={"PageSize": 5})
    assert [ids(page) for page in pages] == [twelve_instances[:5], twelve_instances[5:10], twelve_instances[10:]]


def test_describe_instances_last_full_page_has_no_token(ec2, twelve_instances):
    response = ec2.describe_instances(MaxResults=12)
    assert ids(response) == twelve_instances
    assert "NextToken" not in response


def test_describe_instances_filters_before_pagination(ec2, service, twelve_instances):
    service.add_instance("i-00000003a0000000a", platform=None)
    response = ec2.describe_instances(MaxResults=5, Filters=[{"Name": "platform", "Values": ["windows"]}])
    assert ids(response) == twelve_instances[:5]


def test_describe_instances_pages_are_stable_after_a_removal(ec2, service, twelve_instances):
    first = ec2.describe_instances(MaxResults=5)
    service.instances.remove(twelve_instances[4])
    assert ids(ec2.describe_instances(MaxResults=5, NextToken=first["NextToken"])) == twelve_instances[5:10]


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"MaxResults": 4}, "InvalidParameterValue"),
        ({"MaxResults": 1001}, "InvalidParameterValue"),
        ({"MaxResults": 5, "InstanceIds": ["i-00000000"]}, "InvalidParameterCombination"),
        ({"NextToken": "$"}, "InvalidPaginationToken"),
        ({"NextToken": "\N{LATIN SMALL LETTER E WITH ACUTE}"}, "InvalidPaginationToken"),
        ({"NextToken": "_w=="}, "InvalidPaginationToken"),
    ],
)
def test_describe_instances_rejects_invalid_page_parameters(ec2, parameters, code):
    with pytest.raises(ClientError) as refusal:
        ec2.describe_instances(**parameters)
    assert refusal.value.response["Error"]["Code"] == code
