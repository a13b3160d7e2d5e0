"""Checks of the store: connection, TLS, clock, key, buckets, objects and upload policies.

Bucket and object checks do what a task does, with a few bytes under a prefix of their own. `clean_up` deletes them, and
the bucket if a check created it. An existing bucket gets no owner. With `upload_credentials = policy` the store
verifies upload policies as form uploads. Otherwise the service verifies them and uploads with its own key.
"""

import base64
import hashlib
import json
import shutil
import ssl
from collections.abc import Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPSConnection
from urllib.parse import SplitResult, urlsplit

from thrave.buckets.base import UNKNOWN_OWNER
from thrave.buckets.errors import BucketError, NoSuchBucket
from thrave.buckets.s3_client import MAX_DOCUMENT, Proxy
from thrave.buckets.upload_policy import UploadPolicy, signature_v2, signature_v4
from thrave.concurrency import utc_now
from thrave.doctor.check_context import STORE_TIMEOUT, CheckContext, CheckFailed, CheckSkipped

MAX_CLOCK_DIFFERENCE = 15 * 60
"""Seconds between the time of a signed request and the store's clock (AWS S3, RequestTimeTooSkewed)."""

MIN_CERTIFICATE_DAYS = 7
"""Remaining validity of the store's certificate: time to renew it."""

MIN_FREE_SPACE = 16 << 20
"""Free bytes of a disk with bucket directories: with less, not even the first part of a bundle is sure to fit."""

_CONTENT = b"thrave doctor was here\n"
_NEW_CONTENT = b"and has looked again\n"
_POLICY_LIFETIME = timedelta(minutes=10)
_CLI_ACL = "ec2-bundle-read"  # AWS CLI, ec2 bundle-instance

_Condition = dict[str, str] | list[str]


def check_available(context: CheckContext) -> str:
    """Send an unsigned request to the store; or check the free space of bucket directories."""
    if context.settings.store == "directory":
        return _check_free_space(context)
    try:
        context.transport.send("GET", context.connection.url(), {}, limit=MAX_DOCUMENT)
    except BucketError as error:
        if error.is_store_failure:
            raise
    return context.connection.endpoint


def _check_free_space(context: CheckContext) -> str:
    context.buckets.owner(context.bucket)
    folder = context.settings.directory.buckets
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_SPACE:
        raise CheckFailed(f"{folder} has {free >> 20} MiB free")
    return f"{folder}, {free >> 20} MiB free"


def check_tls(context: CheckContext) -> str:
    """Do a TLS handshake as every request does, and check how long the certificate is valid."""
    url = _s3_endpoint(context)
    if url.scheme != "https":
        raise CheckSkipped("the store uses plain HTTP")
    tls_context = ssl.create_default_context(cafile=context.connection.ca)
    host, port = url.hostname or "", url.port or 443
    connection = HTTPSConnection(host, port, timeout=STORE_TIMEOUT, context=tls_context)
    if context.connection.proxy is not None:
        proxy = Proxy.parse(context.connection.proxy)
        proxy_url = urlsplit(proxy.url)
        if proxy_url.scheme == "https":
            raise CheckSkipped("the proxy uses TLS itself; TLS inside TLS is not checked")
        connection = HTTPSConnection(
            proxy_url.hostname or "", proxy_url.port or 80, timeout=STORE_TIMEOUT, context=tls_context
        )
        connection.set_tunnel(host, port, dict(proxy.headers))
    with closing(connection):
        connection.connect()
        sock = connection.sock
        assert isinstance(sock, ssl.SSLSocket)
        certificate, version = sock.getpeercert() or {}, sock.version()
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)
    days = (until - utc_now()).days
    if days < MIN_CERTIFICATE_DAYS:
        raise CheckFailed(f"the certificate expires in {days} days, on {until:%Y-%m-%d}")
    return f"{version}, certificate valid for {days} days"


