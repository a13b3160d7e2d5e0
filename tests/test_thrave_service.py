"""ThraveService and its pytest fixtures: accounts, faults, and a clock that the test controls."""

import sys
from datetime import UTC, datetime, timedelta

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from support.bundles.open_check import opened_folder_sha256
from support.eventually import eventually
from thrave import programs
from thrave.testing import ServerError, upload_policy
from thrave.testing.command_pipe import CommandPipe
from thrave.testing.faults import FAULTS, new_fault

BUCKET = "my-bundles"
FILES = ["winami.manifest.json", "winami.manifest.xml", "winami.part.0"]
ONCE = Config(retries={"total_max_attempts": 1})
STATES = ["pending", "waiting-for-shutdown", "bundling", "storing", "complete"]


@pytest.fixture
def begin(thrave_account, thrave_instance):
    """Start a bundle task; return its id."""

    def begin(ec2, **changes):
        storage = thrave_account.storage(BUCKET, "winami", **changes)
        task = ec2.bundle_instance(InstanceId=thrave_instance.instance_id, Storage=storage)
        return task["BundleTask"]["BundleId"]

    return begin


def describe(ec2, bundle_id):
    return ec2.describe_bundle_tasks(BundleIds=[bundle_id])["BundleTasks"][0]


def power_state(ec2):
    return ec2.describe_instances()["Reservations"][0]["Instances"][0]["State"]["Name"]


