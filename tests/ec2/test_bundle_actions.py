"""BundleInstance, DescribeBundleTasks and CancelBundleTask, through unmodified boto3."""

import base64
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from botocore.exceptions import ClientError

from support.buckets.s3_storage import policy, signature, storage
from thrave.compute.instance import InstanceState
from thrave.ec2.app import create_app
from thrave.tasks.bundle_location import MIN_MANIFEST_SIZE
from thrave.tasks.errors import BundlingInProgress, PrefixInUse, TaskFailure
from thrave.tasks.models import BundleTaskState

INSTANCE = "i-1234567890abcdef0"


def refusal(call, **parameters):
    """The status, code and message that a call is refused with."""
    with pytest.raises(ClientError) as error:
        call(**parameters)
    response = error.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"], response["Error"]["Message"]


def bundle(ec2, key, instance_id=INSTANCE, **details):
    return ec2.bundle_instance(InstanceId=instance_id, Storage=storage(key, **details))["BundleTask"]


@pytest.fixture
def windows(service):
    return service.add_instance(INSTANCE)


@pytest.mark.parametrize("instance_id", ["i-12345678", INSTANCE])
@pytest.mark.parametrize("state", [InstanceState.RUNNING, InstanceState.STOPPED])
def test_bundle_instance_creates_a_task_without_secrets(service, ec2, instance_id, state):
    service.add_instance(instance_id, state=state)
    task = bundle(ec2, service.key, instance_id)
    assert re.fullmatch("bun-[0-9a-f]{17}", task["BundleId"])
    assert abs(datetime.now(UTC) - task["StartTime"]) < timedelta(minutes=1)
    assert task == {
        "BundleId": task["BundleId"],
        "InstanceId": instance_id,
        "State": "pending",
        "StartTime": task["StartTime"],
        "UpdateTime": task["UpdateTime"],
        "Storage": {"S3": {"Bucket": "my-bucket", "Prefix": "winami"}},
    }
    assert ec2.describe_bundle_tasks()["BundleTasks"] == [task]


def test_bundle_instance_creates_a_missing_bucket_for_its_owner(service, ec2, windows):
    bundle(ec2, service.key)
    assert service.backend.buckets.owner("my-bucket") == service.key.account_id


@pytest.mark.parametrize("was_there", [False, True])
def test_bundle_instance_removes_the_created_bucket_after_a_refusal(service, ec2, windows, monkeypatch, was_there):
    """The instance gets a task from another caller while the bucket is claimed."""
    if was_there:
        service.backend.buckets.create("my-bucket", service.key.account_id)

    def refuse(_request):
        raise BundlingInProgress("bun-1")

    monkeypatch.setattr(service.backend.tasks, "create", refuse)
    _, code, _ = refusal(bundle, ec2=ec2, key=service.key)
    assert code == "BundlingInProgress"
    assert service.backend.buckets.owner("my-bucket") == (service.key.account_id if was_there else None)


def test_bundle_instance_accepts_a_bucket_of_the_policys_signer(service, ec2, windows):
    friend = service.another_key("friend")
    service.backend.buckets.create("my-bucket", friend.account_id)
    bundle(ec2, friend)
    assert service.backend.buckets.owner("my-bucket") == friend.account_id


def test_bundle_instance_keeps_existing_objects(service, ec2, windows):
    # ElasticFox writes a probe object of the manifest's name before it calls.
    service.backend.buckets.create("my-bucket", service.key.account_id)
    service.backend.buckets.put("my-bucket", "winami.manifest.xml", b"elasticfox-write-test")
    bundle(ec2, service.key)
    assert service.backend.buckets.get("my-bucket", "winami.manifest.xml") == b"elasticfox-write-test"


def test_bundle_instance_rejects_prefix_that_has_a_manifest(service, ec2, windows):
    service.backend.buckets.create("my-bucket", service.key.account_id)
    service.backend.buckets.put("my-bucket", "winami.manifest.xml", b"x" * MIN_MANIFEST_SIZE)
    for parameters in ({}, {"DryRun": True}):
        call = partial(ec2.bundle_instance, InstanceId=INSTANCE, Storage=storage(service.key), **parameters)
        status, code, message = refusal(call)
        assert (status, code) == (400, "InvalidParameterValue")
        assert message.startswith("Bucket prefix in use my-bucket/winami: the bucket has the bundle")
        assert "thrave delete s3://my-bucket/winami.manifest.xml" in message
    assert ec2.describe_bundle_tasks()["BundleTasks"] == []