def check_key(context: CheckContext) -> str:
    """List buckets with the key that signs requests. A key that is denied the listing is known to the store, too."""
    _s3_endpoint(context)
    _, may_list = _send_signed_request(context)
    credentials = context.holder.credentials if context.uses_owner_keys else context.connection.current_credentials()
    assert credentials is not None
    return credentials.access_key_id + ("" if may_list else ", not allowed to list its buckets")


def check_clock(context: CheckContext) -> str:
    """Compare the Date header of a response with this machine's clock."""
    _s3_endpoint(context)
    headers, _ = _send_signed_request(context)
    date = headers.get("Date")
    if date is None:
        raise CheckSkipped("the response has no Date header")
    ahead = (parsedate_to_datetime(date) - utc_now()).total_seconds()
    if abs(ahead) > MAX_CLOCK_DIFFERENCE:
        raise CheckFailed(f"{ahead:+.0f} s from this machine's clock")
    return f"{ahead:+.0f} s"


def _send_signed_request(context: CheckContext) -> tuple[Mapping[str, str], bool]:
    """Return the headers of the response, and whether the key may list its buckets."""
    try:
        return context.requests.send("GET", None).headers, True
    except BucketError as error:
        if error.code not in ("AccessDenied", "MethodNotAllowed", "NotImplemented"):
            raise
        return error.headers, False


def _s3_endpoint(context: CheckContext) -> SplitResult:
    if context.settings.store != "s3":
        raise CheckSkipped(f"the store is {context.settings.store}, not s3")
    return urlsplit(context.connection.endpoint)


def check_create_bucket(context: CheckContext) -> str:
    """Create the bucket unless it exists."""
    found = context.buckets.owner(context.bucket)
    if found is not None and not context.uses_owner_keys:
        return f"{context.bucket} exists"
    context.buckets.create(context.bucket, context.holder.account_id, probe=f"{context.prefix}.probe")
    context.has_created_bucket = found is None
    return f"{context.bucket}, new" if context.has_created_bucket else f"{context.bucket} exists"


def check_owner(context: CheckContext) -> str:
    """Read the bucket's owner."""
    found = context.buckets.owner(context.bucket)
    if not context.has_created_bucket and not context.uses_owner_keys and found is not None:
        return (
            "none yet; an empty bucket is given to the first account that bundles into it"
            if found == UNKNOWN_OWNER
            else found
        )
    if found != context.holder.account_id:
        raise CheckFailed(f"the owner is {found}, expected {context.holder.account_id}")
    return found


def check_put(context: CheckContext) -> str:
    """Store an object with a signed request."""
    context.buckets.put(context.bucket, _key(context), _CONTENT)
    return f"{len(_CONTENT)} bytes"


def check_head(context: CheckContext) -> str:
    """Read the object's size and ETag."""
    found = context.buckets.head(context.bucket, _key(context))
    if found is None or found.size != len(_CONTENT):
        raise CheckFailed("the object is missing or has another size")
    if found.etag is None:
        return "size, no ETag"
    if found.etag != hashlib.md5(_CONTENT, usedforsecurity=False).hexdigest():
        raise CheckFailed("the ETag is not the MD5 of the object")
    return "size and ETag"


def check_ranged_read(context: CheckContext) -> str:
    """Read some bytes from the middle of the object."""
    if context.buckets.get_range(context.bucket, _key(context), 7, 6) != _CONTENT[7:13]:
        raise CheckFailed("the response has other bytes than requested")
    return "6 bytes"


def check_list(context: CheckContext) -> str:
    """List the objects with the prefix."""
    if [*context.buckets.list(context.bucket, _key(context))] != [_key(context)]:
        raise CheckFailed("the object is not listed")
    return "one object"


def check_overwrite(context: CheckContext) -> str:
    """Overwrite the object and read it."""
    context.buckets.put(context.bucket, _key(context), _NEW_CONTENT)
    if context.buckets.get(context.bucket, _key(context)) != _NEW_CONTENT:
        raise CheckFailed("the response had the old content")
    return "new content readable at once"


