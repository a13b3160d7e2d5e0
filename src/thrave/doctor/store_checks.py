"""Checks of upload policies: of either signature, and with the ACL of the AWS CLI's own.

With `upload_credentials = policy` the store judges them, as form uploads; else the service does, and
writes what they allow.

Checks of a bucket and its objects: everything that a task does there, with a few bytes under a prefix of its own.

`clean_up` takes everything away again, and the bucket if it was made for this. A bucket that exists stays as it is:
nobody becomes its owner.

Checks of the store as a whole: that it answers, TLS, its clock, and that it knows the key. Nothing is written.
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
from thrave.buckets.s3_client import SMALL, Proxy
from thrave.buckets.upload_policy import UploadPolicy, signature_v2, signature_v4
from thrave.database import utc_now
from thrave.doctor.check_context import STORE_SECONDS, CheckContext, CheckFailed, CheckSkipped

_LIFE = timedelta(minutes=10)


_CLI_ACL = "ec2-bundle-read"  # AWS CLI, ec2 bundle-instance


Condition = dict[str, str] | list[str]


def version_2(subject: CheckContext) -> str:
    """Upload under a policy as the AWS CLI signs it, but with an ACL that every store knows."""
    text = _policy(subject, {"acl": "private"})
    return _upload(subject, text, signature_v2(text, subject.holder.credentials.secret_access_key))


def version_4(subject: CheckContext) -> str:
    """Upload under a policy with a signature of version 4."""
    now, key = utc_now(), subject.holder.credentials
    date, region = f"{now:%Y%m%d}", subject.settings.s3_region
    text = _policy(
        subject,
        {"acl": "private"},
        {"x-amz-algorithm": "AWS4-HMAC-SHA256"},
        {"x-amz-credential": f"{key.access_key_id}/{date}/{region}/s3/aws4_request"},
        {"x-amz-date": f"{now:%Y%m%dT%H%M%SZ}"},
        now=now,
    )
    return _upload(subject, text, signature_v4(text, key.secret_access_key, date, region))


def cli_acl(subject: CheckContext) -> str:
    """Upload under a policy as the AWS CLI makes it."""
    text = _policy(subject, {"acl": _CLI_ACL})
    return _upload(subject, text, signature_v2(text, subject.holder.credentials.secret_access_key))


def _policy(subject: CheckContext, *conditions: Condition, now: datetime | None = None) -> str:
    own: tuple[Condition, ...] = ({"bucket": subject.bucket}, ["starts-with", "$key", subject.prefix])
    expiration = (now or utc_now()) + _LIFE
    document = {"expiration": f"{expiration:%Y-%m-%dT%H:%M:%SZ}", "conditions": [*own, *conditions]}
    return base64.b64encode(json.dumps(document).encode()).decode()


def _upload(subject: CheckContext, text: str, signature: str) -> str:
    key = subject.holder.credentials
    policy = UploadPolicy.verify(text, signature, access_key_id=key.access_key_id, secret=key.secret_access_key)
    subject.buckets.put(subject.bucket, f"{subject.prefix}.post", b"under a policy\n", grant=policy)
    return "judged by the store" if subject.by_owners_key else "judged by the service"


_CONTENT = b"thrave doctor was here\n"


_NEW_CONTENT = b"and has looked again\n"


def create(subject: CheckContext) -> str:
    """Create the bucket, if it is not there."""
    found = subject.buckets.owner(subject.bucket)
    if found is not None and not subject.by_owners_key:
        return f"{subject.bucket} was there"
    subject.buckets.create(subject.bucket, subject.holder.account_id, probe=f"{subject.prefix}.probe")
    subject.has_made_bucket = found is None
    return f"{subject.bucket}, new" if subject.has_made_bucket else f"{subject.bucket} was there"


def owner(subject: CheckContext) -> str:
    """Ask whose it is."""
    found = subject.buckets.owner(subject.bucket)
    if not subject.has_made_bucket and not subject.by_owners_key and found is not None:
        return "nobody yet: the first account that bundles into it, if it is empty" if found == UNKNOWN_OWNER else found
    if found != subject.holder.account_id:
        raise CheckFailed(f"its owner is shown as {found}, not as {subject.holder.account_id}")
    return found


def put(subject: CheckContext) -> str:
    """Store an object, signed."""
    subject.buckets.put(subject.bucket, _key(subject), _CONTENT)
    return f"{len(_CONTENT)} bytes"


def head(subject: CheckContext) -> str:
    """Ask for its size and ETag."""
    found = subject.buckets.head(subject.bucket, _key(subject))
    if found is None or found.size != len(_CONTENT):
        raise CheckFailed("the object is not there as it was stored")
    if found.etag is None:
        return "size, no ETag"
    if found.etag != hashlib.md5(_CONTENT, usedforsecurity=False).hexdigest():
        raise CheckFailed("its ETag is of another content")
    return "size and ETag"


def ranged(subject: CheckContext) -> str:
    """Read some bytes out of its middle."""
    if subject.buckets.get_range(subject.bucket, _key(subject), 7, 6) != _CONTENT[7:13]:
        raise CheckFailed("other bytes came than were asked for")
    return "6 bytes of it"


def listed(subject: CheckContext) -> str:
    """List what is under the prefix."""
    if [*subject.buckets.list(subject.bucket, _key(subject))] != [_key(subject)]:
        raise CheckFailed("the object is not listed")
    return "one object"


def overwrite(subject: CheckContext) -> str:
    """Store another content in its place, and read it."""
    subject.buckets.put(subject.bucket, _key(subject), _NEW_CONTENT)
    if subject.buckets.get(subject.bucket, _key(subject)) != _NEW_CONTENT:
        raise CheckFailed("the old content came back")
    return "the new content at once"


def conditional(subject: CheckContext) -> str:
    """Store an object twice, if it is not there (`If-None-Match: *`): the second time must be refused."""
    if subject.settings.store != "s3":
        raise CheckSkipped("files are created once, or not at all")
    once = {"If-None-Match": "*"}
    for _ in range(2):
        try:
            subject.requests.send("PUT", subject.bucket, f"{subject.prefix}.once", headers=once, body=[_CONTENT])
        except BucketError as error:
            if error.code == "PreconditionFailed":
                return "the second one was refused"
            raise
    raise CheckFailed("the store ignores If-None-Match")


def delete(subject: CheckContext) -> str:
    """Delete everything that was stored, and look."""
    subject.buckets.delete(subject.bucket, _keys(subject))
    if left := [key for key in _keys(subject) if subject.buckets.head(subject.bucket, key) is not None]:
        raise CheckFailed(f"what was deleted is still there: {', '.join(left)}")
    return "nothing is left"


def clean_up(subject: CheckContext) -> str:
    """Take away what the trial has left, and its bucket."""
    with suppress(NoSuchBucket):
        subject.buckets.delete(subject.bucket, _keys(subject))
        if subject.has_made_bucket and not subject.buckets.remove(subject.bucket, subject.holder.account_id):
            raise CheckFailed(f"the bucket {subject.bucket} could not be removed")
    return "nothing is left"


def _keys(subject: CheckContext) -> list[str]:
    """Of every object that the checks store."""
    return [f"{subject.prefix}.{name}" for name in ("put", "post", "once", "probe")]


def _key(subject: CheckContext) -> str:
    return f"{subject.prefix}.put"


CLOCK_SECONDS = 15 * 60
"""How far the time of a signed request may be from the store's (AWS S3, RequestTimeTooSkewed)."""


