"""Fuzz targets for input from untrusted sources: each accepts any bytes and may raise only our own errors.

`scripts/fuzz.py` runs them under atheris. A target that raises has found something; so has one that takes long or needs
much memory, which the fuzzer watches. The corpus is what the tests have: real manifests, policies and requests.
"""

import base64
import gzip
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from support.buckets.upload_policies import (
    ACCESS_KEY_ID,
    SECRET,
    bundle_document,
    document,
    encoded,
    signed_v2,
    signed_v4,
)
from support.bundles.sample_bundles import MemoryImage, bundle_of
from support.bundles.tar_streams import tar_of, with_checksum
from thrave.buckets.errors import BucketError
from thrave.buckets.upload_policy import UploadPolicy
from thrave.bundle.errors import BundleError
from thrave.bundle.gzip_stream import inflate
from thrave.bundle.manifest import read_manifest
from thrave.bundle.side_file import read_side_file
from thrave.bundle.tar_reader import image_runs
from thrave.bundle.tar_writer import TarMember
from thrave.ec2.actions import ACTIONS
from thrave.ec2.authentication import Ec2Request, authenticate
from thrave.ec2.errors import EC2Error
from thrave.ec2.protocol import ProtocolError, parse, read_form
from thrave.identity.accounts import AccessKey, KeyCache
from thrave.identity.errors import IdentityError
from thrave.identity.policies import parse_policy

VECTORS = Path(__file__).parents[1] / "data" / "vectors"
NOW = datetime(2026, 11, 23, 8, 26, 46, tzinfo=UTC)
KEY = AccessKey(
    access_key_id=ACCESS_KEY_ID, secret_access_key=SECRET, account_id="123456789012", status="Active", create_date=NOW
)


@dataclass(frozen=True)
class Target:
    """Something that takes what strangers send."""

    take: Callable[[bytes], object]
    corpus: tuple[bytes, ...]


def form(data: bytes) -> None:
    """A form, as every action's input."""
    with suppress(ProtocolError):
        fields = read_form(data)
        for name, action in ACTIONS.items():
            with suppress(ProtocolError):
                parse(action.service.operation(name), fields, action.also_required)


def authorization(data: bytes) -> None:
    """An Authorization header, the date beside it, a query string and a body: one a line."""
    header, date, query, body = (*data.split(b"\n", 3), b"", b"", b"", b"")[:4]
    names = ("host", "authorization", "x-amz-date")
    values = (b"127.0.0.1:8773", header, date)
    headers = tuple((name, value.decode("latin-1")) for name, value in zip(names, values, strict=True) if value)
    with suppress(EC2Error, ProtocolError):
        authenticate(Ec2Request("POST", "/", query, headers, body), {ACCESS_KEY_ID: KEY}.get, KeyCache(), NOW)


def upload_policy(data: bytes) -> None:
    """An upload policy's document, well signed in both ways."""
    text = base64.b64encode(data).decode()
    for signature in (signed_v2(text), signed_v4(text)):
        with suppress(BucketError):
            policy = UploadPolicy.verify(text, signature, access_key_id=ACCESS_KEY_ID, secret=SECRET)
            policy.check_bundle("my-bucket", "winami", now=NOW)


def iam_policy(data: bytes) -> None:
    """A user's policy."""
    with suppress(IdentityError):
        parse_policy(data.decode(errors="replace"))


def manifest(data: bytes) -> None:
    """A bundle's manifest."""
    with suppress(BundleError):
        read_manifest(data)


def side_file(data: bytes) -> None:
    """The file beside a manifest."""
    with suppress(BundleError):
        read_side_file(data)


def gzip_stream(data: bytes) -> None:
    """What the parts of a bundle hold, decrypted."""
    with suppress(BundleError):
        for _ in inflate([memoryview(data)]):
            pass


def tar_stream(data: bytes) -> None:
    """The same, inflate: a tar with the image. Each header gets its checksum, which a fuzzer does not guess."""
    blocks = [data[at : at + 512].ljust(512, b"\0") for at in range(0, len(data), 512)]
    with suppress(BundleError):
        for _ in image_runs((with_checksum(block) if block[257:262] == b"ustar" else block for block in blocks), 4096):
            pass


