"""The signature of an upload policy: AWS's signature version 2 for forms, and version 4.

Either is made over the policy's base64 text, exactly as it was sent, with the secret of the bucket owner's access key.
Version 2 is base64(HMAC-SHA1(secret, text)). Version 4 is hex(HMAC-SHA256(key, text)) with a key derived for a day,
a region and a service, which the policy's own conditions name (`x-amz-credential`). Comparisons take the same time
wherever the difference lies. Source: AWS S3 documentation, "HTML forms (AWS signature version 2)" and
"Authenticating Requests: Browser-Based Uploads Using POST (AWS Signature Version 4)".
"""

import base64
import hmac
import re

from thrave.buckets.errors import InvalidArgument

_CREDENTIAL = re.compile(r"(?P<id>[^/]+)/(?P<date>[0-9]{8})/(?P<region>[^/]+)/s3/aws4_request")


def is_version_4(signature: str) -> bool:
    """Whether a signature has the form of version 4's (version 2's are 28 characters of base64)."""
    return re.fullmatch(r"[0-9a-f]{64}", signature) is not None


def signature_v2(text: str, secret: str) -> str:
    """The version 2 signature of a text with a secret."""
    return base64.b64encode(hmac.digest(secret.encode(), _bytes(text), "sha1")).decode()


def signs_v2(signature: str, text: str, secret: str) -> bool:
    """Whether this is the text's version 2 signature with this secret."""
    return hmac.compare_digest(signature_v2(text, secret).encode(), _bytes(signature))


def signature_v4(text: str, secret: str, date: str, region: str) -> str:
    """The version 4 signature of a text with a secret, for a day (yyyymmdd) and a region."""
    key = f"AWS4{secret}".encode()
    for word in (date, region, "s3", "aws4_request"):
        key = hmac.digest(key, word.encode(), "sha256")
    return hmac.digest(key, _bytes(text), "sha256").hex()


def signs_v4(signature: str, text: str, secret: str, credential: str) -> bool:
    """Whether this is the text's version 4 signature with this secret.

    Args:
        signature: 64 hex digits.
        text: The policy in base64.
        secret: The secret access key.
        credential: `<access key id>/<yyyymmdd>/<region>/s3/aws4_request`.

    Raises:
        InvalidArgument: The credential is of another form.
    """
    scope = _CREDENTIAL.fullmatch(credential)
    if scope is None:
        raise InvalidArgument('the Credential is mal-formed; expecting "<YOUR-AKID>/YYYYMMDD/REGION/s3/aws4_request".')
    expected = signature_v4(text, secret, scope["date"], scope["region"])
    return hmac.compare_digest(expected.encode(), _bytes(signature))


def _bytes(text: str) -> bytes:
    # What came over the wire may not be encodable; it matches nothing then, which is the right answer.
    return text.encode(errors="replace")
