"""The bundle actions and instance-store images that `thrave.moto` adds to moto."""

import signal
import subprocess
import sys
from contextlib import contextmanager

import boto3
import pytest
from botocore.exceptions import ClientError

from support.servers.stores import free_ports
from thrave.bundle import BundleError, DirectoryParts, open_bundle
from thrave.identity.certificates import ServiceIdentity, load_private_key, new_certificate
from thrave.testing import REGION, upload_policy

MANUAL = {"progression": "manual", "times": 1}
KEY = {"aws_access_key_id": "FOOBARKEY", "aws_secret_access_key": "FOOBARSECRET"}  # the key of mock_aws


@pytest.fixture
def moto_ec2(monkeypatch):
    """moto's EC2 with Thrave's actions, in this process."""
    from moto import mock_aws

    import thrave.moto

    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    thrave.moto.install()
    with mock_aws():
        yield boto3.client("ec2")


@pytest.fixture
def step_by_step():
    """Each call of DescribeBundleTasks changes the state of a task once."""
    from moto.moto_api import state_manager

    import thrave.moto

    state_manager.set_transition(thrave.moto.STATE_MODEL, MANUAL)
    yield
    state_manager.unset_transition(thrave.moto.STATE_MODEL)


def windows(ec2, image_id=None):
    from thrave.moto import WINDOWS_IMAGE_ID

    run = ec2.run_instances(ImageId=image_id or WINDOWS_IMAGE_ID, MinCount=1, MaxCount=1)
    return run["Instances"][0]["InstanceId"]


def storage(prefix="winami", bucket="my-bundles", key=KEY, policy_prefix=None, hours=24):
    key_id, secret = key["aws_access_key_id"], key["aws_secret_access_key"]
    policy, signature = upload_policy(secret, bucket, policy_prefix or prefix, hours=hours)
    s3 = {"AWSAccessKeyId": key_id, "Bucket": bucket, "Prefix": prefix}
    return {"S3": {**s3, "UploadPolicy": policy, "UploadPolicySignature": signature}}


def keys(bucket="my-bundles", **client):
    found = boto3.client("s3", **client).list_objects_v2(Bucket=bucket)
    return [entry["Key"] for entry in found.get("Contents", [])]


def download(folder, bucket="my-bundles", **client):
    s3 = boto3.client("s3", **client)
    for key in keys(bucket, **client):
        (folder / key).write_bytes(s3.get_object(Bucket=bucket, Key=key)["Body"].read())


def task_of(ec2, bundle_id):
    return ec2.describe_bundle_tasks(BundleIds=[bundle_id])["BundleTasks"][0]


def power(ec2, instance_id):
    (reservation,) = ec2.describe_instances(InstanceIds=[instance_id])["Reservations"]
    return reservation["Instances"][0]["State"]["Name"]


@contextmanager
def refused(code, text=""):
    with pytest.raises(ClientError) as caught:
        yield
    assert caught.value.response["Error"]["Code"] == code
    assert text in caught.value.response["Error"]["Message"]


def test_bundle_opens_to_the_disk_of_the_instance(moto_ec2, tmp_path):
    import thrave.moto

    instance_id = windows(moto_ec2)
    task = moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage())["BundleTask"]
    assert task["State"] == "pending"
    moto_ec2.get_waiter("bundle_task_complete").wait(BundleIds=[task["BundleId"]])

    download(tmp_path)
    manifest = (tmp_path / "winami.manifest.xml").read_bytes()
    opened = tmp_path / "opened.raw"
    open_bundle(
        manifest,
        DirectoryParts(tmp_path),
        thrave.moto.service_key(),
        opened,
        certificate=thrave.moto.service_certificate(),
    )
    assert opened.read_bytes() == thrave.moto.root_disk(instance_id)
    assert power(moto_ec2, instance_id) == "running"


def test_bundle_is_encrypted_for_certificate_of_account(moto_ec2, tmp_path):
    import thrave.moto

    certificate, private_key = new_certificate("alice")
    iam = boto3.client("iam")
    iam.create_user(UserName="alice")
    iam.upload_signing_certificate(UserName="alice", CertificateBody=certificate)
    created = iam.create_access_key(UserName="alice")["AccessKey"]
    key = {"aws_access_key_id": created["AccessKeyId"], "aws_secret_access_key": created["SecretAccessKey"]}
    instance_id = windows(moto_ec2)
    moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage(key=key))

    download(tmp_path)
    manifest, parts = (tmp_path / "winami.manifest.xml").read_bytes(), DirectoryParts(tmp_path)
    open_bundle(manifest, parts, load_private_key(private_key), tmp_path / "opened.raw")
    assert (tmp_path / "opened.raw").read_bytes() == thrave.moto.root_disk(instance_id)
    other = load_private_key(new_certificate("bob")[1])
    with pytest.raises(BundleError):
        open_bundle(manifest, parts, other, tmp_path / "other.raw")