def check_conditional_put(context: CheckContext) -> str:
    """Store an object twice with `If-None-Match: *`; the second request must fail."""
    if context.settings.store == "directory":
        raise CheckSkipped("bucket directories create files exclusively")
    _s3_endpoint(context)
    once = {"If-None-Match": "*"}
    for _ in range(2):
        try:
            context.requests.send("PUT", context.bucket, f"{context.prefix}.once", headers=once, body=[_CONTENT])
        except BucketError as error:
            if error.code == "PreconditionFailed":
                return "the second request failed, as it must"
            raise
    raise CheckFailed("the store ignores If-None-Match")


def check_delete(context: CheckContext) -> str:
    """Delete every object, and check that none exists."""
    context.buckets.delete(context.bucket, _keys(context))
    if remaining := [key for key in _keys(context) if context.buckets.head(context.bucket, key) is not None]:
        raise CheckFailed(f"deleted objects still exist: {', '.join(remaining)}")
    return "deleted"


def check_post_v2(context: CheckContext) -> str:
    """Upload with a policy signed as the AWS CLI signs it, but with an ACL that every store supports."""
    text = _policy(context, {"acl": "private"})
    return _upload(context, text, signature_v2(text, context.holder.credentials.secret_access_key))


def check_post_v4(context: CheckContext) -> str:
    """Upload with a policy that has a signature of version 4."""
    now, key = utc_now(), context.holder.credentials
    date, region = f"{now:%Y%m%d}", context.settings.s3_region
    text = _policy(
        context,
        {"acl": "private"},
        {"x-amz-algorithm": "AWS4-HMAC-SHA256"},
        {"x-amz-credential": f"{key.access_key_id}/{date}/{region}/s3/aws4_request"},
        {"x-amz-date": f"{now:%Y%m%dT%H%M%SZ}"},
        now=now,
    )
    return _upload(context, text, signature_v4(text, key.secret_access_key, date, region))


def check_aws_cli_policy(context: CheckContext) -> str:
    """Upload with the policy that the AWS CLI creates."""
    text = _policy(context, {"acl": _CLI_ACL})
    return _upload(context, text, signature_v2(text, context.holder.credentials.secret_access_key))


def _policy(context: CheckContext, *conditions: _Condition, now: datetime | None = None) -> str:
    own: tuple[_Condition, ...] = ({"bucket": context.bucket}, ["starts-with", "$key", context.prefix])
    expiration = (now or utc_now()) + _POLICY_LIFETIME
    document = {"expiration": f"{expiration:%Y-%m-%dT%H:%M:%SZ}", "conditions": [*own, *conditions]}
    return base64.b64encode(json.dumps(document).encode()).decode()


def _upload(context: CheckContext, text: str, signature: str) -> str:
    key = context.holder.credentials
    policy = UploadPolicy.verify(text, signature, access_key_id=key.access_key_id, secret=key.secret_access_key)
    context.buckets.put(context.bucket, f"{context.prefix}.post", b"under a policy\n", policy=policy)
    return "verified by the store" if context.uses_owner_keys else "verified by the service"


def clean_up(context: CheckContext) -> str:
    """Delete the objects of all checks, and the bucket if a check created it."""
    with suppress(NoSuchBucket):
        context.buckets.delete(context.bucket, _keys(context))
        if context.has_created_bucket and not context.buckets.remove(context.bucket, context.holder.account_id):
            raise CheckFailed(f"the bucket {context.bucket} could not be removed")
    return "deleted"


def _keys(context: CheckContext) -> list[str]:
    """Keys of all objects that the checks store."""
    return [f"{context.prefix}.{name}" for name in ("put", "post", "once", "probe")]


def _key(context: CheckContext) -> str:
    return f"{context.prefix}.put"
