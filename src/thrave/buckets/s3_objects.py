"""Reads, writes, lists and deletes the objects of an S3-compatible store with one access key, and the XML for that.

Commands use `S3ObjectClient` with the user's key; the drivers in `s3_store` add the ownership of buckets. Each request
other than GET, PUT, HEAD, DELETE and listings has an alternative for stores without that feature. Nothing is retried
here (`retrying_store`).

Source: AWS S3 API Reference, ListObjectsV2, ListObjects, ListBuckets, DeleteObjects; "POST Object".
"""

# An upload is verified by its ETag, which is the MD5 of the content in S3 and all similar stores; if it is not (AWS KMS
# keys), by a HEAD request. If a store has other bytes than were sent, or none after a status 200, the error is a
# TransientError.
#
# Listings are requested URL-encoded, since XML cannot contain every character of a key. A store that does not encode
# sends no `EncodingType`. A store with ListObjects (version 1) only ignores `list-type` and returns no continuation
# token; then the next page begins after the last key, which both versions support.

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar
from urllib.parse import unquote_plus
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from thrave.buckets.base import ObjectHead
from thrave.buckets.errors import BucketError, NoSuchBucket, NoSuchKey, StoreError, TransientError, error_from_response
from thrave.buckets.s3_client import (
    MAX_DOCUMENT,
    Buffer,
    Credentials,
    HttpResponse,
    HttpTransport,
    SignedClient,
    StoreConfig,
)
from thrave.buckets.upload_policy import UploadPolicy
from thrave.concurrency import random_hex

_Entry = TypeVar("_Entry")

MAX_KEYS = 1000
"""S3's limit for a page of a listing, and for one DeleteObjects request."""

MAX_OBJECT = 256 << 20
"""Maximum bytes of an object that `get` reads; `get_range` reads longer objects in pieces."""

