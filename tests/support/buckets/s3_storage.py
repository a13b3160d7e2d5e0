"""The Storage argument of BundleInstance, as the AWS CLI creates it."""

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta


def policy(bucket="my-bucket", prefix="winami", *, acl="ec2-bundle-read", life=timedelta(hours=24), **extra):
    """Return an upload policy as the AWS CLI writes it, in JSON."""
    conditions = [{"bucket": bucket}, {"acl": acl}, ["starts-with", "$key", prefix], *extra.get("conditions", ())]
    expiration = (datetime.now(UTC) + life).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return json.dumps({"expiration": expiration, "conditions": conditions}).encode()


def signature(wire_text, secret):
    return base64.b64encode(hmac.digest(secret.encode(), wire_text, hashlib.sha1)).decode()


def storage(key, *, bucket="my-bucket", prefix="winami", document=None, **changes):
    """The Storage argument of boto3's bundle_instance."""
    document = policy(bucket, prefix) if document is None else document
    s3 = {
        "AWSAccessKeyId": key.access_key_id,
        "Bucket": bucket,
        "Prefix": prefix,
        "UploadPolicy": document,
        "UploadPolicySignature": signature(base64.b64encode(document), key.secret_access_key),
    }
    return {"S3": {name: value for name, value in (s3 | changes).items() if value is not None}}