def files(s3):
    """Return the keys in the bucket; a failed task removes a bucket that was created for it."""
    if not s3.list_buckets()["Buckets"]:
        return []
    return [entry["Key"] for entry in s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def test_bundle_opens_to_the_disk_of_the_instance(
    begin, thrave_account, thrave_ec2, thrave_s3, thrave_instance, tmp_path
):
    assert thrave_account.wait_for_end(begin(thrave_ec2)) == "complete"
    assert files(thrave_s3) == FILES
    for key in FILES:
        thrave_s3.download_file(BUCKET, key, str(tmp_path / key))
    output = tmp_path / "opened.raw"
    opened_folder_sha256(thrave_account.service, tmp_path, "winami", output)
    assert output.read_bytes() == thrave_instance.root_volume.path.read_bytes()


def test_clients_of_the_code_under_test_use_the_account(thrave_account):
    assert boto3.client("sts").get_caller_identity()["Account"] == thrave_account.account_id
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    assert [each["Name"] for each in thrave_account.client("s3").list_buckets()["Buckets"]] == [BUCKET]
    assert boto3.client("ec2").describe_bundle_tasks()["BundleTasks"] == []
    with pytest.raises(ClientError, match="InvalidAction"):
        boto3.client("iam", config=ONCE).list_users()


def test_accounts_see_nothing_of_each_other(begin, thrave_account, thrave_ec2):
    thrave_account.wait_for_end(begin(thrave_ec2))
    other = thrave_account.service.new_account()
    assert other.client("ec2").describe_bundle_tasks()["BundleTasks"] == []
    assert other.client("ec2").describe_instances()["Reservations"] == []
    assert other.client("s3").list_buckets()["Buckets"] == []
    instance = other.instance()
    with pytest.raises(ClientError, match="InaccessibleStorageLocation"):
        other.client("ec2").bundle_instance(InstanceId=instance.instance_id, Storage=other.storage(BUCKET, "other"))
    other.close()


def test_close_removes_tasks_instances_and_buckets(thrave_service):
    account = thrave_service.new_account()
    thrave_service.inject("task-waits", state="bundling")
    instance = account.instance()
    ec2, s3 = account.client("ec2"), account.client("s3")
    ec2.bundle_instance(InstanceId=instance.instance_id, Storage=account.storage(BUCKET, "winami"))
    account.close()
    assert ec2.describe_bundle_tasks()["BundleTasks"] == []
    assert ec2.describe_instances()["Reservations"] == []
    assert s3.list_buckets()["Buckets"] == []
    assert not instance.root_volume.path.exists()
    assert thrave_service.fault_counts() == {}


def test_next_test_finds_no_trace_of_bucket_and_prefix(thrave_service):
    for _ in range(2):
        account = thrave_service.new_account()
        storage = account.storage(BUCKET, "winami")
        task = account.client("ec2").bundle_instance(InstanceId=account.instance().instance_id, Storage=storage)
        account.wait_for_end(task["BundleTask"]["BundleId"])
        assert files(account.client("s3")) == FILES
        account.close()


class TestFaults:
    """One test for each row of the table."""

    @pytest.mark.thrave_fault("throttle", times=2)
    def test_throttle(self, begin, thrave_account, thrave_ec2):
        thrave_account.wait_for_end(begin(thrave_ec2))  # boto3 retries
        assert thrave_account.service.fault_counts() == {"throttle": 2}

    @pytest.mark.thrave_fault("request-error", code="ResourceLimitExceeded", action="BundleInstance")
    def test_request_error(self, begin, thrave_ec2):
        with pytest.raises(ClientError, match="ResourceLimitExceeded"):
            begin(thrave_ec2)
        assert thrave_ec2.describe_bundle_tasks()["BundleTasks"] == []

    @pytest.mark.thrave_fault("response-lost", action="BundleInstance")
    def test_response_lost(self, begin, thrave_account, thrave_ec2):
        with pytest.raises(ClientError, match="Unavailable"):
            begin(thrave_account.client("ec2", config=ONCE))
        (task,) = thrave_ec2.describe_bundle_tasks()["BundleTasks"]
        assert thrave_account.wait_for_end(task["BundleId"]) == "complete"

    @pytest.mark.thrave_fault("task-fails", code="Server.VolumeError", message="The disk is bad.", state="storing")
    def test_task_fails(self, begin, thrave_account, thrave_ec2, thrave_s3):
        bundle_id = begin(thrave_ec2)
        assert thrave_account.wait_for_end(bundle_id) == "failed"
        error = describe(thrave_ec2, bundle_id)["BundleTaskError"]
        assert error == {"Code": "Server.VolumeError", "Message": "The disk is bad."}
        assert power_state(thrave_ec2) == "running"
        assert files(thrave_s3) == []

    @pytest.mark.thrave_fault("task-waits", state="waiting-for-shutdown")
    def test_task_waits(self, begin, thrave_account, thrave_ec2):
        bundle_id = begin(thrave_ec2)
        thrave_ec2.cancel_bundle_task(BundleId=bundle_id)
        assert thrave_account.wait_for_end(bundle_id) == "failed"
        assert power_state(thrave_ec2) == "running"

    @pytest.mark.thrave_fault("store-refuses", object="manifest")
    def test_store_refuses(self, begin, thrave_account, thrave_ec2, thrave_s3):
        bundle_id = begin(thrave_ec2)
        assert thrave_account.wait_for_end(bundle_id) == "failed"
        error = describe(thrave_ec2, bundle_id)["BundleTaskError"]
        assert error == {"Code": "Client.S3Error", "Message": "AccessDenied(403)- Access Denied"}
        assert files(thrave_s3) == []

    @pytest.mark.thrave_fault("store-fails", object="part", times=2)
    def test_store_fails(self, begin, thrave_account, thrave_ec2):
        assert thrave_account.wait_for_end(begin(thrave_ec2)) == "complete"
        assert thrave_account.service.fault_counts() == {"store-fails": 2}

    @pytest.mark.thrave_fault("store-fails", object="part")
    def test_store_fails_for_too_long(self, begin, thrave_account, thrave_ec2):
        bundle_id = begin(thrave_ec2)
        assert thrave_account.wait_for_end(bundle_id) == "failed"
        assert describe(thrave_ec2, bundle_id)["BundleTaskError"]["Code"] == "Server.S3Error"

    @pytest.mark.thrave_fault("store-loses", object="part")
    def test_store_loses(self, begin, thrave_account, thrave_ec2):
        bundle_id = begin(thrave_ec2)
        assert thrave_account.wait_for_end(bundle_id) == "failed"
        assert describe(thrave_ec2, bundle_id)["BundleTaskError"]["Code"] == "Server.S3Error"

    @pytest.mark.thrave_fault("store-waits", object="manifest")
    def test_store_waits(self, begin, thrave_account, thrave_ec2, thrave_clock):
        bundle_id = begin(thrave_ec2)
        assert thrave_clock.advance(bundle_id, "storing") == "storing"
        thrave_account.service.reset()  # the upload fails when it ends, and is repeated
        assert thrave_account.wait_for_end(bundle_id) == "complete"

    @pytest.mark.thrave_fault("store-waits", object="part")
    def test_store_waits_while_the_task_is_cancelled(self, begin, thrave_account, thrave_ec2, thrave_s3):
        bundle_id = begin(thrave_ec2)
        counts = thrave_account.service.fault_counts
        eventually(lambda: counts() == {"store-waits": 1}, "the upload of a part has begun")
        thrave_ec2.cancel_bundle_task(BundleId=bundle_id)
        assert thrave_account.wait_for_end(bundle_id) == "failed"
        assert describe(thrave_ec2, bundle_id)["BundleTaskError"]["Code"] == "Client.Cancelled"
        assert files(thrave_s3) == []

    @pytest.mark.thrave_fault("store-refuses", after=2)
    def test_after_skips_calls(self, begin, thrave_account, thrave_ec2, thrave_clock, thrave_s3):
        bundle_id = begin(thrave_ec2)
        thrave_clock.advance(bundle_id, "storing")
        assert files(thrave_s3) == [FILES[2]]  # the first call; the second one is the side file
        assert thrave_clock.advance(bundle_id) == "failed"
        assert thrave_account.service.fault_counts() == {"store-refuses": 1}

    def test_every_fault_has_a_test(self):
        tested = {name.removeprefix("test_").replace("_", "-") for name in vars(type(self)) if name.startswith("test_")}
        assert set(FAULTS) <= tested


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("thottle", {}, "Unknown fault 'thottle'. Faults: throttle, "),
        ("throttle", {"time": 1}, "Fault 'throttle' has no option 'time'. Options: action, times."),
        ("throttle", {"times": "1"}, "Option 'times' of fault 'throttle' is '1', and must be a number, 0 or more."),
        ("throttle", {"times": -1}, "Option 'times' of fault 'throttle' is -1, and must be a number, 0 or more."),
        ("throttle", {"action": 1}, "Option 'action' of fault 'throttle' is 1, and must be text."),
        ("throttle", {"action": "BundleInstances"}, "Option 'action' of fault 'throttle' is 'BundleInstances'"),
        ("task-waits", {"state": "complete"}, "must be one of: pending, waiting-for-shutdown, bundling, storing."),
        ("task-fails", {"state": "pending"}, "must be one of: waiting-for-shutdown, bundling, storing."),
        (
            "task-fails",
            {"code": "Throttling"},
            "Option 'code' of fault 'task-fails' is 'Throttling', and must be one of",
        ),
        (
            "request-error",
            {"code": "Server.S3Error"},
            "of fault 'request-error' is 'Server.S3Error', and must be one of",
        ),
        ("store-fails", {"object": "bucket"}, "must be one of: part, manifest, side-file, any."),
    ],
)
def test_new_fault_refuses(name, options, message):
    with pytest.raises(ValueError, match=r"[Ff]ault") as raised:
        new_fault(name, options)
    assert message in str(raised.value)