# Codes with which stores refuse a request that needs an optional feature.
_UNSUPPORTED_FEATURE = frozenset({
    "BadRequest", "InvalidArgument", "InvalidRequest", "MalformedXML", "MethodNotAllowed", "NotImplemented",
    "UnexpectedResponse",
})  # fmt: skip
_NOT_IN_XML = re.compile("[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_DELETE_STATUSES = {"InternalError": 500, "SlowDown": 503, "ServiceUnavailable": 503}
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-")
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


def encode_form(fields: Mapping[str, str], content: Buffer) -> tuple[str, Sequence[Buffer]]:
    """Encode an HTML form for an upload as multipart/form-data (RFC 7578).

    Args:
        fields: In the order of the form. Values come from the upload policy and may be any text.
        content: Content of the file; it is not copied.

    Returns:
        Content-Type, and the pieces of the body.
    """
    boundary = random_hex(16)  # random, so no value and no content has it
    head = "".join(_field(boundary, name, value) for name, value in fields.items())
    opening = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="file"\r\n\r\n'
    closing = f"\r\n--{boundary}--\r\n"
    return f"multipart/form-data; boundary={boundary}", ((head + opening).encode(), content, closing.encode())


def _field(boundary: str, name: str, value: str) -> str:
    quoted = name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")  # as browsers do
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{quoted}"\r\n\r\n{value}\r\n'


@dataclass(frozen=True)
class ListedObject:
    """An object in a listing, with size and time as the store sends them."""

    key: str
    size: str
    last_modified: str


@dataclass(frozen=True)
class Page(Generic[_Entry]):
    """A page of a listing.

    Attributes:
        entries: Objects or bucket names.
        next: Query parameters for the next page; None if this is the last one.
    """

    entries: Sequence[_Entry]
    next: Mapping[str, str] | None


def read_objects(document: bytes) -> Page[ListedObject]:
    """Parse a page of ListObjectsV2 or ListObjects.

    Raises:
        StoreError: The document is not a listing, or has no marker for the next page.
    """
    root = _parse(document)
    is_encoded = _text(root, "EncodingType") == "url"
    objects = [
        ListedObject(unquote_plus(key) if is_encoded else key, _text(entry, "Size"), _text(entry, "LastModified"))
        for entry in root.iterfind("{*}Contents")
        for key in _texts(entry, "Key")
    ]
    if _text(root, "IsTruncated").strip().lower() != "true":
        return Page(objects, None)
    if token := _text(root, "NextContinuationToken"):
        return Page(objects, {"continuation-token": token})
    marker = _text(root, "NextMarker")
    last = (unquote_plus(marker) if is_encoded else marker) or (objects[-1].key if objects else "")
    if not last:
        raise StoreError("UnexpectedResponse", 0, "The store's listing is truncated and has no marker to continue")
    return Page(objects, {"start-after": last, "marker": last})


def read_buckets(document: bytes) -> Page[str]:
    """Parse a page of ListBuckets."""
    root = _parse(document)
    token = _text(root, "ContinuationToken")
    return Page([*_texts(root, "Buckets", "Bucket", "Name")], {"continuation-token": token} if token else None)


def is_xml_text(key: str) -> bool:
    """Return whether an XML document can contain a key unchanged."""
    return _NOT_IN_XML.search(key) is None


def write_delete(keys: Sequence[str]) -> bytes:
    """Return the document of a DeleteObjects request whose response lists errors only."""
    objects = "".join(f"<Object><Key>{escape(key)}</Key></Object>" for key in keys)
    return f'<Delete xmlns="{_NAMESPACE}">{objects}<Quiet>true</Quiet></Delete>'.encode()


def check_deleted(document: bytes) -> None:
    """Raise the first error in a response of DeleteObjects, other than NoSuchKey."""
    for error in _parse(document).iterfind("{*}Error"):
        code = _text(error, "Code")
        if code != "NoSuchKey":
            raise error_from_response(code, _DELETE_STATUSES.get(code, 403), f"{_text(error, 'Message')}")


def write_location(region: str) -> bytes:
    """Return the document of a CreateBucket request; empty for us-east-1, which S3 does not accept in it."""
    if region == "us-east-1":
        return b""
    location = f"<LocationConstraint>{escape(region)}</LocationConstraint>"
    return f'<CreateBucketConfiguration xmlns="{_NAMESPACE}">{location}</CreateBucketConfiguration>'.encode()


def _parse(document: bytes) -> ET.Element:
    try:
        return ET.fromstring(document)  # noqa: S314 (expat limits entities, and the length is limited)
    except (ET.ParseError, LookupError, ValueError):  # the last two: an unknown or unsupported encoding
        raise StoreError("UnexpectedResponse", 0, "The store's response is not an XML document of S3") from None


def _text(element: ET.Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}") or ""


def _texts(element: ET.Element, *path: str) -> Iterator[str]:
    for found in element.iterfind("/".join(f"{{*}}{name}" for name in path)):
        yield found.text or ""


class S3ObjectClient:
    """The objects of one store, with one access key or without one. Thread-safe."""

    def __init__(
        self, config: StoreConfig, *, transport: HttpTransport | None = None, credentials: Credentials | None = None
    ) -> None:
        """Prepare the connections; none is opened yet.

        Args:
            config: The store.
            transport: Its connections, if several clients share them.
            credentials: The access key, instead of the one in `config`.

        Raises:
            StoreSettingError: A setting in `config` cannot be used.
        """
        self._config = config
        self._transport = transport or HttpTransport(config)
        self._requests = SignedClient(config, self._transport, credentials)

    def put(self, bucket: str, key: str, data: Buffer, *, policy: UploadPolicy | None = None) -> str | None:
        """See ObjectStore. With a policy the upload is an HTML form with the policy's signature, without our key."""
        digest = hashlib.md5(data, usedforsecurity=False)
        if policy is None:
            response = self._put(bucket, key, data, digest)
        else:
            content_type, body = encode_form(policy.form_fields(key), data)
            url = self._config.url(bucket)
            response = self._transport.send("POST", url, {"Content-Type": content_type}, body, limit=MAX_DOCUMENT)
        stored_md5, size = _md5_from_etag(response.headers), memoryview(data).nbytes
        return self._verify_upload(bucket, key, stored_md5, digest.hexdigest(), size)

    def head(self, bucket: str, key: str) -> ObjectHead | None:
        """See ObjectStore."""
        try:
            response = self._requests.send("HEAD", bucket, key)
        except (NoSuchKey, NoSuchBucket):
            return None
        return ObjectHead(size=response.content_length, etag=_md5_from_etag(response.headers))

    def get(self, bucket: str, key: str) -> bytes:
        """See ObjectStore."""
        return self._requests.send("GET", bucket, key, limit=MAX_OBJECT).body

    def get_range(self, bucket: str, key: str, start: int, length: int) -> bytes:
        """See ObjectStore. From a store without ranges the whole object is read, up to `MAX_OBJECT`."""
        headers = {"Range": f"bytes={start}-{start + length - 1}"}
        try:
            response = self._requests.send("GET", bucket, key, headers=headers, limit=length)
        except StoreError as error:
            if error.code == "InvalidRange":  # `start` is at or after the end
                return b""
            if not _is_unsupported_feature(error):
                raise
            return self.get(bucket, key)[start : start + length]
        if response.status != 206:
            return response.body[start : start + length]
        sent_range = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
        if sent_range and int(sent_range[1]) != start:
            raise StoreError("UnexpectedResponse", 0, "The store sent another range of the object than was requested")
        return response.body

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """See ObjectStore."""
        return (listed.key for listed in self.list_objects(bucket, prefix))

    def list_objects(self, bucket: str, prefix: str) -> Iterator[ListedObject]:
        """Yield each object whose key begins with a prefix, by pages of `MAX_KEYS`. Raises NoSuchBucket."""
        return self._objects(bucket, prefix, MAX_KEYS)

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """See ObjectStore. In a store without DeleteObjects each object is deleted by its own request."""
        all_keys = [*keys]
        batch_keys = [key for key in all_keys if is_xml_text(key)]
        with suppress(NoSuchBucket):
            for start in range(0, len(batch_keys), MAX_KEYS):
                self._delete_batch(bucket, batch_keys[start : start + MAX_KEYS])
            self._delete_each(bucket, set(all_keys).difference(batch_keys))

    def _delete_batch(self, bucket: str, keys: Sequence[str]) -> None:
        body = write_delete(keys)
        headers = {"Content-MD5": md5_header(hashlib.md5(body, usedforsecurity=False))}
        try:
            response = self._requests.send("POST", bucket, query={"delete": ""}, headers=headers, body=[body])
            check_deleted(response.body)
        except BucketError as error:
            if not _is_unsupported_feature(error):
                raise
            self._delete_each(bucket, keys)

    def _delete_each(self, bucket: str, keys: Iterable[str]) -> None:
        for key in keys:
            with suppress(NoSuchKey):
                self._requests.send("DELETE", bucket, key)

    def _put(
        self, bucket: str, key: str, data: Buffer, digest: "hashlib._Hash", headers: Mapping[str, str] | None = None
    ) -> HttpResponse:
        md5 = {"Content-MD5": md5_header(digest)}
        try:
            return self._requests.send("PUT", bucket, key, headers={**(headers or {}), **md5}, body=[data])
        except StoreError as error:
            if headers or error.code not in ("NotImplemented", "InvalidDigest"):
                raise
        # A store without Content-MD5; the upload is still verified by its ETag or a HEAD request.
        return self._requests.send("PUT", bucket, key, body=[data])

    def _verify_upload(self, bucket: str, key: str, stored_md5: str | None, md5: str, size: int) -> str | None:
        """Return the ETag of an uploaded object. Raises TransientError if the object is not as it was sent."""
        head = ObjectHead(size, stored_md5)
        if stored_md5 is None:  # Ceph's response to a form has no ETag
            head = self.head(bucket, key) or ObjectHead(-1)
        if head.size != size or head.etag not in (None, md5):
            raise TransientError("BadDigest", 400, "The store received other bytes than were sent")
        return head.etag

    def _objects(self, bucket: str, prefix: str, page_size: int) -> Iterator[ListedObject]:
        """Yield the objects whose keys begin with a prefix, with the newest listing that the store supports."""
        query = {"prefix": prefix, "max-keys": str(page_size)}
        for option in ({"list-type": "2", "encoding-type": "url"}, {"list-type": "2"}):
            pages = self._pages(bucket, {**query, **option}, read_objects)
            try:
                first = next(pages)
            except BucketError as error:  # no version 2, or no encoding
                if not _is_unsupported_feature(error):
                    raise
            else:
                listed = chain([first], pages)
                break
        else:
            listed = chain(self._pages(bucket, query, read_objects))  # version 1
        for page in listed:
            yield from (entry for entry in page if entry.key.startswith(prefix))

    def _pages(
        self, bucket: str | None, query: Mapping[str, str], read: Callable[[bytes], Page[_Entry]]
    ) -> Iterator[Sequence[_Entry]]:
        following: Mapping[str, str] | None = {}
        requested = set[int]()  # hashes, since the tokens of a long listing would take much memory
        while following is not None:
            page = read(self._requests.send("GET", bucket, query={**query, **following}).body)
            yield page.entries
            requested.add(hash(frozenset(following.items())))
            if page.next is not None and hash(frozenset(page.next.items())) in requested:
                raise StoreError("UnexpectedResponse", 0, "The store repeats the same page of a listing")
            following = page.next


def _is_unsupported_feature(error: BucketError) -> bool:
    """Return whether a store may have refused a request because it lacks an optional feature of S3."""
    return error.code in _UNSUPPORTED_FEATURE


def md5_header(digest: "hashlib._Hash") -> str:
    """Return the value of the header Content-MD5."""
    return base64.b64encode(digest.digest()).decode()


def _md5_from_etag(headers: Mapping[str, str]) -> str | None:
    """Return the MD5 in an ETag; None if the ETag is not an MD5, by its form or because the object is encrypted."""
    has_kms_key = headers.get("x-amz-server-side-encryption", "").startswith("aws:kms")
    if has_kms_key or "x-amz-server-side-encryption-customer-algorithm" in headers:
        return None
    match = _MD5.fullmatch(headers.get("ETag", ""))
    return match[1] if match else None
