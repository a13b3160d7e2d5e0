"""The contract of a place where bundles go, which every driver keeps and one test suite checks.

Bucket, key and object mean what they mean in Amazon S3. A driver never invents rights: who may write where has
been decided before it is called, from `owner` and from the upload policy.

Which names a new bucket may have, which a URL can hold, and where in a bucket a bundle lies.

The rules for new buckets are Amazon S3's ("General purpose bucket naming rules"). Buckets that exist may have other
names: until 2018 S3 allowed capitals, underscores and 255 characters, and an access point's alias is used like a
bucket. They are read whatever their name, if a URL can hold it. A bundle's prefix may hold folders:
`backups/win1` is the bundle `win1` in the folder `backups/`, and only the last segment is the bundle's name, which
stands in the manifest, in the tar header and in the names of the parts. Old readers handed those names to a shell or
joined them to paths, so each segment is plain ASCII, `[A-Za-z0-9_][A-Za-z0-9._-]*`: no `..`, no option, nothing to
quote. Pure rules: nothing here looks at a bucket.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from thrave.buckets.errors import InvalidArgument, InvalidBucketName
from thrave.buckets.upload_policy import UploadPolicy

UNKNOWN_OWNER = "nobody"
"""The owner of a bucket that exists but that no account is known to own: everybody's "somebody else"."""


@dataclass(frozen=True)
class ObjectHead:
    """What is known of an object without reading it."""

    size: int
    """Bytes."""
    etag: str | None = None
    """The MD5 of its content in lower-case hex; None where the store keeps none."""


class ObjectStore(Protocol):
    """Buckets of one store.

    Every call may be made from several threads and processes at once, and may be repeated after a crash or a lost
    answer: the second time changes nothing. Every failure is a BucketError with S3's code.
    """

    def on_behalf_of(self, access_key_id: str) -> "ObjectStore":
        """This store, as the holder of an access key has it; itself where the store does not know accounts' keys.

        Raises:
            AccessDenied: The service does not hold that key.
        """
        ...

    def owner(self, bucket: str) -> str | None:
        """The account id of a bucket's owner; None if there is no such bucket; NOBODY if nobody is known to own it.

        A name that no bucket can have is None too.
        """
        ...

    def create(self, bucket: str, owner: str, *, probe: str | None = None) -> bool:
        """Create a bucket for an account if it does not exist; say whether this call created it.

        A bucket that exists is looked at first, so that no right to list or create buckets is needed for it. Of several
        that create it at once for different accounts exactly one succeeds. A call that was cut off leaves a bucket that
        the next call can use.

        Args:
            bucket: Its name.
            owner: The account.
            probe: The key of an object that is going to be put. Where an access key may not look at the bucket, the
                store is asked whether it may put this object; nothing is written.

        Raises:
            BucketAlreadyExists: It is somebody else's, or nobody's.
            InvalidBucketName: It does not exist, and no new bucket can have that name.
            AccessDenied: The access key may not use the bucket, or it does not exist and may not be created.
        """
        ...

    def remove(self, bucket: str, owner: str) -> bool:
        """Remove an account's bucket if it holds nothing; say whether it is gone.

        A bucket that holds an object, or belongs to somebody else, stays as it is, with its owner. One that does not
        exist is gone. The caller sees to it that nobody creates the bucket meanwhile.

        Raises:
            AccessDenied: The access key may not remove it.
        """
        ...

    def put(self, bucket: str, key: str, data: bytes | memoryview, *, grant: UploadPolicy | None = None) -> str | None:
        """Store an object, in the place of the one that may be there.

        When it returns, the object is on stable storage, whole. When it fails, readers find what was there before,
        never a part of the new one. `data` is not kept after the return.

        Args:
            bucket: Must exist.
            key: Any that S3 takes and the driver can hold; the contract asks for those of bundles.
            data: The whole content.
            grant: The upload policy under which it is stored; nothing that it does not allow is ever written. Without
                it the service's own right is used.

        Returns:
            The ETag of what was stored, as `ObjectHead.etag` has it.

        Raises:
            NoSuchBucket: There is none.
            InvalidArgument: The driver cannot hold an object of that key; the message says why.
            AccessDenied, EntityTooLarge, EntityTooSmall: The grant does not allow it.
            TransientError: The store did not answer, or has not got what was sent.
        """
        ...

    def head(self, bucket: str, key: str) -> ObjectHead | None:
        """What is known of an object; None if there is no such object or bucket."""
        ...

    def get(self, bucket: str, key: str) -> bytes:
        """The content of an object that is no longer than a part may be.

        Raises:
            NoSuchKey, NoSuchBucket: There is none.
        """
        ...

    def get_range(self, bucket: str, key: str, start: int, length: int) -> bytes:
        """`length` bytes of an object from `start` on: fewer at its end, none behind it. `length` is 1 or more.

        Raises:
            NoSuchKey, NoSuchBucket: There is none.
        """
        ...

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """The keys that begin with a prefix, each once.

        S3 lists them in the order of their UTF-8 bytes; SeaweedFS puts folders first.

        Raises:
            NoSuchBucket: There is none.
        """
        ...

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """Delete exactly these objects; one that is not there is fine, as is a bucket that is not there."""
        ...


