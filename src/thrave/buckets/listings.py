"""The XML documents of S3 that list and delete: read, and written.

Keys are asked for URL-encoded, because XML cannot hold every character that a key can; a store that does not encode
them does not say `EncodingType`. A store that knows ListObjects only (version 1) ignores `list-type` and names no
continuation token: the next page then begins after the last key, which both versions can be told.
Source: AWS S3 API Reference, ListObjectsV2, ListObjects, ListBuckets, DeleteObjects.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_plus
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from thrave.buckets.errors import StoreError, error_of_store

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
            raise error_of_store(code, _DELETE_STATUSES.get(code, 403), f"{_text(error, 'Message')}")


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