def test_bundle_instance_accepts_prefix_that_has_a_manifest_to_replace(service, current_app, ec2, windows):
    service.backend.buckets.create("my-bucket", service.key.account_id)
    service.backend.buckets.put("my-bucket", "winami.manifest.xml", b"x" * MIN_MANIFEST_SIZE)
    current_app.app = create_app(replace(service.backend, existing_bundle="replace"))
    assert bundle(ec2, service.key)["State"] == "pending"


def test_bundle_instance_rejects_prefix_of_an_unfinished_task(service, ec2, windows):
    """The error names the other task to its owner only."""
    other = service.add_instance("i-12345678")
    first = bundle(ec2, service.key)["BundleId"]
    status, code, message = refusal(bundle, ec2=ec2, key=service.key, instance_id=other)
    assert (status, code) == (400, "InvalidParameterValue")
    assert message.startswith(f"Bucket prefix in use my-bucket/winami: your bundle task {first} is storing a bundle")
    with pytest.raises(PrefixInUse) as error:
        service.backend.tasks.check_location("222222222222", "i-1", "my-bucket", "winami")
    assert "another bundle task is storing" in str(error.value)
    assert first not in str(error.value)
    bundle(ec2, service.key, other, prefix="winami2")


def test_bundle_instance_accepts_one_of_concurrent_requests_for_a_prefix(service, ec2):
    instances = [service.add_instance(f"i-{number:08x}") for number in range(8)]
    with ThreadPoolExecutor(len(instances)) as threads:
        responses = [threads.submit(bundle, ec2, service.key, instance) for instance in instances]
    errors = [error for error in (response.exception() for response in responses) if error is not None]
    assert len(errors) == len(instances) - 1
    assert {error.response["Error"]["Code"] for error in errors} == {"InvalidParameterValue"}
    assert len(ec2.describe_bundle_tasks()["BundleTasks"]) == 1


def encoded(document):
    return base64.b64encode(document)


@pytest.mark.parametrize(
    "signed_text",
    [lambda document: encoded(encoded(document)), encoded],
    ids=["the outer text, as AWS CLI 1 signs", "the inner text, as a user of boto3 signs"],
)
def test_bundle_instance_accepts_a_policy_that_was_encoded_twice(service, ec2, windows, signed_text):
    text = signature(signed_text(policy()), service.key.secret_access_key)
    given = storage(service.key, document=encoded(policy()), UploadPolicySignature=text)
    document = given["S3"]["UploadPolicy"]
    given["S3"]["UploadPolicySignature"] = signature(
        encoded(document) if signed_text is not encoded else document, service.key.secret_access_key
    )
    assert ec2.bundle_instance(InstanceId=INSTANCE, Storage=given)["BundleTask"]["State"] == "pending"


@pytest.mark.parametrize("name", ["AWSAccessKeyId", "Bucket", "Prefix", "UploadPolicy", "UploadPolicySignature"])
def test_bundle_instance_requires_every_member_of_storage(service, ec2, windows, name):
    expected = (400, "MissingParameter", f"The request must contain the parameter Storage.S3.{name}")
    for value in (None, b"" if name == "UploadPolicy" else ""):
        given = storage(service.key, **{name: value})
        assert refusal(ec2.bundle_instance, InstanceId=INSTANCE, Storage=given) == expected
        assert refusal(ec2.bundle_instance, InstanceId=INSTANCE, Storage=given, DryRun=True) == expected


@pytest.mark.parametrize("given", [{}, {"S3": {}}])
def test_bundle_instance_reports_an_empty_storage_as_missing(ec2, windows, given):
    expected = (400, "MissingParameter", "The request must contain the parameter Storage")
    assert refusal(ec2.bundle_instance, InstanceId=INSTANCE, Storage=given) == expected


