"""An HTML-form upload (S3's POST): the caller's own policy and signature, and no key of the service's.

The form carries only the fields that the policy names (`UploadPolicy.form_fields`), then the file, as
multipart/form-data (RFC 7578). The parts around the content are small; the content itself is sent from where it lies.
Source: AWS S3 documentation, "POST Object" and "HTML form fields".

The XML documents of S3 that list and delete: read, and written.

Keys are asked for URL-encoded, because XML cannot hold every character that a key can; a store that does not encode
them does not say `EncodingType`. A store that knows ListObjects only (version 1) ignores `list-type` and names no
continuation token: the next page then begins after the last key, which both versions can be told.
Source: AWS S3 API Reference, ListObjectsV2, ListObjects, ListBuckets, DeleteObjects.

The objects of an S3-compatible store, read, written and deleted with one access key.

The commands use it with their user's own key; the service's drivers (`s3.py`) add the ownership of buckets. Every
request that needs more of a store than GET, PUT, HEAD, DELETE and a listing has a way without it.

An upload is proved by the ETag, which is the content's MD5 with S3 and every store of its kind; where it is not (keys
of AWS KMS), by a look at the object. A store that took other bytes than were sent, or none although it answered 200,
is a TransientError. Nothing here is sent twice (`retrying.py`).
"""

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from urllib.parse import unquote_plus
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from thrave.buckets.base import ObjectHead
from thrave.buckets.errors import BucketError, NoSuchBucket, NoSuchKey, StoreError, TransientError, error_from_response
from thrave.buckets.s3_client import SMALL, Buffer, Credentials, HttpResponse, HttpTransport, SignedClient, StoreConfig
from thrave.buckets.upload_policy import UploadPolicy
from thrave.concurrency import random_hex


def multipart(fields: Mapping[str, str], content: Buffer) -> tuple[str, Sequence[Buffer]]:
    """A form with a file, as its Content-Type and the pieces of its body.

    Args:
        fields: In their order; the names are the store's, the values whatever the policy says.
        content: The file's.
    """
    boundary = random_hex(16)  # cannot stand in any value, nor by chance in the content
    head = "".join(_field(boundary, name, value) for name, value in fields.items())
    opening = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="file"\r\n\r\n'
    closing = f"\r\n--{boundary}--\r\n"
    return f"multipart/form-data; boundary={boundary}", ((head + opening).encode(), content, closing.encode())


def _field(boundary: str, name: str, value: str) -> str:
    quoted = name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")  # as browsers do
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{quoted}"\r\n\r\n{value}\r\n'


KEYS_AT_ONCE = 1000
"""S3's limit for a page of a listing, and for one request to delete."""


@dataclass(frozen=True)
class Page:
    """A page of a listing: its keys or names, and how to ask for the next one."""

    names: Sequence[str]
    next: Mapping[str, str] | None


def read_keys(document: bytes) -> Page:
    """Read a page of ListObjectsV2, or of ListObjects.

    Raises:
        StoreError: The document is no listing, or does not say how to ask for the next page.
    """
    root = _root(document)
    encoded = _text(root, "EncodingType") == "url"
    keys = [unquote_plus(key) if encoded else key for key in _texts(root, "Contents", "Key")]
    if _text(root, "IsTruncated").strip().lower() != "true":
        return Page(keys, None)
    if token := _text(root, "NextContinuationToken"):
        return Page(keys, {"continuation-token": token})
    marker = _text(root, "NextMarker")
    last = (unquote_plus(marker) if encoded else marker) or next(reversed(keys), "")
    if not last:
        raise StoreError("UnexpectedResponse", 0, "The store's listing is cut off and does not say where it goes on")
    return Page(keys, {"start-after": last, "marker": last})


def read_buckets(document: bytes) -> Page:
    """Read a page of ListBuckets."""
    root = _root(document)
    token = _text(root, "ContinuationToken")
    return Page([*_texts(root, "Buckets", "Bucket", "Name")], {"continuation-token": token} if token else None)


