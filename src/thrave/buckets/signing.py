"""Signed requests to a store: which URL an object has, and the signature of AWS's version 4.

The signature is botocore's own. Its client is not used: that holds one access key and reads the user's environment, and
here one set of connections serves the service's key and its accounts' alike.

The content is not part of the signature (`UNSIGNED-PAYLOAD`): its MD5 is, as the header Content-MD5, which every store
checks. That costs one hash instead of two.
"""

import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlencode, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotocoreCredentials

from thrave.buckets.connection import Credentials, StoreConnection
from thrave.buckets.errors import InvalidArgument, TransientError
from thrave.buckets.naming import KEY_BYTES, check_bucket_name
from thrave.buckets.transport import Answer, Buffer, Transport

SMALL = 16 << 20
"""Bytes: no document of S3's is longer (1000 keys of a listing have at most 3 MiB, escaped)."""

_DOTS = re.compile(r"(?:.*/)?\.\.?(?:/.*)?", re.DOTALL)


class SignedRequests:
    """Requests to one store in the name of one access key, or of nobody."""

    def __init__(self, connection: StoreConnection, transport: Transport, credentials: Credentials | None) -> None:
        self._connection = connection
        self._transport = transport
        self._credentials = credentials

    def send(
        self,
        method: str,
        bucket: str | None,
        key: str = "",
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Sequence[Buffer] = (),
        limit: int = SMALL,
    ) -> Answer:
        """Send a request about an object, a bucket, or (None) all buckets.

        Raises:
            InvalidBucketName, InvalidArgument: There can be no such bucket or key.
            BucketError: See Transport.send.
        """
        url = object_url(self._connection, bucket, key)
        if query:
            url += f"?{urlencode(query, quote_via=quote, safe='-_.~')}"
        signed = self._signed(method, url, headers or {})
        answer = self._transport.send(method, url, signed, body, limit=limit)
        if answer.status != 204 and not any(name in answer.headers for name in ("Content-Length", "Transfer-Encoding")):
            # Every store says how long its answer is. Python takes a head that was cut off for one that ends there.
            raise TransientError("ServiceUnavailable", 503, "The head of the store's answer was cut off")
        return answer

    def _signed(self, method: str, url: str, headers: Mapping[str, str]) -> Mapping[str, str]:
        if self._credentials is None:
            return headers
        request = AWSRequest(method, url, headers=dict(headers))
        key = self._credentials
        known = BotocoreCredentials(key.access_key_id, key.secret_access_key, key.session_token)
        _UnsignedPayload(known, "s3", self._connection.region).add_auth(request)
        return dict(request.headers.items())


class _UnsignedPayload(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    def payload(self, _request: AWSRequest) -> str:
        return "UNSIGNED-PAYLOAD"


def object_url(connection: StoreConnection, bucket: str | None, key: str = "") -> str:
    """The URL of an object, of a bucket, or of the store.

    Raises:
        InvalidBucketName, InvalidArgument: There can be no such bucket or key.
    """
    if bucket is None:
        return f"{connection.endpoint.rstrip('/')}/"
    check_bucket_name(bucket)
    _check_key(key)
    endpoint, path = urlsplit(connection.endpoint), quote(key, safe="/-_.~")
    if connection.addressing == "virtual":
        return f"{endpoint.scheme}://{bucket}.{endpoint.netloc}/{path}"
    return f"{endpoint.scheme}://{endpoint.netloc}/{bucket}/{path}" if key else f"{endpoint.geturl()}/{bucket}"


def _check_key(key: str) -> None:
    try:
        fits = len(key.encode()) <= KEY_BYTES
    except UnicodeEncodeError:
        fits = False
    if not fits or _DOTS.fullmatch(key):  # servers and proxies on the way resolve dots
        raise InvalidArgument(f"No object can have a key like {key[:80]!r}: {KEY_BYTES} bytes, no segment . or ..")
