"""Checks of upload policies: of either signature, and with the ACL of the AWS CLI's own.

With `upload_credentials = policy` the store judges them, as form uploads; else the service does, and
writes what they allow.
"""

import base64
import json
from datetime import datetime, timedelta

from thrave.buckets.upload_policy import UploadPolicy, signature_v2, signature_v4
from thrave.database import utc_now
from thrave.doctor.subject import Subject

_LIFE = timedelta(minutes=10)
_CLI_ACL = "ec2-bundle-read"  # AWS CLI, ec2 bundle-instance
Condition = dict[str, str] | list[str]


def version_2(subject: Subject) -> str:
    """Upload under a policy as the AWS CLI signs it, but with an ACL that every store knows."""
    text = _policy(subject, {"acl": "private"})
    return _upload(subject, text, signature_v2(text, subject.holder.credentials.secret_access_key))


def version_4(subject: Subject) -> str:
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


def cli_acl(subject: Subject) -> str:
    """Upload under a policy as the AWS CLI makes it."""
    text = _policy(subject, {"acl": _CLI_ACL})
    return _upload(subject, text, signature_v2(text, subject.holder.credentials.secret_access_key))


def _policy(subject: Subject, *conditions: Condition, now: datetime | None = None) -> str:
    own: tuple[Condition, ...] = ({"bucket": subject.bucket}, ["starts-with", "$key", subject.prefix])
    expiration = (now or utc_now()) + _LIFE
    document = {"expiration": f"{expiration:%Y-%m-%dT%H:%M:%SZ}", "conditions": [*own, *conditions]}
    return base64.b64encode(json.dumps(document).encode()).decode()


def _upload(subject: Subject, text: str, signature: str) -> str:
    key = subject.holder.credentials
    policy = UploadPolicy.verify(text, signature, access_key_id=key.access_key_id, secret=key.secret_access_key)
    subject.buckets.put(subject.bucket, f"{subject.prefix}.post", b"under a policy\n", grant=policy)
    return "judged by the store" if subject.by_owners_key else "judged by the service"