def test_wrong_fault_is_refused_by_the_service(thrave_service):
    with pytest.raises(ValueError, match="Unknown fault"):
        thrave_service.inject("thottle")


def test_task_changes_state_only_when_the_test_says_so(begin, thrave_clock, thrave_ec2, thrave_s3):
    bundle_id, found = begin(thrave_ec2), []
    for state in STATES:
        if state != "pending":
            thrave_clock.tick(60)
            assert thrave_clock.advance(bundle_id) == state
        task = describe(thrave_ec2, bundle_id)
        minutes = (task["UpdateTime"] - task["StartTime"]) / timedelta(minutes=1)
        found.append((task["State"], minutes, power_state(thrave_ec2), len(files(thrave_s3))))
    assert found == [
        ("pending", 0, "running", 0),
        ("waiting-for-shutdown", 1, "running", 0),
        ("bundling", 2, "stopped", 0),
        ("storing", 3, "running", 1),
        ("complete", 4, "running", 3),
    ]
    assert describe(thrave_ec2, bundle_id)["StartTime"] == datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("state", STATES[:-1])
def test_task_is_cancelled_in_each_state(state, begin, thrave_clock, thrave_account, thrave_ec2, thrave_s3):
    bundle_id = begin(thrave_ec2)
    if state != "pending":
        thrave_clock.advance(bundle_id, state)
    thrave_ec2.cancel_bundle_task(BundleId=bundle_id)
    assert thrave_account.wait_for_end(bundle_id) == "failed"
    assert describe(thrave_ec2, bundle_id)["BundleTaskError"]["Code"] == "Client.Cancelled"
    assert power_state(thrave_ec2) == "running"
    assert files(thrave_s3) == []


def test_clock_decides_whether_an_upload_policy_has_expired(begin, thrave_account, thrave_clock, thrave_ec2):
    thrave_clock.set(datetime(2031, 1, 1))  # noqa: DTZ001 (a time without a zone is in UTC)
    assert thrave_clock.now == datetime(2031, 1, 1, tzinfo=UTC)
    with pytest.raises(ClientError, match="expired"):
        begin(thrave_ec2)
    policy, signature = upload_policy(thrave_account.key.secret_access_key, BUCKET, "winami", hours=24 * 365 * 10)
    bundle_id = begin(thrave_ec2, UploadPolicy=policy, UploadPolicySignature=signature)
    assert describe(thrave_ec2, bundle_id)["StartTime"] == thrave_clock.now


def test_advance_refuses_an_unknown_state(begin, thrave_clock, thrave_ec2):
    with pytest.raises(ValueError, match="sealed"):
        thrave_clock.advance(begin(thrave_ec2), "sealed")


def test_failed_service_is_reported_with_its_log():
    process = programs.start_server([sys.executable, "-c", ""], {}, stderr=2, has_input=True)
    with pytest.raises(ServerError, match=r"The test service has ended: disk full"):
        CommandPipe(process, lambda: "disk full").send("s3_url")
    process.communicate()
