"""The objects of an S3-compatible store, read, written and deleted with one access key.

It is what a command does with its user's own key, and what the service's drivers stand on (`s3.py`), which add whose a
bucket is. An upload is proved by the ETag, which is the content's MD5 with S3 and every store of its kind; where it is
not (keys of AWS KMS), by a look at the object. A store that took other bytes than were sent, or none although it
answered 200, is a TransientError. Nothing here is tried twice (`retrying.py`).
"""

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress

from thrave.buckets.buckets import ObjectHead
from thrave.buckets.connection import Credentials, StoreConnection
from thrave.buckets.errors import NoSuchBucket, NoSuchKey, StoreError, TransientError
from thrave.buckets.forms import multipart
from thrave.buckets.listings import KEYS_AT_ONCE, Page, can_be_written, check_deleted, read_keys, write_delete
from thrave.buckets.policy import UploadPolicy
from thrave.buckets.signing import SMALL, SignedRequests, object_url
from thrave.buckets.transport import Answer, Buffer, Transport

WHOLE = 256 << 20
"""Bytes of the longest object that `get` reads; of a longer one `get_range` reads a piece at a time."""

_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class S3Objects:
    """One store, in the name of one access key or of nobody. Safe to use from several threads."""

    def __init__(
        self, connection: StoreConnection, *, transport: Transport | None = None, credentials: Credentials | None = None
    ) -> None:
        """Open nothing yet.

        Args:
            connection: The store.
            transport: The connections to it, where several share them.
            credentials: Whose right is used, if not the connection's own.

        Raises:
            InvalidArgument: The connection is none.
        """
        self._connection = connection
        self._transport = transport or Transport(connection)
        self._requests = SignedRequests(connection, self._transport, credentials or connection.credentials)

    def put(self, bucket: str, key: str, data: Buffer, *, grant: UploadPolicy | None = None) -> str | None:
        """See Buckets. Under a grant it is a form upload that the grant's signature alone allows."""
        digest = hashlib.md5(data, usedforsecurity=False)
        if grant is None:
            answer = self._put(bucket, key, data, {"Content-MD5": md5_header(digest)})
        else:
            kind, body = multipart(grant.form_fields(key), data)
            url = object_url(self._connection, bucket)
            answer = self._transport.send("POST", url, {"Content-Type": kind}, body, limit=SMALL)
        return self._proved(bucket, key, _md5_of(answer.headers), digest.hexdigest(), memoryview(data).nbytes)

    def head(self, bucket: str, key: str) -> ObjectHead | None:
        """See Buckets."""
        try:
            answer = self._requests.send("HEAD", bucket, key)
        except (NoSuchKey, NoSuchBucket):
            return None
        return ObjectHead(size=answer.content_length, etag=_md5_of(answer.headers))

    def get(self, bucket: str, key: str) -> bytes:
        """See Buckets."""
        return self._requests.send("GET", bucket, key, limit=WHOLE).body

    def get_range(self, bucket: str, key: str, start: int, length: int) -> bytes:
        """See Buckets."""
        headers = {"Range": f"bytes={start}-{start + length - 1}"}
        try:
            answer = self._requests.send("GET", bucket, key, headers=headers, limit=length)
        except StoreError as error:
            if error.code == "InvalidRange":  # it begins at the end, or behind it
                return b""
            raise
        if answer.status != 206:
            raise StoreError("NotImplemented", 501, "The store does not give a range of an object")
        return answer.body

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """See Buckets."""
        query = {"list-type": "2", "encoding-type": "url", "prefix": prefix, "max-keys": str(KEYS_AT_ONCE)}
        yield from self._pages(bucket, query, read_keys)

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """See Buckets."""
        named = [*keys]
        together = [key for key in named if can_be_written(key)]
        with suppress(NoSuchBucket, NoSuchKey):
            for start in range(0, len(together), KEYS_AT_ONCE):
                body = write_delete(together[start : start + KEYS_AT_ONCE])
                headers = {"Content-MD5": md5_header(hashlib.md5(body, usedforsecurity=False))}
                check_deleted(
                    self._requests.send("POST", bucket, query={"delete": ""}, headers=headers, body=[body]).body
                )
            for key in set(named).difference(together):
                self._requests.send("DELETE", bucket, key)

    def _put(self, bucket: str, key: str, data: Buffer, headers: Mapping[str, str]) -> Answer:
        return self._requests.send("PUT", bucket, key, headers=headers, body=[data])

    def _proved(self, bucket: str, key: str, taken: str | None, sent: str, size: int) -> str | None:
        """The ETag, of an object that the store has as it was sent."""
        head = ObjectHead(size, taken)
        if taken is None:  # Ceph's answer to a form has no ETag
            head = self.head(bucket, key) or ObjectHead(-1)
        if head.size != size or head.etag not in (None, sent):
            raise TransientError("BadDigest", 400, "The store took other bytes than were sent")
        return head.etag

    def _pages(self, bucket: str | None, query: Mapping[str, str], read: Callable[[bytes], Page]) -> Iterator[str]:
        following: Mapping[str, str] | None = {}
        while following is not None:
            page = read(self._requests.send("GET", bucket, query={**query, **following}).body)
            yield from page.names
            following = page.next


def md5_header(digest: "hashlib._Hash") -> str:
    """What Content-MD5 says of a content."""
    return base64.b64encode(digest.digest()).decode()


def _md5_of(headers: Mapping[str, str]) -> str | None:
    """The MD5 that an ETag is; None where the store says that it is none, or it has the form of none."""
    by_key = headers.get("x-amz-server-side-encryption", "").startswith("aws:kms")
    if by_key or "x-amz-server-side-encryption-customer-algorithm" in headers:
        return None
    match = _MD5.fullmatch(headers.get("ETag", ""))
    return match[1] if match else None
