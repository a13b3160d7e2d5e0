"""The contract `ObjectStore`, and the rules for names of buckets, keys and bundles.

Bucket, key and object have their meaning in Amazon S3. The driver enforces the upload policy in `put`, and the bucket's
owner in `create` and `remove`. IAM policies are checked by the callers. One test suite checks all drivers
(`tests/buckets/test_store_contract.py`); `DRIVERS` in `tests/buckets/conftest.py` lists them.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from thrave.buckets.errors import InvalidArgument, InvalidBucketName
from thrave.buckets.upload_policy import UploadPolicy

UNKNOWN_OWNER = "nobody"
"""Owner of an existing bucket that no known account owns; differs from every account id."""


@dataclass(frozen=True)
class ObjectHead:
    """Metadata of an object."""

    size: int
    """Bytes."""
    etag: str | None = None
    """MD5 of the content in lower-case hex; None if the store keeps none."""


class ObjectStore(Protocol):
    """Buckets of one object store.

    All methods are safe to call from several threads and processes at once. They may be repeated after a crash or a
    lost response: the second call changes nothing. Every failure is a BucketError with S3's code.

    The caller may lose the right to write while a call waits for a connection or sends a body. So a driver that sends
    requests over a network calls `write_guard.store_guard.check` before each request and each piece of a body, and
    raises what the check raises. DirectoryStore makes no check: between the check that RetryingStore makes right before
    the call and the system calls on the local disk, it waits for no connection and no response.
    """

    def on_behalf_of(self, access_key_id: str) -> "ObjectStore":
        """Return this store with the credentials of an access key; the same store if it does not use accounts' keys.

        Raises:
            AccessDenied: The service does not have that key.
        """
        ...

    def owner(self, bucket: str) -> str | None:
        """Return the account id of a bucket's owner.

        Returns:
            None if there is no such bucket, also for an invalid name; UNKNOWN_OWNER if no known account owns it.
        """
        ...

    def create(self, bucket: str, owner: str, *, probe: str | None = None) -> bool:
        """Create a bucket for an account if it does not exist; return whether this call created it.

        An existing bucket is checked first, so that the key needs no permission to list or create buckets. If several
        calls create it at once for different accounts, exactly one succeeds. After an interrupted call the next call
        can use the bucket. Calls `store_guard.check` before each request, also between the requests of one call.

        Args:
            bucket: Bucket name.
            owner: The account.
            probe: Key of an object that is to be stored. If the access key may not read the bucket, the store is asked
                whether the key may put this object; nothing is written.

        Raises:
            BucketAlreadyExists: Another account or no known account owns the bucket.
            InvalidBucketName: The bucket does not exist, and no new bucket can have that name.
            AccessDenied: The access key may not use the bucket, or may not create the missing bucket.
        """
        ...

    def remove(self, bucket: str, owner: str) -> bool:
        """Remove an account's bucket if it is empty; return whether it no longer exists.

        A bucket with an object, or of another account, does not change. A bucket that does not exist counts as removed.
        The caller must ensure that no other process creates the bucket at the same time. Calls `store_guard.check` as
        `create`.

        Raises:
            AccessDenied: The access key may not remove the bucket.
        """
        ...

    def put(self, bucket: str, key: str, data: bytes | memoryview, *, policy: UploadPolicy | None = None) -> str | None:
        """Store an object, and replace an existing one.

        After the return, the complete object is on stable storage. After a failure, readers find the previous object,
        never a part of the new one. The store keeps no reference to `data`. Calls `store_guard.check` before the
        request and before each piece of `data`.

        Args:
            bucket: An existing bucket.
            key: A key that S3 and the driver accept; all drivers accept the keys of bundles.
            data: The whole content.
            policy: The upload policy under which the object is stored. Nothing that it does not allow is written.
                Without a policy the service's own permission is used.

        Returns:
            The MD5 that the store reports for the stored object, after the driver has compared it with the MD5 of
            `data`; None if the store reports none. A task relies on it and does not read such a part back.

        Raises:
            NoSuchBucket: The bucket does not exist.
            InvalidArgument: The driver cannot store an object with that key; the message says why.
            AccessDenied, EntityTooLarge, EntityTooSmall: The policy does not allow the upload.
            TransientError: The store did not respond, or received other data.
        """
        ...

    def head(self, bucket: str, key: str) -> ObjectHead | None:
        """Return an object's metadata; None if there is no such object or bucket."""
        ...

    def get(self, bucket: str, key: str) -> bytes:
        """Return the content of an object that is at most as long as a part.

        Raises:
            NoSuchKey, NoSuchBucket: The object or the bucket does not exist.
        """
        ...

    def get_range(self, bucket: str, key: str, start: int, length: int) -> bytes:
        """Return up to `length` bytes of an object: fewer at its end, none after its end.

        Args:
            bucket: Bucket name.
            key: Key of the object.
            start: Offset of the first byte.
            length: 1 or more.

        Raises:
            NoSuchKey, NoSuchBucket: The object or the bucket does not exist.
        """
        ...

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """Yield each key that starts with a prefix once.

        S3 sorts keys by their UTF-8 bytes; SeaweedFS lists folders first.

        Raises:
            NoSuchBucket: The bucket does not exist.
        """
        ...

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """Delete exactly these objects. Missing objects and a missing bucket are no error.

        Calls `store_guard.check` before each request and each piece of its body; there may be several requests.
        """
        ...


