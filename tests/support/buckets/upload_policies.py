"""Upload policies in the forms that clients send, signed as clients sign them."""

import base64
import hashlib
import hmac
import json

from support.buckets.s3_storage import signature
from thrave.buckets.upload_policy import UploadPolicy

SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
ACCESS_KEY_ID = "AKIAIOSFODNN7EXAMPLE"
FAR = "2099-01-01T00:00:00Z"


def encoded(document):
    """A policy (a document, JSON text or bytes) in base64."""
    if not isinstance(document, (str, bytes)):
        document = json.dumps(document)
    return base64.b64encode(document.encode() if isinstance(document, str) else document).decode()


def signed_v2(text, secret=SECRET):
    """The version 2 signature of a text."""
    return signature(text.encode(), secret)


def signed_v4(text, secret=SECRET, date="20151229", region="us-east-1"):
    """The version 4 signature of a text."""
    key = b"AWS4" + secret.encode()
    for word in (date, region, "s3", "aws4_request"):
        key = hmac.new(key, word.encode(), hashlib.sha256).digest()
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def document(*conditions, expiration=FAR):
    """Return the document of a policy."""
    return {"expiration": expiration, "conditions": [*conditions]}


def bundle_document(bucket, prefix, expiration=FAR, acl="ec2-bundle-read"):
    """Return the document that the AWS CLI creates."""
    return document({"bucket": bucket}, {"acl": acl}, ["starts-with", "$key", prefix], expiration=expiration)


def verified(policy=None):
    """Encode, sign and verify a policy document, by default that of bundle `win1` in the bucket `my-bucket`."""
    text = encoded(bundle_document("my-bucket", "win1") if policy is None else policy)
    return UploadPolicy.verify(text, signed_v2(text), access_key_id=ACCESS_KEY_ID, secret=SECRET)