def can_be_written(key: str) -> bool:
    """Whether an XML document can hold a key as it is."""
    return _NOT_IN_XML.search(key) is None


def write_delete(keys: Sequence[str]) -> bytes:
    """The document of DeleteObjects, which answers with what could not be deleted."""
    objects = "".join(f"<Object><Key>{escape(key)}</Key></Object>" for key in keys)
    return f'<Delete xmlns="{_NAMESPACE}">{objects}<Quiet>true</Quiet></Delete>'.encode()


def check_deleted(document: bytes) -> None:
    """Raise the first error of DeleteObjects' answer; that an object was not there is none."""
    for error in _root(document).iterfind("{*}Error"):
        code = _text(error, "Code")
        if code != "NoSuchKey":
            raise error_from_response(code, _DELETE_STATUSES.get(code, 403), f"{_text(error, 'Message')}")


def write_location(region: str) -> bytes:
    """The document of CreateBucket; none for the region that has no name."""
    if region == "us-east-1":
        return b""
    where = f"<LocationConstraint>{escape(region)}</LocationConstraint>"
    return f'<CreateBucketConfiguration xmlns="{_NAMESPACE}">{where}</CreateBucketConfiguration>'.encode()


_NOT_IN_XML = re.compile("[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


_DELETE_STATUSES = {"InternalError": 500, "SlowDown": 503, "ServiceUnavailable": 503}


def _root(document: bytes) -> ET.Element:
    try:
        return ET.fromstring(document)  # noqa: S314 (expat stops entity bombs itself, and the length is bounded)
    except (ET.ParseError, LookupError, ValueError):  # the last two: an encoding not known, or not supported
        raise StoreError("UnexpectedResponse", 0, "The store's response is no document of S3") from None


def _text(element: ET.Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}") or ""


def _texts(element: ET.Element, *path: str) -> Iterator[str]:
    for found in element.iterfind("/".join(f"{{*}}{name}" for name in path)):
        yield found.text or ""


WHOLE = 256 << 20
"""Bytes of the longest object that `get` reads; of a longer one `get_range` reads a piece at a time."""


_LACKING = frozenset({
    "BadRequest", "InvalidArgument", "InvalidRequest", "MalformedXML", "MethodNotAllowed", "NotImplemented",
    "UnexpectedResponse",
})  # fmt: skip


_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-")


_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class S3ObjectClient:
    """One store, in the name of one access key or of nobody. Safe to use from several threads."""

    def __init__(
        self, connection: StoreConfig, *, transport: HttpTransport | None = None, credentials: Credentials | None = None
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
        self._transport = transport or HttpTransport(connection)
        self._requests = SignedClient(connection, self._transport, credentials)

    def put(self, bucket: str, key: str, data: Buffer, *, policy: UploadPolicy | None = None) -> str | None:
        """See Buckets. Under a grant it is a form upload that the grant's signature alone allows."""
        digest = hashlib.md5(data, usedforsecurity=False)
        if policy is None:
            answer = self._put(bucket, key, data, digest)
        else:
            kind, body = multipart(policy.form_fields(key), data)
            url = self._connection.url(bucket)
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
        """See Buckets. Of a store that gives no ranges the whole object is read, if it is no longer than `WHOLE`."""
        headers = {"Range": f"bytes={start}-{start + length - 1}"}
        try:
            answer = self._requests.send("GET", bucket, key, headers=headers, limit=length)
        except StoreError as error:
            if error.code == "InvalidRange":  # it begins at the end, or behind it
                return b""
            if not _is_for_lack_of_it(error):
                raise
            return self.get(bucket, key)[start : start + length]
        if answer.status != 206:
            return answer.body[start : start + length]
        given = _CONTENT_RANGE.match(answer.headers.get("Content-Range", ""))
        if given and int(given[1]) != start:
            raise StoreError("UnexpectedResponse", 0, "The store sent another range of the object than was asked for")
        return answer.body

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """See Buckets."""
        return self._keys(bucket, prefix, KEYS_AT_ONCE)

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """See Buckets. Where the store does not delete many at once, one after the other."""
        named = [*keys]
        together = [key for key in named if can_be_written(key)]
        with suppress(NoSuchBucket):
            for start in range(0, len(together), KEYS_AT_ONCE):
                self._delete_together(bucket, together[start : start + KEYS_AT_ONCE])
            self._delete_singly(bucket, set(named).difference(together))

    def _delete_together(self, bucket: str, keys: Sequence[str]) -> None:
        body = write_delete(keys)
        headers = {"Content-MD5": md5_header(hashlib.md5(body, usedforsecurity=False))}
        try:
            answer = self._requests.send("POST", bucket, query={"delete": ""}, headers=headers, body=[body])
            check_deleted(answer.body)
        except BucketError as error:
            if not _is_for_lack_of_it(error):
                raise
            self._delete_singly(bucket, keys)

    def _delete_singly(self, bucket: str, keys: Iterable[str]) -> None:
        for key in keys:
            with suppress(NoSuchKey):
                self._requests.send("DELETE", bucket, key)

    def _put(
        self, bucket: str, key: str, data: Buffer, digest: "hashlib._Hash", headers: Mapping[str, str] | None = None
    ) -> HttpResponse:
        proof = {"Content-MD5": md5_header(digest)}
        try:
            return self._requests.send("PUT", bucket, key, headers={**(headers or {}), **proof}, body=[data])
        except StoreError as error:
            if headers or error.code not in ("NotImplemented", "InvalidDigest"):
                raise
        # A store without Content-MD5; its ETag, or a look at the object, is the proof.
        return self._requests.send("PUT", bucket, key, body=[data])

    def _proved(self, bucket: str, key: str, taken: str | None, sent: str, size: int) -> str | None:
        """The ETag, of an object that the store has as it was sent."""
        head = ObjectHead(size, taken)
        if taken is None:  # Ceph's answer to a form has no ETag
            head = self.head(bucket, key) or ObjectHead(-1)
        if head.size != size or head.etag not in (None, sent):
            raise TransientError("BadDigest", 400, "The store took other bytes than were sent")
        return head.etag

    def _keys(self, bucket: str, prefix: str, at_once: int) -> Iterator[str]:
        """The keys that begin with a prefix, asked for `at_once` at a time, in the newest way that the store knows."""
        query = {"prefix": prefix, "max-keys": str(at_once)}
        for option in ({"list-type": "2", "encoding-type": "url"}, {"list-type": "2"}):
            pages: Iterator[Sequence[str]] = self._pages(bucket, {**query, **option}, read_keys)
            try:
                first = next(pages)
            except BucketError as error:  # the listing is of another version, or has no encoding
                if not _is_for_lack_of_it(error):
                    raise
            else:
                pages = chain([first], pages)
                break
        else:
            pages = self._pages(bucket, query, read_keys)  # version 1
        for page in pages:
            yield from (key for key in page if key.startswith(prefix))

    def _pages(
        self, bucket: str | None, query: Mapping[str, str], read: Callable[[bytes], Page]
    ) -> Iterator[Sequence[str]]:
        following: Mapping[str, str] | None = {}
        asked = set[int]()  # by hash: of a long listing the tokens alone would take much memory
        while following is not None:
            page = read(self._requests.send("GET", bucket, query={**query, **following}).body)
            yield page.names
            asked.add(hash(frozenset(following.items())))
            if page.next is not None and hash(frozenset(page.next.items())) in asked:
                raise StoreError("UnexpectedResponse", 0, "The store gives the same page of a listing again and again")
            following = page.next


def _is_for_lack_of_it(error: BucketError) -> bool:
    """Whether a store may have refused a request because it lacks an optional feature of S3."""
    return error.code in _LACKING


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