def test_task_passes_through_every_state_and_stops_the_instance(moto_ec2, step_by_step):
    instance_id = windows(moto_ec2)
    bundle_id = moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage())["BundleTask"]["BundleId"]
    seen = []
    for _ in range(5):
        task = task_of(moto_ec2, bundle_id)
        seen.append((task["State"], task.get("Progress"), power(moto_ec2, instance_id), len(keys())))
    assert seen == [
        ("waiting-for-shutdown", None, "stopped", 0),
        ("bundling", "100%", "stopped", 1),
        ("storing", "0%", "running", 1),
        ("complete", "100%", "running", 3),
        ("complete", "100%", "running", 3),
    ]


def test_cancel_deletes_objects_and_starts_the_instance(moto_ec2, step_by_step):
    instance_id = windows(moto_ec2)
    boto3.client("s3").create_bucket(Bucket="my-bundles")
    bundle_id = moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage())["BundleTask"]["BundleId"]
    task_of(moto_ec2, bundle_id)
    assert task_of(moto_ec2, bundle_id)["State"] == "bundling"
    assert keys() == ["winami.part.0"]

    assert moto_ec2.cancel_bundle_task(BundleId=bundle_id)["BundleTask"]["State"] == "cancelling"
    with refused("IncorrectState"):
        moto_ec2.cancel_bundle_task(BundleId=bundle_id)
    task = task_of(moto_ec2, bundle_id)
    assert (task["State"], task["BundleTaskError"]["Code"]) == ("failed", "Client.Cancelled")
    assert keys() == []
    assert power(moto_ec2, instance_id) == "running"


def test_stopped_instance_stays_stopped(moto_ec2):
    instance_id = windows(moto_ec2)
    moto_ec2.stop_instances(InstanceIds=[instance_id])
    moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage())
    assert power(moto_ec2, instance_id) == "stopped"


def test_task_fails_when_its_instance_is_terminated(moto_ec2, step_by_step):
    instance_id = windows(moto_ec2)
    bundle_id = moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage())["BundleTask"]["BundleId"]
    task_of(moto_ec2, bundle_id)
    moto_ec2.terminate_instances(InstanceIds=[instance_id])
    task = task_of(moto_ec2, bundle_id)
    assert (task["State"], task["BundleTaskError"]["Code"]) == ("failed", "Client.InstanceTerminated")


def test_task_fails_when_its_bucket_is_deleted(moto_ec2, step_by_step):
    instance_id = windows(moto_ec2)
    bundle_id = moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage())["BundleTask"]["BundleId"]
    task_of(moto_ec2, bundle_id)
    boto3.client("s3").delete_bucket(Bucket="my-bundles")
    task = task_of(moto_ec2, bundle_id)
    assert (task["State"], task["BundleTaskError"]["Code"]) == ("failed", "Client.S3Error")
    assert power(moto_ec2, instance_id) == "running"


def test_requests_are_refused_as_by_the_service(moto_ec2, step_by_step):
    instance_id = windows(moto_ec2)
    with refused("InvalidInstanceID.NotFound"):
        moto_ec2.bundle_instance(InstanceId="i-0123456789abcdef0", Storage=storage())
    with refused("InvalidInstanceID.Malformed"):
        moto_ec2.bundle_instance(InstanceId="i-x", Storage=storage())
    with refused("MissingParameter"):
        moto_ec2.bundle_instance(InstanceId=instance_id, Storage={})
    with refused("InvalidParameterValue", "UploadPolicySignature"):
        moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage(key={**KEY, "aws_secret_access_key": "x"}))
    with refused("InvalidParameterValue", "UploadPolicySignature"):
        moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage(key={**KEY, "aws_access_key_id": "AKIAX"}))
    with refused("InvalidParameterValue", "Policy expired"):
        moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage(hours=-1))
    with refused("InvalidParameterValue", "Policy Condition failed"):
        moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage(policy_prefix="other"))
    with refused("DryRunOperation"):
        moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage(), DryRun=True)
    assert moto_ec2.describe_bundle_tasks()["BundleTasks"] == []
    moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage())
    with refused("BundlingInProgress"):
        moto_ec2.bundle_instance(InstanceId=instance_id, Storage=storage("second"))
    with refused("InvalidParameterValue", "prefix in use"):
        moto_ec2.bundle_instance(InstanceId=windows(moto_ec2), Storage=storage())
    with refused("InvalidBundleID.NotFound"):
        moto_ec2.describe_bundle_tasks(BundleIds=["bun-00000000"])


