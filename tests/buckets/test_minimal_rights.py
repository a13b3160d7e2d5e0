"""The minimal policies of docs/reference/store-rights.md are sufficient; a guard before a real store enforces them."""

import json
import re
import uuid
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from support.servers import stores
from support.servers.iam_guard import guarded
from support.service.forked_server import ForkedServer
from support.service.service_on_store import UPLOAD_BY_SERVICE, ServiceOnStore
from thrave.buckets.base import UNKNOWN_OWNER
from thrave.buckets.errors import AccessDenied, BucketAlreadyExists
from thrave.buckets.s3_objects import S3ObjectClient
from thrave.buckets.s3_store import OWNER_KEY, KeyOwner, OwnerKeyStore, ServiceKeyStore
from thrave.testing import upload_policy

pytestmark = pytest.mark.s3

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "store-rights.md"
SMALLEST = dict(zip(("policy", "service"), re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL), strict=True))
SETTINGS = {"policy": {}, "service": UPLOAD_BY_SERVICE}
ACCOUNT = "111111111111"


def minimal(upload, bucket, prefix="winami", without=()):
    """Return the policy of the page for a bucket and a prefix, `without` some of its actions."""
    policy = json.loads(SMALLEST[upload].replace("BUCKET", bucket).replace("PREFIX", prefix))
    for statement in policy["Statement"]:
        statement["Action"] = [action for action in statement["Action"] if action not in without]
    return json.dumps(policy)


def add_permission(policy, action, resource):
    document = json.loads(policy)
    document["Statement"].append({"Effect": "Allow", "Action": action, "Resource": resource})
    return json.dumps(document)


@pytest.fixture
def bucket(seaweedfs):
    """An existing bucket of Alice's."""
    name = f"alice-{uuid.uuid4().hex[:12]}"
    S3ObjectClient(seaweedfs.connection())._requests.send("PUT", name)
    return name


@pytest.fixture(scope="module", params=SETTINGS)
def guarded_service(request, seaweedfs, tmp_path_factory):
    """Return `upload_credentials`, the service on a store behind a guard, and the guard."""
    folder = tmp_path_factory.mktemp("service")
    with guarded(seaweedfs.url, "") as guard:
        settings = {"store": "s3", "s3_endpoint": guard.url, "s3_retry_timeout": 5, **SETTINGS[request.param]}
        with ForkedServer.running(folder / "thrave", **settings) as server:
            yield request.param, ServiceOnStore(server, seaweedfs, folder), guard


def bundle(service, bucket, prefix="winami"):
    policy, signature = upload_policy(stores.ALICE.secret_access_key, bucket, prefix)
    return service.bundle(policy, signature)


@pytest.mark.parametrize("without", [(), ("s3:DeleteObject",)], ids=["minimal", "no DeleteObject"])
def test_minimal_policy_completes_a_bundle(guarded_service, bucket, tmp_path, without):
    upload, service, guard = guarded_service
    guard.statements = json.loads(minimal(upload, bucket, without=without))["Statement"]
    service.begin(tmp_path)
    service.bucket = bucket
    task = bundle(service, bucket)
    assert task["State"] == "complete", task
    service.objects = S3ObjectClient(service.store.connection())
    assert "winami.manifest.xml" in service.files()


def test_key_without_rights_is_refused_before_the_instance_is_changed(guarded_service, bucket, tmp_path):
    _, service, guard = guarded_service
    guard.statements = []
    service.begin(tmp_path)
    service.bucket = bucket
    with pytest.raises(ClientError, match=r"InvalidParameterValue|InaccessibleStorageLocation"):
        bundle(service, bucket)


def owner_key_store(guard, store):
    owner = KeyOwner(ACCOUNT, stores.ALICE)
    connection = store.connection(endpoint=guard.url, credentials=None)
    return OwnerKeyStore(connection, lambda _: owner, key_owner=owner)


def service_key_store(guard, store):
    return ServiceKeyStore(store.connection(endpoint=guard.url))


DRIVERS = {"policy": owner_key_store, "service": service_key_store}


@pytest.mark.parametrize("upload", DRIVERS)
@pytest.mark.parametrize("more", ["s3:ListBucket", "s3:ListAllMyBuckets", "s3:CreateBucket"])
def test_existing_bucket_needs_none_of_the_rights_on_buckets(seaweedfs, bucket, upload, more):
    policy = add_permission(minimal(upload, bucket), more, ["*", f"arn:aws:s3:::{bucket}"])
    with guarded(seaweedfs.url, policy) as guard:
        buckets = DRIVERS[upload](guard, seaweedfs)
        assert buckets.create(bucket, ACCOUNT, probe="winami.probe") is False
        assert buckets.owner(bucket) == ACCOUNT
    assert "winami.probe" not in [*S3ObjectClient(seaweedfs.connection()).list(bucket, "")]


@pytest.mark.parametrize("upload", DRIVERS)
def test_missing_bucket_that_may_not_be_created_is_named(seaweedfs, upload):
    name = f"alice-{uuid.uuid4().hex[:12]}"
    policy = add_permission(minimal(upload, name), "s3:ListBucket", f"arn:aws:s3:::{name}")
    with guarded(seaweedfs.url, policy) as guard, pytest.raises(AccessDenied):
        DRIVERS[upload](guard, seaweedfs).create(name, ACCOUNT, probe="winami.probe")


def test_hidden_bucket_is_refused_if_nothing_may_be_put_there(seaweedfs, bucket):
    with guarded(seaweedfs.url, minimal("policy", bucket, prefix="other")) as guard, pytest.raises(AccessDenied):
        owner_key_store(guard, seaweedfs).create(bucket, ACCOUNT, probe="winami.probe")


def test_service_refuses_a_bucket_with_objects_and_without_owner(seaweedfs, bucket):
    S3ObjectClient(seaweedfs.connection()).put(bucket, "something", b"x")
    policy = add_permission(minimal("service", bucket), "s3:ListBucket", f"arn:aws:s3:::{bucket}")
    with guarded(seaweedfs.url, policy) as guard:
        buckets = service_key_store(guard, seaweedfs)
        with pytest.raises(BucketAlreadyExists):
            buckets.create(bucket, ACCOUNT)
        assert buckets.owner(bucket) == UNKNOWN_OWNER


def test_service_refuses_a_bucket_of_another_account_with_the_minimal_policy(seaweedfs, bucket):
    S3ObjectClient(seaweedfs.connection()).put(bucket, OWNER_KEY, b"222222222222\n")
    with guarded(seaweedfs.url, minimal("service", bucket)) as guard, pytest.raises(BucketAlreadyExists):
        service_key_store(guard, seaweedfs).create(bucket, ACCOUNT)