@pytest.mark.parametrize(
    "instance_id", ["i-1234567", "i-123456789", "I-12345678", "i-1234567g", "i-12345678\n", "bun-12345678", "", "../x"]
)
def test_bundle_instance_rejects_malformed_instance_id(service, ec2, instance_id):
    expected = (400, "InvalidInstanceID.Malformed", f'Invalid id: "{instance_id}" (expecting "i-...")')
    assert refusal(ec2.bundle_instance, InstanceId=instance_id, Storage=storage(service.key)) == expected


@pytest.mark.parametrize("name", ["Bucket", "Prefix"])
@pytest.mark.parametrize("value", ["ab_Cd!", "..", "../x", "x;touch y", "-rf", ".hidden", "日本", 'a"b'])
def test_bundle_instance_rejects_invalid_bucket_or_prefix(service, ec2, windows, name, value):
    given = storage(service.key, **{name: value})
    status, code, message = refusal(ec2.bundle_instance, InstanceId=INSTANCE, Storage=given)
    assert (status, code) == (400, "InvalidParameterValue")
    assert message.startswith(f"Value ({value}) for parameter {name} is invalid. ")


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"account_id": "999999999999"}, "InvalidInstanceID.NotFound"),
        ({"platform": None}, "InvalidInstanceType"),
        ({"root_device_type": "ebs"}, "InvalidInstanceType"),
        ({"state": InstanceState.PENDING}, "IncorrectInstanceState"),
        ({"state": InstanceState.STOPPING}, "IncorrectInstanceState"),
        ({"state": InstanceState.SHUTTING_DOWN}, "IncorrectInstanceState"),
        ({"state": InstanceState.TERMINATED}, "IncorrectInstanceState"),
    ],
)
def test_bundle_instance_rejects_instance_that_cannot_be_bundled(service, ec2, facts, code):
    service.add_instance(INSTANCE, **facts)
    assert refusal(bundle, ec2=ec2, key=service.key)[:2] == (400, code)
    assert service.backend.buckets.owner("my-bucket") is None


def test_bundle_instance_hides_instances_of_other_accounts(service, client_of, windows):
    other = service.another_key()
    theirs, none = (
        refusal(bundle, ec2=client_of(other), key=other, instance_id=instance_id)
        for instance_id in (INSTANCE, "i-00000000")
    )
    assert theirs[2] == f"The instance ID '{INSTANCE}' does not exist"
    assert none == (theirs[0], theirs[1], theirs[2].replace(INSTANCE, "i-00000000"))


def test_bundle_instance_any_platform_setting_excludes_ebs(service, ec2, current_app):
    service.add_instance(INSTANCE, platform=None)
    service.add_instance("i-12345678", platform=None, root_device_type="ebs")
    current_app.app = create_app(replace(service.backend, any_platform=True))
    assert bundle(ec2, service.key)["State"] == "pending"
    assert refusal(bundle, ec2=ec2, key=service.key, instance_id="i-12345678")[1] == "InvalidInstanceType"


def test_bundle_instance_names_the_task_in_progress_also_when_the_instance_is_stopped(service, ec2, windows):
    task = bundle(ec2, service.key)
    expected = (400, "BundlingInProgress", f"Instance is already being bundled: {task['BundleId']}")
    assert refusal(bundle, ec2=ec2, key=service.key) == expected
    service.records.change_state(task["BundleId"], BundleTaskState.WAITING_FOR_SHUTDOWN)
    service.instances.request_stop(INSTANCE)
    assert refusal(bundle, ec2=ec2, key=service.key) == expected


def test_bundle_instance_creates_one_task_for_fifty_simultaneous_calls(service, ec2, windows):
    def call(_):
        try:
            return bundle(ec2, service.key)["BundleId"]
        except ClientError as error:
            return error.response["Error"]["Message"]

    with ThreadPoolExecutor(10) as pool:
        responses = set(pool.map(call, range(50)))
    (task,) = ec2.describe_bundle_tasks()["BundleTasks"]
    assert responses == {task["BundleId"], f"Instance is already being bundled: {task['BundleId']}"}