def test_only_windows_on_instance_store_is_bundled(moto_ec2):
    images = moto_ec2.describe_images(Owners=["amazon"])["Images"]
    linux = next(image for image in images if image.get("Platform") is None)
    ebs = next(image for image in images if image.get("Platform") == "windows" and image["RootDeviceType"] == "ebs")
    for image in (linux, ebs):
        with refused("InvalidInstanceType"):
            moto_ec2.bundle_instance(InstanceId=windows(moto_ec2, image["ImageId"]), Storage=storage())


def test_image_of_a_bundle_is_registered_described_and_run(moto_ec2):
    moto_ec2.bundle_instance(InstanceId=windows(moto_ec2), Storage=storage())
    location = "my-bundles/winami.manifest.xml"
    image_id = moto_ec2.register_image(Name="golden", ImageLocation=location)["ImageId"]

    filters = [{"Name": "manifest-location", "Values": ["my-bundles/*"]}]
    (image,) = moto_ec2.describe_images(Filters=filters)["Images"]
    assert (image["ImageId"], image["RootDeviceType"], image["Platform"]) == (image_id, "instance-store", "windows")
    assert (image["ImageLocation"], image["BlockDeviceMappings"]) == (location, [])
    with refused("InvalidAMIName.Duplicate"):
        moto_ec2.register_image(Name="golden", ImageLocation=location)
    moto_ec2.bundle_instance(InstanceId=windows(moto_ec2, image_id), Storage=storage("again"))
    assert "again.manifest.xml" in keys()
    moto_ec2.deregister_image(ImageId=image_id)
    assert moto_ec2.describe_images(Filters=filters)["Images"] == []
    assert location.partition("/")[2] in keys()


def test_damaged_or_missing_bundle_is_not_registered(moto_ec2):
    moto_ec2.bundle_instance(InstanceId=windows(moto_ec2), Storage=storage())
    s3 = boto3.client("s3")
    part = s3.get_object(Bucket="my-bundles", Key="winami.part.0")["Body"].read()
    s3.put_object(Bucket="my-bundles", Key="winami.part.0", Body=bytes([part[0] ^ 1]) + part[1:])
    for location in ("my-bundles/winami.manifest.xml", "my-bundles/none.manifest.xml", "none/x.manifest.xml", "x"):
        with refused("InvalidManifest"):
            moto_ec2.register_image(Name="golden", ImageLocation=location)
    s3.put_object(Bucket="my-bundles", Key="winami.manifest.xml", Body=b"<manifest/>")
    with refused("InvalidManifest"):
        moto_ec2.register_image(Name="golden", ImageLocation="my-bundles/winami.manifest.xml")


def test_threaded_server_bundles(tmp_path, monkeypatch):
    from moto.server import ThreadedMotoServer

    import thrave.moto

    known = {"AKIATEST": "secret"}
    thrave.moto.install(access_keys=known, service_dir=tmp_path / "service")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        key = {"aws_access_key_id": "AKIATEST", "aws_secret_access_key": "secret"}
        client = {"endpoint_url": f"http://{host}:{port}", "region_name": REGION, **key}
        ec2 = boto3.client("ec2", **client)
        ec2.bundle_instance(InstanceId=windows(ec2), Storage=storage(key=key))
        (tmp_path / "bundle").mkdir()
        download(tmp_path / "bundle", **client)
        identity = ServiceIdentity.open(tmp_path / "service")
        manifest = (tmp_path / "bundle" / "winami.manifest.xml").read_bytes()
        open_bundle(manifest, DirectoryParts(tmp_path / "bundle"), identity.private_key, tmp_path / "opened.raw")
    finally:
        server.stop()


def test_command_starts_server_that_bundles(monkeypatch):
    (port,) = free_ports(1)
    key = {"aws_access_key_id": "AKIATEST", "aws_secret_access_key": "secret"}
    for name, value in key.items():
        monkeypatch.setenv(name.upper(), value)
    process = subprocess.Popen([sys.executable, "-m", "thrave.moto", "-p", str(port)], stderr=subprocess.PIPE)
    try:
        assert any(b"Running on" in line for line in iter(process.stderr.readline, b""))
        ec2 = boto3.client("ec2", endpoint_url=f"http://127.0.0.1:{port}", region_name=REGION, **key)
        instance_id = windows(ec2)
        ec2.bundle_instance(InstanceId=instance_id, Storage=storage(key=key))
        assert ec2.describe_bundle_tasks()["BundleTasks"][0]["State"] == "complete"
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
