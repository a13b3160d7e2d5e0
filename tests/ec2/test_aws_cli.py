"""The AWS Command Line Interface, unmodified, as an operator's script calls it."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.buckets.s3_storage import policy, signature

pytestmark = pytest.mark.clients

INSTANCE = "i-1234567890abcdef0"


@pytest.fixture
def aws(service, endpoint, tmp_path):
    """Runs `aws ec2 …` and gives what it printed, parsed; raises its words when it fails."""
    program = shutil.which("aws", path=str(Path(sys.executable).parent))
    assert program, "the AWS CLI is not installed for this Python: pip install awscli"
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "AWS_ACCESS_KEY_ID": service.key.access_key_id,
        "AWS_SECRET_ACCESS_KEY": service.key.secret_access_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    service.add_instance(INSTANCE)

    def aws(*arguments):
        command = [program, "--endpoint-url", endpoint, "--output", "json", "ec2", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        return json.loads(done.stdout)

    return aws


def owner(service):
    return ["--owner-akid", service.key.access_key_id, "--owner-sak", service.key.secret_access_key]


def test_aws_cli_bundles_with_a_policy_that_it_creates(service, aws):
    where = ["--bucket", "my-bucket", "--prefix", "winami"]
    task = aws("bundle-instance", "--instance-id", INSTANCE, *where, *owner(service))["BundleTask"]
    assert (task["State"], task["Storage"]) == ("pending", {"S3": {"Bucket": "my-bucket", "Prefix": "winami"}})
    filters = ["--filters", "Name=state,Values=pending,bundling", "Name=s3-bucket,Values=my-*"]
    assert aws("describe-bundle-tasks", *filters)["BundleTasks"] == [task]
    assert aws("describe-bundle-tasks", "--bundle-ids", task["BundleId"])["BundleTasks"] == [task]


@pytest.mark.parametrize("encode", [lambda document: document, base64.b64encode], ids=["JSON", "base64"])
def test_aws_cli_bundles_with_a_given_policy(service, aws, encode):
    where = ["--bucket", "my-bucket", "--prefix", "winami", "--policy", encode(policy()).decode()]
    assert (
        aws("bundle-instance", "--instance-id", INSTANCE, *where, *owner(service))["BundleTask"]["State"] == "pending"
    )


@pytest.mark.parametrize("encode", [lambda document: document, base64.b64encode], ids=["JSON", "base64"])
def test_aws_cli_bundles_with_a_given_storage(service, aws, encode):
    document = policy()
    s3 = {
        "AWSAccessKeyId": service.key.access_key_id,
        "Bucket": "my-bucket",
        "Prefix": "winami",
        "UploadPolicy": encode(document).decode(),
        "UploadPolicySignature": signature(base64.b64encode(document), service.key.secret_access_key),
    }
    response = aws("bundle-instance", "--instance-id", INSTANCE, "--storage", json.dumps({"S3": s3}))
    assert response["BundleTask"]["State"] == "pending"


def test_aws_cli_cancels_a_task_and_its_waiter_ends(service, aws):
    where = ["--bucket", "my-bucket", "--prefix", "winami"]
    task = aws("bundle-instance", "--instance-id", INSTANCE, *where, *owner(service))["BundleTask"]
    cancelled = aws("cancel-bundle-task", "--bundle-id", task["BundleId"])["BundleTask"]
    assert cancelled["BundleTaskError"]["Code"] == "Client.Cancelled"
    with pytest.raises(RuntimeError, match='matched expected path: "failed"'):
        aws("wait", "bundle-task-complete", "--bundle-ids", task["BundleId"])


NOBODY = ["--bucket", "my-bucket", "--prefix", "winami", "--owner-akid", "AKIDNOBODY", "--owner-sak", "x"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--storage", '{"S3":{"Bucket":"b","Prefix":"p"}}'], r"\(MissingParameter\).*Storage.S3.AWSAccessKeyId"),
        (NOBODY, r"\(InvalidParameterValue\).*AKIDNOBODY"),
        ([*NOBODY, "--dry-run"], r"\(InvalidParameterValue\).*AKIDNOBODY"),
    ],
)
def test_aws_cli_prints_error_codes_and_messages(aws, arguments, words):
    with pytest.raises(RuntimeError, match=words):
        aws("bundle-instance", "--instance-id", INSTANCE, *arguments)


def test_aws_cli_describes_instances(service, aws):
    (reservation,) = aws("describe-instances", "--filters", "Name=platform,Values=windows")["Reservations"]
    assert reservation["Instances"][0]["InstanceId"] == INSTANCE
