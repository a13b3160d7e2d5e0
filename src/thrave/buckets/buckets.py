"""The contract of a place where bundles go, which every driver keeps and one test suite checks.

Bucket, key and object mean what they mean in Amazon S3. A driver never invents rights: who may write where has
been decided before it is called, from `owner` and from the upload policy.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from thrave.buckets.policy import UploadPolicy

NOBODY = "nobody"
"""The owner of a bucket that exists but that no account is known to own: everybody's "somebody else"."""


@dataclass(frozen=True)
class ObjectHead:
    """What is known of an object without reading it."""

    size: int
    """Bytes."""
    etag: str | None = None
    """The MD5 of its content in lower-case hex; None where the store keeps none."""


class Buckets(Protocol):
    """Buckets of one store.

    Every call may be made from several threads and processes at once, and may be repeated after a crash or a lost
    answer: the second time changes nothing. Every failure is a BucketError with S3's code.
    """

    def on_behalf_of(self, access_key_id: str) -> "Buckets":
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
