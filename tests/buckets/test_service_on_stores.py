"""The service on a real store, from the request of a client to the opened bundle."""

import base64
import json
import os
import shutil
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from support.buckets.upload_policies import document, encoded, signed_v2, signed_v4
from support.servers import stores
from support.service.forked_server import ForkedServer
from support.service.service_on_store import UPLOAD_BY_SERVICE, ServiceOnStore
from thrave.buckets.s3_objects import S3ObjectClient

FILES = ["winami.manifest.json", "winami.manifest.xml", "winami.part.0"]
ON_SEAWEEDFS = pytest.param(("seaweedfs", {}), id="seaweedfs", marks=pytest.mark.s3)
UNREACHABLE = pytest.param(("seaweedfs", {"s3_endpoint": "http://127.0.0.1:1"}), id="unreachable", marks=pytest.mark.s3)
ON_RGW = pytest.param(("rgw", {}), id="rgw", marks=pytest.mark.rgw)
SERVICE_KEY = pytest.param(("rgw", UPLOAD_BY_SERVICE), id="service", marks=pytest.mark.rgw)


@pytest.fixture(scope="module")
def shared_service(request, tmp_path_factory):
    """A service with the store and settings of the parameter, shared by tests with the same parameter."""
    name, settings = request.param
    store = request.getfixturevalue(name)
    settings = {"store": "s3", "s3_endpoint": store.url, "s3_retry_timeout": 5, **settings}
    folder = tmp_path_factory.mktemp("service")
    with ForkedServer.running(folder / "thrave", **settings) as server:
        yield ServiceOnStore(server, store, folder)


@pytest.fixture
def service(shared_service, tmp_path):
    return shared_service.begin(tmp_path)


@pytest.mark.clients
@pytest.mark.parametrize("shared_service", [ON_SEAWEEDFS], indirect=True)
def test_policy_of_the_aws_cli_stores_the_objects(service):
    program = shutil.which("aws", path=str(Path(sys.executable).parent))
    key = {
        "AWS_ACCESS_KEY_ID": service.own_key.access_key_id,
        "AWS_SECRET_ACCESS_KEY": service.own_key.secret_access_key,
    }
    owner = ["--owner-akid", stores.ALICE.access_key_id, "--owner-sak", stores.ALICE.secret_access_key]
    storage = ["--instance-id", service.instance(), "--bucket", service.bucket, "--prefix", "winami"]
    command = [program, "--endpoint-url", service.server.url, "--region", "us-east-1", "--output", "json", "ec2"]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **key}
    finished = subprocess.run(
        [*command, "bundle-instance", *storage, *owner], env=environment, capture_output=True, check=True, text=True
    )
    task = service.ended(json.loads(finished.stdout)["BundleTask"]["BundleId"])
    assert task["State"] == "complete"
    assert service.files() == FILES
    assert service.is_whole()


def v2(service, acl):
    text = encoded(document({"bucket": service.bucket}, {"acl": acl}, ["starts-with", "$key", "winami"]))
    return base64.b64decode(text), signed_v2(text)


def v4(service, acl):
    day = datetime.now(UTC).strftime("%Y%m%d")
    scope = [
        {"x-amz-algorithm": "AWS4-HMAC-SHA256"},
        {"x-amz-credential": f"{stores.ALICE.access_key_id}/{day}/us-east-1/s3/aws4_request"},
        {"x-amz-date": f"{day}T000000Z"},
    ]
    conditions = [{"bucket": service.bucket}, {"acl": acl}, ["starts-with", "$key", "winami"], *scope]
    text = encoded(document(*conditions))
    return base64.b64decode(text), signed_v4(text, date=day)


@pytest.mark.parametrize("shared_service", [ON_SEAWEEDFS, ON_RGW], indirect=True)
@pytest.mark.parametrize("signed", [v2, v4])
def test_policy_of_either_version_stores_the_objects(service, signed):
    task = service.bundle(*signed(service, service.store.acl))
    assert task["State"] == "complete", task
    assert service.files() == FILES
    assert service.is_whole()


@pytest.mark.parametrize("shared_service", [SERVICE_KEY], indirect=True)
def test_key_of_the_service_stores_what_our_policy_allows(service):
    policy, _ = v2(service, "ec2-bundle-read")
    signature = signed_v2(base64.b64encode(policy).decode(), service.own_key.secret_access_key)
    task = service.bundle(policy, signature, service.own_key)
    assert task["State"] == "complete", task
    service.objects = S3ObjectClient(service.store.connection())
    assert service.files() == [".thrave-owner", *FILES]
    assert service.objects.get(service.bucket, ".thrave-owner").decode().strip() == service.account.account_id


@pytest.mark.parametrize("shared_service", [ON_SEAWEEDFS, ON_RGW], indirect=True)
def test_request_for_bucket_of_another_account_is_rejected(service):
    service.bucket = f"bob-{uuid.uuid4().hex[:12]}"
    S3ObjectClient(service.store.connection(stores.BOB))._requests.send("PUT", service.bucket)
    with pytest.raises(ClientError, match="InaccessibleStorageLocation"):
        service.bundle(*v2(service, service.store.acl))
    service.objects = S3ObjectClient(service.store.connection(stores.BOB))
    assert service.files() == []


@pytest.mark.parametrize("shared_service", [ON_SEAWEEDFS, ON_RGW], indirect=True)
def test_key_unknown_to_the_store_is_rejected_with_advice(service):
    policy, _ = v2(service, service.store.acl)
    signature = signed_v2(base64.b64encode(policy).decode(), service.own_key.secret_access_key)
    with pytest.raises(ClientError, match=r"InvalidParameterValue.*does not allow.*thrave account key import"):
        service.bundle(policy, signature, service.own_key)


@pytest.mark.parametrize("shared_service", [UNREACHABLE], indirect=True)
def test_unreachable_store_gives_an_error_that_clients_retry(service):
    with pytest.raises(ClientError, match=r"Unavailable.*Cannot connect to the store 127\.0\.0\.1:1") as caught:
        service.bundle(*v2(service, service.store.acl))
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 503
