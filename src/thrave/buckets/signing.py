"""Signed requests to a store: the signature of AWS's version 4.

The signature is botocore's own. Its client is not used: that holds one access key and reads the user's environment, and
here one set of connections serves the service's key and its accounts' alike.

The content is not part of the signature (`UNSIGNED-PAYLOAD`): its MD5 is, as the header Content-MD5, which every store
checks. That costs one hash instead of two.
"""

from collections.abc import Mapping, Sequence

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotocoreCredentials

from thrave.buckets.connection import Credentials, StoreConnection
from thrave.buckets.errors import BucketError, TransientError
from thrave.buckets.transport import Answer, Buffer, Transport

SMALL = 16 << 20
"""Bytes: no document of S3's is longer (1000 keys of a listing have at most 3 MiB, escaped)."""


class SignedRequests:
    """Requests to one store, signed with one access key, or not signed."""

    def __init__(
        self, connection: StoreConnection, transport: Transport, credentials: Credentials | None = None
    ) -> None:
        """Sign with `credentials`, or else with those that the connection has at the time of each request."""
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
        url = self._connection.url(bucket, key, query)
        credentials = self._credentials or self._connection.current_credentials()
        signed = self._signed(method, url, headers or {}, credentials)
        try:
            answer = self._transport.send(method, url, signed, body, limit=limit)
        except BucketError as error:
            error.access_key_id = credentials.access_key_id if credentials else None
            raise
        if answer.status != 204 and not any(name in answer.headers for name in ("Content-Length", "Transfer-Encoding")):
            # Every store says how long its answer is. Python takes a head that was cut off for one that ends there.
            raise TransientError("ConnectionLost", 0, "The headers of the store's response were cut off")
        return answer

    def _signed(self, method: str, url: str, headers: Mapping[str, str], key: Credentials | None) -> Mapping[str, str]:
        if key is None:
            return headers
        request = AWSRequest(method, url, headers=dict(headers))
        known = BotocoreCredentials(key.access_key_id, key.secret_access_key, key.session_token)
        _UnsignedPayload(known, "s3", self._connection.region).add_auth(request)
        return dict(request.headers.items())


class _UnsignedPayload(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    def payload(self, _request: AWSRequest) -> str:
        return "UNSIGNED-PAYLOAD"