KEY_BYTES = 1024  # S3's limit for a key in UTF-8


NAME_CHARACTERS = 100  # the name field of a tar header (POSIX ustar)


_LONGEST_ENDING = len(".manifest.json")


_LONGEST_BUCKET_NAME = 255  # of S3's buckets in us-east-1 before March 2018


_DOTS = re.compile(r"(?:.*/)?\.\.?(?:/.*)?", re.DOTALL)


_BUCKET = re.compile(r"[a-z0-9](?:[a-z0-9-]|\.(?!\.))*[a-z0-9]")


_IP_ADDRESS = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}")


_RESERVED_STARTS = ("xn--", "sthree-", "amzn-s3-demo-")


_RESERVED_ENDS = ("-s3alias", "--ol-s3", ".mrap", "--x-s3", "--table-s3")


_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def check_bucket_name(bucket: str) -> None:
    """Refuse a name that S3 would not let a new bucket have.

    Raises:
        InvalidBucketName: 3 to 63 characters of `a-z0-9.-`, not like an IP address, not reserved by AWS.
    """
    fits = 3 <= len(bucket) <= 63 and _BUCKET.fullmatch(bucket) and not _IP_ADDRESS.fullmatch(bucket)
    if not fits or bucket.startswith(_RESERVED_STARTS) or bucket.endswith(_RESERVED_ENDS):
        raise InvalidBucketName("The specified bucket is not valid.")


def check_readable_bucket_name(bucket: str) -> None:
    """Refuse a name that no URL can hold unchanged; every bucket that exists has another.

    Raises:
        InvalidBucketName: 1 to 255 printable ASCII characters, no `/`, not `.` and not `..`.
    """
    fits = 1 <= len(bucket) <= _LONGEST_BUCKET_NAME and bucket.isascii() and bucket.isprintable()
    if not fits or " " in bucket or "/" in bucket or bucket in (".", ".."):
        raise InvalidBucketName("The specified bucket is not valid.")


def check_key(key: str) -> None:
    """Refuse a key that no URL can hold unchanged; empty stands for the bucket itself.

    Raises:
        InvalidArgument: It has more than 1,024 bytes, is no UTF-8, or has a segment `.` or `..`.
    """
    try:
        fits = len(key.encode()) <= KEY_BYTES
    except UnicodeEncodeError:
        fits = False
    if not fits or _DOTS.fullmatch(key):  # servers and proxies on the way resolve dots
        raise InvalidArgument(f"No object can have a key like {key[:80]!r}: {KEY_BYTES} bytes, no segment . or ..")


def split_prefix(prefix: str) -> tuple[str, str]:
    """Take a bundle's prefix apart into its folder and its name.

    Args:
        prefix: `win1` or `backups/2026/win1`.

    Returns:
        The folder, empty or ending in `/`, and the bundle's name; the bundle's files are `folder + name + …`.

    Raises:
        InvalidArgument: A segment is empty, begins with a dot or dash or has other characters; or it is too long.
    """
    *folders, name = prefix.split("/")
    if not all(_SEGMENT.fullmatch(segment) for segment in (*folders, name)):
        raise InvalidArgument(
            "A bundle's prefix has segments of A-Z a-z 0-9 . _ - between slashes, and none begins with a dot or a dash"
        )
    if len(name) > NAME_CHARACTERS or len(prefix) > KEY_BYTES - _LONGEST_ENDING:
        raise InvalidArgument(f"A bundle's name has at most {NAME_CHARACTERS} characters, its keys {KEY_BYTES}")
    return "".join(folder + "/" for folder in folders), name
