"""Permissions of users on a real server, with boto3. The evaluation of policies is in tests/identity."""

import json
import time
from contextlib import closing

import pytest
import sqlalchemy as sa
from botocore.exceptions import ClientError

from support.disks.raw_disk import make_disk
from support.service.forked_server import ForkedServer
from thrave.database import open_engine, user_policy
from thrave.identity.accounts import Accounts
from thrave.identity.users import Users
from thrave.vault import Vault

BUNDLE_ID = "bun-0123456789abcdef0"
REMEMBERED = 1.0  # seconds that the server may go by a key that it has just looked up


def statement(effect, action, resource="*", **conditions):
    return {"Effect": effect, "Action": action, "Resource": resource, "Condition": conditions}


LOOK = statement("Allow", "ec2:Describe*")
ALL = statement("Allow", "*")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ForkedServer.running(tmp_path_factory.mktemp("permissions") / "data", region="eu-west-9") as server:
        yield server


@pytest.fixture(scope="module")
def database(server):
    engine = open_engine(server.data.database)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def acme(server):
    """An account, with its key."""
    return server.account("acme")


@pytest.fixture(scope="module")
def users(database):
    return Users(database)


@pytest.fixture
def bob(database, server, users, acme):
    """A user's key, and what gives the user other statements."""
    account_id, name = acme[0].account_id, f"bob-{time.monotonic_ns()}"
    user = users.create(account_id, name)
    key = Accounts(database, Vault.open_or_create(server.data.vault_key)).create_key(account_id, user)

    def allowed(*statements, policy="policy"):
        users.put_policy(account_id, name, policy, json.dumps({"Statement": [*statements]}))
        return key

    allowed.key = key
    allowed.name = name
    return allowed


def refusal_of(server, key, action="describe_bundle_tasks", header=None, **parameters):
    """Call; give the error's code and status, or None."""
    with closing(server.client(key)) as client:
        if header:
            client.meta.events.register("before-send.ec2", lambda request, **_: request.headers.update([header]))
        try:
            getattr(client, action)(**parameters)
        except ClientError as error:
            response = error.response
            return (
                response["Error"]["Code"],
                response["ResponseMetadata"]["HTTPStatusCode"],
                response["Error"]["Message"],
            )
    return None


UNAUTHORIZED = ("UnauthorizedOperation", 403, "You are not authorized to perform this operation.")
DRY_RUN = ("DryRunOperation", 412, "Request would have succeeded, but DryRun flag is set.")


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("action", "parameters"),
    [
        ("describe_bundle_tasks", {}),
        ("describe_instances", {}),
        ("cancel_bundle_task", {"BundleId": BUNDLE_ID}),
        ("terminate_instances", {"InstanceIds": ["i-0123456789abcdef0"]}),
    ],
)
def test_user_without_policies_is_denied_everything(server, bob, action, parameters, dry_run):
    assert refusal_of(server, bob.key, action, DryRun=dry_run, **parameters) == UNAUTHORIZED


def test_user_with_describe_permissions_can_only_describe(server, bob):
    key = bob(LOOK)
    assert refusal_of(server, key) is None
    assert refusal_of(server, key, "describe_instances", DryRun=True) == DRY_RUN
    assert refusal_of(server, key, "cancel_bundle_task", BundleId=BUNDLE_ID) == UNAUTHORIZED
    assert refusal_of(server, key, "cancel_bundle_task", BundleId=BUNDLE_ID, DryRun=True) == UNAUTHORIZED


def test_account_key_may_do_everything(server, acme, bob):
    bob(statement("Deny", "*"))
    assert refusal_of(server, acme[1]) is None
    assert refusal_of(server, acme[1], "cancel_bundle_task", BundleId=BUNDLE_ID)[0] == "InvalidBundleID.NotFound"


def test_deny_overrides_allow_of_another_policy(server, bob):
    bob(ALL, policy="allow")
    assert refusal_of(server, bob(statement("Deny", "ec2:describebundletasks"), policy="deny")) == UNAUTHORIZED
    assert refusal_of(server, bob.key, "describe_instances") is None


