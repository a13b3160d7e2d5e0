"""Connections to a store: TLS, a proxy, the bucket in the host name, temporary credentials."""

import uuid

import boto3
import pytest

from support.buckets.upload_policies import document, encoded, signed_v2, signed_v4
from support.servers import stores
from support.servers.forward_proxy import forwarding
from thrave.buckets.errors import AccessDenied, InvalidArgument, StoreError, TransientError
from thrave.buckets.s3_client import Credentials
from thrave.buckets.s3_objects import S3ObjectClient
from thrave.buckets.upload_policy import UploadPolicy

pytestmark = pytest.mark.rgw
PART = bytes(range(256)) * 1000


@pytest.fixture
def bucket(rgw):
    """A bucket of Alice's."""
    name = f"alice-{uuid.uuid4().hex[:12]}"
    S3ObjectClient(rgw.connection(stores.ALICE))._requests.send("PUT", name)
    return name


@pytest.fixture
def proxy():
    with forwarding() as proxy:
        yield proxy


def sign_policy(bucket, key, *conditions, version=2):
    """Return an upload policy and its signature."""
    if version == 4:
        scope = f"{key.access_key_id}/20260101/us-east-1/s3/aws4_request"
        v4 = {"x-amz-algorithm": "AWS4-HMAC-SHA256", "x-amz-credential": scope, "x-amz-date": "20260101T000000Z"}
        conditions = [*conditions, *({name: value} for name, value in v4.items())]
    text = encoded(document({"bucket": bucket}, ["starts-with", "$key", "win"], *conditions))
    signed = {2: signed_v2(text, key.secret_access_key), 4: signed_v4(text, key.secret_access_key, date="20260101")}
    return UploadPolicy.verify(text, signed[version], access_key_id=key.access_key_id, secret=key.secret_access_key)


def send_all_requests(objects, bucket, policies):
    """Send every kind of request."""
    objects.put(bucket, "folder/ä b+c", PART)
    for number, policy in enumerate(policies):
        objects.put(bucket, f"win.part.{number}", PART, policy=policy)
    assert objects.head(bucket, "win.part.0").size == len(PART)
    assert objects.get(bucket, "folder/ä b+c") == PART
    assert objects.get_range(bucket, "win.part.0", 10, 5) == PART[10:15]
    keys = {"folder/ä b+c", *(f"win.part.{number}" for number in range(len(policies)))}
    assert {*objects.list(bucket, "")} == keys
    objects.delete(bucket, keys)
    assert [*objects.list(bucket, "")] == []


def test_connection_trusts_a_private_authority(rgw, bucket):
    objects = S3ObjectClient(rgw.connection(stores.ALICE, endpoint=rgw.tls_url, ca=rgw.ca))
    send_all_requests(objects, bucket, [sign_policy(bucket, stores.ALICE)])


def test_untrusted_certificate_is_rejected_at_once(rgw, bucket):
    objects = S3ObjectClient(rgw.connection(stores.ALICE, endpoint=rgw.tls_url))
    with pytest.raises(StoreError, match=r"certificate of 127\.0\.0\.1:\d+ is not trusted: self.signed") as caught:
        objects.get(bucket, "key")
    assert not isinstance(caught.value, TransientError)


@pytest.mark.parametrize("ca", ["none.pem", "empty.pem"])
def test_invalid_ca_file_is_reported(rgw, tmp_path, ca):
    (tmp_path / "empty.pem").touch()
    with pytest.raises(InvalidArgument, match="certificates"):
        S3ObjectClient(rgw.connection(stores.ALICE, endpoint=rgw.tls_url, ca=tmp_path / ca))


def test_virtual_hosted_bucket_is_reached_through_a_proxy(rgw, bucket, proxy):
    port = rgw.url.rpartition(":")[2]
    endpoint = f"http://{stores.DNS_NAME}:{port}"
    objects = S3ObjectClient(rgw.connection(stores.ALICE, endpoint=endpoint, addressing="virtual", proxy=proxy.url))
    send_all_requests(
        objects, bucket, [sign_policy(bucket, stores.ALICE), sign_policy(bucket, stores.ALICE, version=4)]
    )
    assert all(target.startswith(f"http://{bucket}.{stores.DNS_NAME}:{port}/") for _, target in proxy.forwarded)
    assert ("POST", f"http://{bucket}.{stores.DNS_NAME}:{port}/") in proxy.forwarded


def test_tls_is_tunnelled_through_a_proxy(rgw, bucket, proxy):
    objects = S3ObjectClient(rgw.connection(stores.ALICE, endpoint=rgw.tls_url, ca=rgw.ca, proxy=proxy.url))
    send_all_requests(objects, bucket, [sign_policy(bucket, stores.ALICE)])
    assert {*proxy.forwarded} == {("CONNECT", rgw.tls_url.removeprefix("https://"))}


@pytest.mark.parametrize("endpoint", ["url", "tls_url"])
def test_proxy_is_sent_its_user_and_password(rgw, bucket, endpoint):
    with forwarding("Basic am9lOnBAc3Mgd29yZA==") as proxy:
        url = proxy.url.replace("//", "//joe:p%40ss%20word@")
        objects = S3ObjectClient(rgw.connection(stores.ALICE, endpoint=getattr(rgw, endpoint), ca=rgw.ca, proxy=url))
        send_all_requests(objects, bucket, [sign_policy(bucket, stores.ALICE)])
    assert proxy.forwarded


def temporary_credentials(rgw):
    """Temporary credentials of Alice, from RGW's token service."""
    key = {"aws_access_key_id": stores.ALICE.access_key_id, "aws_secret_access_key": stores.ALICE.secret_access_key}
    sts = boto3.client("sts", "us-east-1", endpoint_url=rgw.url, **key)
    credentials = sts.assume_role(RoleArn=f"arn:aws:iam:::role/{stores.ROLE}", RoleSessionName="alice")["Credentials"]
    sts.close()
    return Credentials(
        access_key_id=credentials["AccessKeyId"],
        secret_access_key=credentials["SecretAccessKey"],
        session_token=credentials["SessionToken"],
    )


def test_temporary_credentials_are_accepted(rgw, bucket):
    key = temporary_credentials(rgw)
    token = {"x-amz-security-token": key.session_token}
    policies = [sign_policy(bucket, key, token, version=version) for version in (2, 4)]
    send_all_requests(S3ObjectClient(rgw.connection(key)), bucket, policies)


def test_temporary_credentials_without_token_are_rejected(rgw, bucket):
    key = temporary_credentials(rgw)
    objects = S3ObjectClient(rgw.connection(Credentials(**{**vars(key), "session_token": None})))
    with pytest.raises(AccessDenied):
        objects.put(bucket, "key", PART)
    with pytest.raises(AccessDenied):
        objects.put(bucket, "win.part.0", PART, policy=sign_policy(bucket, key))


def test_public_object_is_read_without_key(rgw, bucket):
    objects = S3ObjectClient(rgw.connection(stores.ALICE))
    policy = sign_policy(bucket, stores.ALICE, {"acl": "public-read"})
    objects.put(bucket, "win.part.0", PART, policy=policy)
    objects.put(bucket, "private", PART)
    anonymous = S3ObjectClient(rgw.connection(None))
    assert anonymous.get(bucket, "win.part.0") == PART
    with pytest.raises(AccessDenied):
        anonymous.get(bucket, "private")