def _sparse_tar(*records: str) -> bytes:
    lines = b"".join(f"{len(record) + 4:02} {record}\n".encode() for record in records)
    return tar_of(lines, type=b"x")[:1024] + tar_of(bytes(512))


def _documents(*documents: dict[str, object]) -> tuple[bytes, ...]:
    return tuple(base64.b64decode(encoded(each)) for each in documents)


TARGETS = {
    "form": Target(
        form,
        (
            (
                b"Action=BundleInstance&Version=2016-11-15&InstanceId=i-12345678&DryRun=true&Storage.S3.Bucket=my-bucket"
                b"&Storage.S3.Prefix=winami&Storage.S3.UploadPolicy=e30%3D&Storage.S3.UploadPolicySignature=x"
            ),
            b"Filter.1.Name=state&Filter.1.Value.1=c%2A&BundleId.1=bun-1&BundleId=bun-2&MaxResults=5&NextToken=aS0w",
        ),
    ),
    "authorization": Target(
        authorization,
        (
            b"AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20261123/us-east-1/ec2/aws4_request, "
            b"SignedHeaders=host;x-amz-date, Signature=" + b"0" * 64 + b"\n20261123T082646Z\n\nAction=DescribeRegions",
            (
                b"\n\nX-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20261123%2Fus-east-1%2Fec2"
                b"%2Faws4_request&X-Amz-Date=20261123T082646Z&X-Amz-Expires=60&X-Amz-SignedHeaders=host&X-Amz-Signature=0"
            ),
            (
                b"\n\n\nAWSAccessKeyId=AKIAIOSFODNN7EXAMPLE&SignatureVersion=2&SignatureMethod=HmacSHA256&Signature=x"
                b"&Timestamp=2026-11-23T08%3A26%3A46Z"
            ),
            b"AWS4-HMAC-SHA256 Credential=\nMon, 23 Nov 2026 08:26:46 GMT",
        ),
    ),
    "upload-policy": Target(
        upload_policy,
        _documents(
            bundle_document("my-bucket", "winami"),
            document({"x-amz-date": "20151229T000000Z"}, ["content-length-range", 1, 10], ["eq", "$key", "winami"]),
        ),
    ),
    "iam-policy": Target(
        iam_policy,
        (
            (
                b'{"Version": "2012-10-17", "Id": "a", "Statement": [{"Sid": "b", "Effect": "Allow", "Action": "ec2:*",'
                b' "Resource": "*", "Condition": {"StringEquals": {"ec2:Region": ["us-east-1"]}, "IpAddress":'
                b' {"aws:SourceIp": "10.0.0.0/8"}, "Bool": {"aws:SecureTransport": "true"}, "DateLessThan":'
                b' {"aws:CurrentTime": "2030-01-01T00:00:00Z"}}}]}'
            ),
        ),
    ),
    "manifest": Target(manifest, tuple(path.read_bytes() for path in sorted(VECTORS.rglob("*.xml")))),
    "gzip": Target(
        gzip_stream,
        (gzip.compress(b"data" * 100), b"\x1f\x8b\x08\x1c" + bytes(6) + b"\1\0xname\0comment\0\3\0" + bytes(8)),
    ),
    "tar": Target(
        tar_stream,
        (
            tar_of(b"data" * 1024),
            b"".join(TarMember("disk", 4096, [(512 * at, 512) for at in range(0, 8, 2)]).header()) + bytes(8 * 512),
            _sparse_tar("GNU.sparse.size=4096", "GNU.sparse.map=512,512"),
            _sparse_tar("GNU.sparse.size=4096", "GNU.sparse.offset=0", "GNU.sparse.numbytes=512"),
            _sparse_tar("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=4096"),
        ),
    ),
    "side-file": Target(side_file, (bundle_of(MemoryImage(b"data" * 128, [(0, 512)])).side_file,)),
}