@pytest.mark.parametrize(
    ("statements", "header", "allowed"),
    [
        ([{**ALL, "Condition": {"IpAddress": {"aws:SourceIp": "127.0.0.0/8"}}}], None, True),
        ([{**ALL, "Condition": {"IpAddress": {"aws:SourceIp": "203.0.113.0/24"}}}], None, False),
        # Any client can send these headers.
        (
            [{**ALL, "Condition": {"IpAddress": {"aws:SourceIp": "203.0.113.0/24"}}}],
            ("X-Forwarded-For", "203.0.113.9"),
            False,
        ),
        ([ALL, statement("Deny", "*", Bool={"aws:SecureTransport": "false"})], None, False),
        (
            [ALL, statement("Deny", "*", Bool={"aws:SecureTransport": "false"})],
            ("X-Forwarded-Proto", "https"),
            False,
        ),
        # The region is the service's: the scope of a signature, us-east-1 here, is the client's own choice.
        ([{**ALL, "Condition": {"StringEquals": {"ec2:Region": "eu-west-9"}}}], None, True),
        ([{**ALL, "Condition": {"StringEquals": {"ec2:Region": "us-east-1"}}}], None, False),
        ([{**ALL, "Condition": {"DateGreaterThan": {"aws:CurrentTime": "2020-01-01"}}}], None, True),
        ([{**ALL, "Condition": {"DateLessThan": {"aws:CurrentTime": "2020-01-01"}}}], None, False),
    ],
)
def test_conditions_use_the_values_of_the_server(server, bob, statements, header, allowed):
    refusal = refusal_of(server, bob(*statements), header=header)
    assert refusal == (None if allowed else UNAUTHORIZED)


def test_policy_change_is_effective_within_a_second(server, bob):
    assert refusal_of(server, bob(LOOK)) is None
    bob(statement("Deny", "*"), policy="no-more")
    time.sleep(REMEMBERED)
    assert refusal_of(server, bob.key) == UNAUTHORIZED


def test_deleted_user_is_refused_within_a_second(server, bob, users, acme):
    assert refusal_of(server, bob(LOOK)) is None
    users.delete(acme[0].account_id, bob.name)
    time.sleep(REMEMBERED)
    assert refusal_of(server, bob.key)[:2] == ("AuthFailure", 401)


def test_damaged_policies_in_the_database_deny_everything(server, bob, database):
    key = bob(ALL)
    with database.begin() as connection:
        own = user_policy.c.user_id == key.user.user_id
        connection.execute(sa.update(user_policy).where(own).values(document="{}"))
    assert refusal_of(server, key) == UNAUTHORIZED


@pytest.fixture
def instance(server, acme, tmp_path):
    make_disk(tmp_path / "disk.raw", 1 << 20)
    return server.instance(acme[0].account_id, tmp_path / "disk.raw")


def test_user_can_bundle_only_with_put_object_permission(server, bob, instance):
    objects = statement("Allow", "s3:PutObject", "arn:aws:s3:::acme-bundles/win*")
    key = bob(LOOK, statement("Allow", "ec2:BundleInstance"), objects)

    def bundle(prefix):
        storage = server.storage(key, "acme-bundles", prefix)
        return refusal_of(server, key, "bundle_instance", InstanceId=instance.instance_id, Storage=storage)

    assert bundle("linux")[0] == "InvalidParameterValue"
    assert not (server.data.buckets / "acme-bundles").exists()
    assert bundle("winami") is None
    with closing(server.client(key)) as client:
        tasks = client.describe_bundle_tasks()["BundleTasks"]
        client.get_waiter("bundle_task_complete").wait(
            BundleIds=[tasks[-1]["BundleId"]], WaiterConfig={"Delay": 1, "MaxAttempts": 60}
        )


def test_user_without_put_object_cannot_sign_an_upload_policy(server, bob, tmp_path):
    other, others_key = server.account(f"other-{time.monotonic_ns()}")
    make_disk(tmp_path / "others.raw", 1 << 20)
    theirs = server.instance(other.account_id, tmp_path / "others.raw")
    storage = server.storage(bob(LOOK), "acmes-other-bundles", "winami")
    refusal = refusal_of(server, others_key, "bundle_instance", InstanceId=theirs.instance_id, Storage=storage)
    assert (refusal[0], "s3:PutObject" in refusal[2]) == ("InvalidParameterValue", True)
    assert not (server.data.buckets / "acmes-other-bundles").exists()
    assert server.instances.state(theirs.instance_id) == "running"


def test_get_caller_identity_needs_no_permission(server, bob, acme):
    import boto3

    key = bob(statement("Deny", "*"))
    secrets = {"aws_access_key_id": key.access_key_id, "aws_secret_access_key": key.secret_access_key}
    with closing(boto3.client("sts", "us-east-1", endpoint_url=server.url, **secrets)) as sts:
        response = sts.get_caller_identity()
    del response["ResponseMetadata"]
    account_id = acme[0].account_id
    arn = f"arn:aws:iam::{account_id}:user/{bob.name}"
    assert response == {"UserId": key.user.user_id, "Account": account_id, "Arn": arn}