NOT_SIGNED = (
    "Value for UploadPolicySignature is invalid. No active access key with the id {} (AWSAccessKeyId) has signed this "
    "UploadPolicy."
)
POLICY_INVALID = "Value for UploadPolicy is invalid. "
POLICY_FAILED = f"{POLICY_INVALID}Invalid according to Policy: Policy Condition failed: "


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"AWSAccessKeyId": "AKIDNOBODY"}, NOT_SIGNED.format("AKIDNOBODY")),
        ({"UploadPolicySignature": "c2ln"}, NOT_SIGNED),
        ({"UploadPolicySignature": "é"}, NOT_SIGNED),
        ({"UploadPolicy": policy(life=timedelta(hours=25))}, NOT_SIGNED),
        ({"document": b"x" * 3073}, "Value for parameter UploadPolicy is invalid (too long)"),
        ({"document": b"[]"}, f"{POLICY_INVALID}Invalid Policy: Invalid JSON."),
        ({"document": policy(life=timedelta(-1))}, f"{POLICY_INVALID}Invalid according to Policy: Policy expired."),
        ({"document": policy(bucket="another")}, f'{POLICY_FAILED}["eq", "$bucket", "another"]'),
        ({"document": policy(prefix="linami")}, f'{POLICY_FAILED}["starts-with", "$key", "linami"]'),
        (
            {"document": policy(conditions=[["eq", "$key", "winami.part.0"]])},
            f'{POLICY_FAILED}["eq", "$key", "winami.part.0"]',
        ),
    ],
)
def test_bundle_instance_rejects_invalid_upload_policy_and_changes_nothing(service, ec2, windows, details, message):
    message = message.format(service.key.access_key_id) if message is NOT_SIGNED else message
    assert refusal(bundle, ec2=ec2, key=service.key, **details) == (400, "InvalidParameterValue", message)
    dry = {"InstanceId": INSTANCE, "Storage": storage(service.key, **details), "DryRun": True}
    assert refusal(ec2.bundle_instance, **dry) == (400, "InvalidParameterValue", message)
    assert service.backend.buckets.owner("my-bucket") is None
    assert ec2.describe_bundle_tasks()["BundleTasks"] == []


def test_bundle_instance_rejects_bucket_of_another_account(service, ec2, windows):
    other = service.another_key()
    service.backend.buckets.create("my-bucket", other.account_id)
    expected = f"The bucket 'my-bucket' belongs to another account than the access key '{service.key.access_key_id}'."
    assert refusal(bundle, ec2=ec2, key=service.key) == (400, "InaccessibleStorageLocation", expected)
    assert list(service.backend.buckets.list("my-bucket", "")) == []
    assert ec2.describe_bundle_tasks()["BundleTasks"] == []


def test_bundle_instance_makes_its_checks_in_order(service, ec2, client_of):
    """Each call corrects the error for which the call before was refused; all later errors remain."""
    other = service.another_key()
    service.add_instance("i-00000001", account_id=other.account_id)
    service.add_instance("i-00000002", platform=None, state=InstanceState.PENDING)
    service.add_instance("i-00000003", state=InstanceState.PENDING)
    service.add_instance("i-00000004")
    service.backend.buckets.create("my-bucket", other.account_id)
    forged = storage(service.key, UploadPolicySignature="c2ln")
    calls = [
        (client_of(replace(service.key, secret_access_key="x")), "i-x", {}, True, "AuthFailure"),
        (ec2, "i-x", {}, True, "MissingParameter"),
        (ec2, "i-x", forged, True, "InvalidInstanceID.Malformed"),
        (ec2, "i-x", forged, False, "InvalidInstanceID.Malformed"),
        (ec2, "i-00000001", storage(service.key, Bucket="."), False, "InvalidParameterValue"),
        (ec2, "i-00000001", forged, False, "InvalidInstanceID.NotFound"),
        (ec2, "i-00000002", forged, False, "InvalidInstanceType"),
        (ec2, "i-00000003", forged, False, "IncorrectInstanceState"),
        (ec2, "i-00000004", forged, False, "InvalidParameterValue"),
        (ec2, "i-00000004", storage(service.key), False, "InaccessibleStorageLocation"),
    ]
    for client, instance_id, given, dry, code in calls:
        assert refusal(client.bundle_instance, InstanceId=instance_id, Storage=given, DryRun=dry)[1] == code
        if client is ec2:
            assert refusal(ec2.bundle_instance, InstanceId=instance_id, Storage=given, DryRun=True)[1] == code