MAX_KEY_BYTES = 1024  # S3's limit for a key in UTF-8
MAX_NAME_CHARACTERS = 100  # the name field of a tar header (POSIX ustar)

_MAX_ENDING = len(".manifest.json")
_MAX_BUCKET_NAME = 255  # of S3's buckets in us-east-1 before March 2018
_DOTS = re.compile(r"(?:.*/)?\.\.?(?:/.*)?", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9](?:[a-z0-9-]|\.(?!\.))*[a-z0-9]")
_IP_ADDRESS = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}")
_RESERVED_STARTS = ("xn--", "sthree-", "amzn-s3-demo-")
_RESERVED_ENDS = ("-s3alias", "--ol-s3", ".mrap", "--x-s3", "--table-s3")

# Old readers passed names of bundles to a shell or joined them to paths. So a segment of a prefix is plain ASCII
# without `..`, without a leading dash, and without characters that need quoting.
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def check_bucket_name(bucket: str) -> None:
    """Refuse a name that Amazon S3 does not allow for a new bucket.

    Raises:
        InvalidBucketName: Valid are 3 to 63 characters of `a-z0-9.-`, not like an IP address, not reserved by AWS.

    Source: Amazon S3, "General purpose bucket naming rules".
    """
    is_valid = 3 <= len(bucket) <= 63 and _BUCKET.fullmatch(bucket) and not _IP_ADDRESS.fullmatch(bucket)
    if not is_valid or bucket.startswith(_RESERVED_STARTS) or bucket.endswith(_RESERVED_ENDS):
        raise InvalidBucketName("The specified bucket is not valid.")


def check_readable_bucket_name(bucket: str) -> None:
    """Refuse a name that no existing bucket can have, since no URL can contain it unchanged.

    Existing buckets may have names that new ones may not: until 2018 S3 allowed capitals, underscores and 255
    characters, and an access point's alias is used like a bucket.

    Raises:
        InvalidBucketName: Valid are 1 to 255 printable ASCII characters, no blank, no `/`, not `.` and not `..`.
    """
    is_valid = 1 <= len(bucket) <= _MAX_BUCKET_NAME and bucket.isascii() and bucket.isprintable()
    if not is_valid or " " in bucket or "/" in bucket or bucket in (".", ".."):
        raise InvalidBucketName("The specified bucket is not valid.")


def check_key(key: str) -> None:
    """Refuse a key that no URL can contain unchanged. An empty key means the bucket itself.

    Raises:
        InvalidArgument: The key has more than 1,024 bytes, is not UTF-8, or has a segment `.` or `..`.
    """
    try:
        is_valid = len(key.encode()) <= MAX_KEY_BYTES
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid or _DOTS.fullmatch(key):  # servers and proxies between us and the store resolve dots
        raise InvalidArgument(f"No object can have a key like {key[:80]!r}: {MAX_KEY_BYTES} bytes, no segment . or ..")


def split_prefix(prefix: str) -> tuple[str, str]:
    """Split a bundle's prefix into folder and name.

    The name is in the manifest, in the tar header and in the names of the parts.

    Args:
        prefix: `win1` or `backups/2026/win1`.

    Returns:
        The folder, empty or with a `/` at its end, and the bundle's name. Keys start with `folder + name`.

    Raises:
        InvalidArgument: A segment is empty, starts with a dot or a dash, or has other characters; or the prefix is too
            long.
    """
    *folders, name = prefix.split("/")
    if not all(_SEGMENT.fullmatch(segment) for segment in (*folders, name)):
        raise InvalidArgument(
            "A bundle's prefix has segments of A-Z a-z 0-9 . _ - between slashes, and none begins with a dot or a dash"
        )
    if len(name) > MAX_NAME_CHARACTERS or len(prefix) > MAX_KEY_BYTES - _MAX_ENDING:
        raise InvalidArgument(f"A bundle's name has at most {MAX_NAME_CHARACTERS} characters, its keys {MAX_KEY_BYTES}")
    return "".join(folder + "/" for folder in folders), name