LEAST_DAYS = 7
"""Of the store's certificate: fewer, and it may expire before somebody has renewed it."""


LEAST_FREE = 16 << 20
"""Bytes of a disk with bucket directories: with fewer not even the first part of a bundle is sure to fit."""


def answers(subject: CheckContext) -> str:
    """Ask a store for anything at all, unsigned; or see that a disk has room."""
    if subject.settings.store == "directory":
        return _room(subject)
    try:
        subject.transport.send("GET", subject.connection.url(), {}, limit=SMALL)
    except BucketError as error:
        if error.is_the_stores:
            raise
    return subject.connection.endpoint


def _room(subject: CheckContext) -> str:
    subject.buckets.owner(subject.bucket)
    folder = subject.settings.directory.buckets
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        raise CheckFailed(f"{folder} has {free >> 20} MiB left")
    return f"{folder}, {free >> 20} MiB free"


def tls(subject: CheckContext) -> str:
    """Shake hands as every request does, and see how long the certificate lives."""
    url = _s3(subject)
    if url.scheme != "https":
        raise CheckSkipped("the store is called by plain HTTP")
    context = ssl.create_default_context(cafile=subject.connection.ca)
    host, port = url.hostname or "", url.port or 443
    line = HTTPSConnection(host, port, timeout=STORE_SECONDS, context=context)
    if subject.connection.proxy is not None:
        proxy = Proxy.read(subject.connection.proxy)
        through = urlsplit(proxy.url)
        if through.scheme == "https":
            raise CheckSkipped("the proxy is called by TLS, too")
        line = HTTPSConnection(through.hostname or "", through.port or 80, timeout=STORE_SECONDS, context=context)
        line.set_tunnel(host, port, dict(proxy.headers))
    with closing(line):
        line.connect()
        secure = line.sock
        assert isinstance(secure, ssl.SSLSocket)
        certificate, version = secure.getpeercert() or {}, secure.version()
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)
    days = (until - utc_now()).days
    if days < LEAST_DAYS:
        raise CheckFailed(f"the certificate ends in {days} days, on {until:%Y-%m-%d}")
    return f"{version}, certificate for {days} days"


def key(subject: CheckContext) -> str:
    """List the buckets of the key with which requests are signed. A key that may not list them is known, too."""
    _s3(subject)
    _, may_list = _ask(subject)
    credentials = subject.holder.credentials if subject.by_owners_key else subject.connection.current_credentials()
    assert credentials is not None
    return credentials.access_key_id + ("" if may_list else ", which may not list its buckets")


def clock(subject: CheckContext) -> str:
    """Compare the time of an answer with ours."""
    _s3(subject)
    headers, _ = _ask(subject)
    said = headers.get("Date")
    if said is None:
        raise CheckSkipped("the store does not tell its time")
    ahead = (parsedate_to_datetime(said) - utc_now()).total_seconds()
    if abs(ahead) > CLOCK_SECONDS:
        raise CheckFailed(f"{ahead:+.0f} s from ours")
    return f"{ahead:+.0f} s"


def _ask(subject: CheckContext) -> tuple[Mapping[str, str], bool]:
    """Send a signed request; return the headers of the answer, and whether the key may list its buckets."""
    try:
        return subject.requests.send("GET", None).headers, True
    except BucketError as error:
        if error.code not in ("AccessDenied", "MethodNotAllowed", "NotImplemented"):
            raise
        return error.headers, False


def _s3(subject: CheckContext) -> SplitResult:
    if subject.settings.store != "s3":
        raise CheckSkipped("the store is a directory")
    return urlsplit(subject.connection.endpoint)