def test_dry_run_of_every_action_changes_nothing(service, ec2, windows):
    calls = [
        (ec2.bundle_instance, {"InstanceId": INSTANCE, "Storage": storage(service.key)}),
        (ec2.describe_bundle_tasks, {}),
        (ec2.cancel_bundle_task, {"BundleId": "bun-12345678"}),
        (ec2.describe_instances, {}),
    ]
    for call, parameters in calls:
        expected = (412, "DryRunOperation", "Request would have succeeded, but DryRun flag is set.")
        assert refusal(call, **parameters, DryRun=True) == expected
    assert ec2.describe_bundle_tasks()["BundleTasks"] == []
    assert service.backend.buckets.owner("my-bucket") is None


def test_describe_bundle_tasks_shows_progress_and_the_error_of_failed_tasks(service, ec2, windows):
    def shown():
        (task,) = ec2.describe_bundle_tasks(BundleIds=[bundle_id])["BundleTasks"]
        return task["State"], task.get("Progress"), task.get("BundleTaskError")

    bundle_id = bundle(ec2, service.key)["BundleId"]
    assert shown() == ("pending", None, None)
    service.records.change_state(bundle_id, BundleTaskState.WAITING_FOR_SHUTDOWN)
    assert shown() == ("waiting-for-shutdown", None, None)
    service.records.change_state(bundle_id, BundleTaskState.BUNDLING)
    service.records.set_progress(bundle_id, BundleTaskState.BUNDLING, 70)
    assert shown() == ("bundling", "70%", None)
    service.records.fail(bundle_id, TaskFailure("Client.S3Error", "AccessDenied(403)- no"))
    error = {"Code": "Client.S3Error", "Message": "AccessDenied(403)- no"}
    assert shown() == ("failed", "70%", error)


@pytest.fixture
def three_tasks(service, ec2):
    """Tasks one (cancelling), two (bundling, 20%) and three (failed), by their names."""
    tasks = {}
    for number, name in enumerate(("one", "two", "three")):
        instance_id = service.add_instance(f"i-0000000{number}")
        tasks[name] = bundle(ec2, service.key, instance_id, bucket=f"bucket-{name}", prefix=f"prefix-{name}")
    ids = {name: task["BundleId"] for name, task in tasks.items()}
    service.records.change_state(ids["one"], BundleTaskState.CANCELLING)
    for state in (BundleTaskState.WAITING_FOR_SHUTDOWN, BundleTaskState.BUNDLING):
        service.records.change_state(ids["two"], state)
    service.records.set_progress(ids["two"], BundleTaskState.BUNDLING, 20)
    service.records.fail(ids["three"], TaskFailure("Client.S3Error", "AccessDenied(403)- no"))
    return tasks


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("instance-id", "i-00000001", {"two"}),
        ("instance-id", "i-*", {"one", "two", "three"}),
        ("s3-bucket", "bucket-t*", {"two", "three"}),
        ("s3-prefix", "prefix-???", {"one", "two"}),
        ("state", "bundling", {"two"}),
        ("state", "cancelling", {"one"}),
        ("state", "canceling", {"one"}),
        ("state", "complete", set()),
        ("progress", "20%", {"two"}),
        ("progress", "20", set()),
        ("error-code", "Client.S3Error", {"three"}),
        ("error-message", "AccessDenied*", {"three"}),
        ("s3-aws-access-key-id", "AKIA*", {"one", "two", "three"}),
        ("s3-aws-access-key-id", "AKIDNOBODY", set()),
    ],
)
def test_describe_bundle_tasks_filters(ec2, three_tasks, name, value, expected):
    response = ec2.describe_bundle_tasks(Filters=[{"Name": name, "Values": [value]}])["BundleTasks"]
    assert {task["Storage"]["S3"]["Bucket"].removeprefix("bucket-") for task in response} == expected


def test_describe_bundle_tasks_filters_by_shown_values(ec2, three_tasks):
    (two,) = ec2.describe_bundle_tasks(BundleIds=[three_tasks["two"]["BundleId"]])["BundleTasks"]
    times = {name: two[member].isoformat(timespec="milliseconds")[:23] + "Z" for name, member in (
        ("start-time", "StartTime"), ("update-time", "UpdateTime")
    )}  # fmt: skip
    for name, value in {"bundle-id": two["BundleId"], **times}.items():
        found = ec2.describe_bundle_tasks(Filters=[{"Name": name, "Values": [value]}])["BundleTasks"]
        assert two in found
        assert len(found) < 3  # two may have been made within the same millisecond, not three


def test_describe_bundle_tasks_combines_ids_and_filters(ec2, three_tasks):
    ids = [three_tasks["one"]["BundleId"], three_tasks["two"]["BundleId"]]
    filters = [{"Name": "s3-bucket", "Values": ["bucket-t*"]}]
    response = ec2.describe_bundle_tasks(BundleIds=ids, Filters=filters)["BundleTasks"]
    assert [task["BundleId"] for task in response] == [ids[1]]


def test_bundle_tasks_of_other_accounts_are_not_found(service, ec2, client_of, windows):
    bundle_id = bundle(ec2, service.key)["BundleId"]
    other = client_of(service.another_key())
    assert other.describe_bundle_tasks()["BundleTasks"] == []
    expected = (400, "InvalidBundleID.NotFound", f"The bundle task ID '{bundle_id}' does not exist")
    assert refusal(other.describe_bundle_tasks, BundleIds=[bundle_id]) == expected
    assert refusal(other.cancel_bundle_task, BundleId=bundle_id) == expected
    assert ec2.describe_bundle_tasks()["BundleTasks"][0]["State"] == "pending"


def test_cancel_ends_a_task_that_has_not_started(service, ec2, windows):
    task = ec2.cancel_bundle_task(BundleId=bundle(ec2, service.key)["BundleId"])["BundleTask"]
    error = {"Code": "Client.Cancelled", "Message": "User has requested bundling operation cancellation"}
    assert (task["State"], task["BundleTaskError"]) == ("failed", error)


@pytest.mark.parametrize(
    "state", [BundleTaskState.WAITING_FOR_SHUTDOWN, BundleTaskState.BUNDLING, BundleTaskState.STORING]
)
def test_cancel_of_a_started_task_works_once(service, ec2, windows, state):
    bundle_id = bundle(ec2, service.key)["BundleId"]
    for each in (BundleTaskState.WAITING_FOR_SHUTDOWN, BundleTaskState.BUNDLING, BundleTaskState.STORING):
        service.records.change_state(bundle_id, each)
        if each is state:
            break
    assert ec2.cancel_bundle_task(BundleId=bundle_id)["BundleTask"]["State"] == "cancelling"
    expected = (400, "IncorrectState", f"The bundle task '{bundle_id}' cannot be cancelled: it is cancelling.")
    assert refusal(ec2.cancel_bundle_task, BundleId=bundle_id) == expected


def test_cancel_rejects_an_ended_task(service, ec2, windows):
    bundle_id = bundle(ec2, service.key)["BundleId"]
    service.records.fail(bundle_id, TaskFailure("Client.S3Error", "x"))
    expected = (400, "IncorrectState", f"The bundle task '{bundle_id}' cannot be cancelled: it is failed.")
    assert refusal(ec2.cancel_bundle_task, BundleId=bundle_id) == expected


def test_database_has_no_plain_secrets(service, ec2, windows, tmp_path):
    given = storage(service.key)
    ec2.bundle_instance(InstanceId=INSTANCE, Storage=given)
    database = b"".join(path.read_bytes() for path in tmp_path.glob("thrave.db*"))
    assert INSTANCE.encode() in database
    for secret in (service.key.secret_access_key, given["S3"]["UploadPolicySignature"]):
        assert secret.encode() not in database
        assert json.dumps(secret).strip('"').encode() not in database
