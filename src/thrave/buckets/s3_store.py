"""Buckets in an S3-compatible store, and who owns them.

There are two ways for a service:

- `OwnerKeyStore` (`upload_credentials = policy`): the store knows the accounts' access keys too. A bucket belongs to
  the store's user whose key signed the upload policy; that key creates the bucket and cleans up. A bundle is uploaded
  with the policy's own signature alone, so that the store itself judges it.
- `ServiceKeyStore` (`upload_credentials = service`): the store knows the service's key only, and every bucket belongs
to
  the service there. The service evaluates the policy itself (`policy.py`). A bucket belongs to the account that its
  object `.thrave-owner` names; no bundle can have that name, and no listing shows it.

Both look at the bucket first. Buckets are created, and listed, only when that does not answer the question, so that a
key which may use one existing bucket is enough (docs/reference/store-rights.md).
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Self

from thrave.buckets.base import UNKNOWN_OWNER, ObjectHead, check_bucket_name
from thrave.buckets.errors import (
    AccessDenied,
    BucketAlreadyExists,
    BucketError,
    InvalidBucketName,
    Kind,
    NoSuchBucket,
    NoSuchKey,
    StoreError,
    TransientError,
)
from thrave.buckets.s3_client import Buffer, Credentials, HttpTransport, StoreConfig
from thrave.buckets.s3_objects import S3ObjectClient, md5_header, read_buckets, write_location
from thrave.buckets.upload_policy import UploadPolicy
from thrave.concurrency import new_lock, utc_now

OWNER_KEY = ".thrave-owner"
"""The object of a bucket that names the account that it belongs to, where all buckets are the service's."""
_OWNER_BYTES = 1024  # most that the object may have
Lock = Callable[[str], AbstractContextManager[object]]
"""Held by one at a time for each name."""

_LOCKS = tuple(new_lock() for _ in range(64))  # of this process; names share them


def _lock_of_this_process(name: str) -> AbstractContextManager[object]:
    return _LOCKS[hash(name) % len(_LOCKS)]


@dataclass(frozen=True)
class KeyOwner:
    """Who holds an access key of ours."""

    account_id: str
    credentials: Credentials


class _Sight(Enum):
    """What a store lets a key see of a bucket."""

    NONE = "it does not exist"
    OURS = "the key may use it"
    OTHERS = "it exists and is not among the key's own"
    HIDDEN = "the key may neither look at it nor list its own buckets"


class _S3Buckets(S3ObjectClient):
    """What both ways have in common: whether a bucket exists, its creation and its removal."""

    def head(self, bucket: str, key: str) -> ObjectHead | None:
        """See Buckets.

        To a key that may not list the bucket, S3 refuses a missing object like one that the key may not read. Where an
        object beside it can be read after it was put, the refused one is missing.
        """
        try:
            return super().head(bucket, key)
        except AccessDenied:
            if not self._may_read_beside(bucket, key):
                raise
        return None

    def _may_read_beside(self, bucket: str, key: str) -> bool:
        folder, slash, name = key.rpartition("/")
        beside = f"{folder}{slash}{name.partition('.')[0]}"
        if (bucket, beside) not in self._readable:
            probe = f"{key}.probe"
            self._put(bucket, probe, b"", hashlib.md5(b"", usedforsecurity=False))
            try:
                if super().head(bucket, probe) is None:
                    return False
            except AccessDenied:
                return False
            finally:
                with suppress(AccessDenied):
                    self._delete_singly(bucket, [probe])
            self._readable.add((bucket, beside))
        return True

    @cached_property
    def _readable(self) -> set[tuple[str, str]]:
        """Buckets, and beginnings of keys in them, that the key may read."""
        return set()

    def _exists(self, bucket: str) -> bool:
        """Whether there is a bucket that the key may use.

        Raises:
            AccessDenied: It may exist, and the key may not look at it.
        """
        try:
            self._requests.send("HEAD", bucket)
        except (NoSuchBucket, NoSuchKey):  # an answer to HEAD has no words
            return False
        return True

    def _is_ours(self, bucket: str) -> bool:
        """Whether the store's user whose key we use owns a bucket.

        Raises:
            BucketError: The key may not list its buckets, or the store does not.
        """
        return any(bucket in page for page in self._pages(None, {"prefix": bucket}, read_buckets))

    def _create(self, bucket: str) -> bool:
        """Create a bucket; say whether this request did. Nobody has it, as far as is known.

        Raises:
            BucketAlreadyExists: It exists by now. It may be ours all the same: SeaweedFS says so, too, to whoever
                creates a bucket at the same time with the same key.
        """
        location = write_location(self._connection.region)
        for body in [[location], []] if location else [[]]:
            try:
                self._requests.send("PUT", bucket, body=body)
            except NoSuchBucket:  # SeaweedFS, of one that another call is just creating
                raise TransientError("OperationAborted", 409, "The bucket is being created by another call") from None
            except StoreError as error:
                if error.code == "BucketAlreadyOwnedByYou":
                    return False
                if not body or error.code not in ("NotImplemented", "MalformedXML"):
                    raise
            else:
                return True
        raise AssertionError("the last attempt returns or raises")

    def _is_empty(self, bucket: str) -> bool:
        return all(key == OWNER_KEY for key in self._keys(bucket, "", 2))

    def _remove(self, bucket: str) -> bool:
        """Remove an empty bucket; say whether it is gone. The store itself refuses to remove one that is not empty."""
        try:
            self._requests.send("DELETE", bucket)
        except (NoSuchBucket, NoSuchKey):
            return True
        except StoreError as error:
            if error.code == "BucketNotEmpty":
                return False
            raise
        return True


class OwnerKeyStore(_S3Buckets):
    """The buckets of a store that knows our accounts' access keys; `upload_credentials = policy`."""

    def __init__(
        self,
        connection: StoreConfig,
        find_holder: Callable[[str], KeyOwner | None],
        *,
        transport: HttpTransport | None = None,
        holder: KeyOwner | None = None,
    ) -> None:
        """Act for a holder of a key, or with the connection's own key.

        Args:
            connection: The store.
            find_holder: Who holds the access key of an id; None if nobody does.
            transport: The connections to it, where several share them.
            holder: In whose name.
        """
        super().__init__(connection, transport=transport, credentials=holder.credentials if holder else None)
        self._find_holder = find_holder
        self._holder = holder

    def on_behalf_of(self, access_key_id: str) -> "OwnerKeyStore":
        """See Buckets."""
        holder = self._find_holder(access_key_id)
        if holder is None:
            raise AccessDenied(f"The service does not hold the access key {access_key_id}")
        return OwnerKeyStore(self._connection, self._find_holder, transport=self._transport, holder=holder)

    def owner(self, bucket: str) -> str | None:
        """See Buckets. Of the accounts it knows the one on whose behalf it acts."""
        ours = UNKNOWN_OWNER if self._holder is None else self._holder.account_id
        sight = self._look(bucket)
        return {_Sight.NONE: None, _Sight.OTHERS: UNKNOWN_OWNER, _Sight.OURS: ours, _Sight.HIDDEN: ours}[sight]

    def create(self, bucket: str, owner: str, *, probe: str | None = None) -> bool:
        """See Buckets. The owner must be the account on whose behalf it acts."""
        if self._holder is None or self._holder.account_id != owner:
            raise AccessDenied("A bucket is created with the access key of its owner, and the service acts for another")
        sight = self._look(bucket)
        if sight is _Sight.HIDDEN and probe is not None:
            self._check_rights(bucket, probe)
        if sight is _Sight.OTHERS:
            raise BucketAlreadyExists
        if sight is not _Sight.NONE:
            return False
        check_bucket_name(bucket)
        made = False
        with suppress(BucketAlreadyExists):  # the look that follows tells who has it
            made = self._create(bucket)
        found = self.owner(bucket)
        if found is None:
            raise TransientError("NoSuchBucket", 404, "The store has not created the bucket though it said so")
        if found != owner:
            raise BucketAlreadyExists
        return made

    def remove(self, bucket: str, owner: str) -> bool:
        """See Buckets."""
        if self._holder is None or self._holder.account_id != owner:
            raise AccessDenied("A bucket is removed with the access key of its owner, and the service acts for another")
        try:  # SeaweedFS removes a bucket that is not empty, too
            return self._is_empty(bucket) and self._remove(bucket)
        except NoSuchBucket:
            return True

    def put(self, bucket: str, key: str, data: Buffer, *, policy: UploadPolicy | None = None) -> str | None:
        """See Buckets."""
        _check_policy(policy, bucket, key, data)
        return super().put(bucket, key, data, policy=policy)

    def _look(self, bucket: str) -> "_Sight":
        """What the store lets the key see of a bucket."""
        try:
            return _Sight.OURS if self._exists(bucket) else _Sight.NONE
        except InvalidBucketName:
            return _Sight.NONE
        except AccessDenied:
            try:
                if self._is_ours(bucket):
                    return _Sight.OURS
            except BucketError as error:
                if error.code not in ("AccessDenied", "MethodNotAllowed", "NotImplemented"):
                    raise
                return _Sight.HIDDEN
            return _Sight.OTHERS if _could_be_created(bucket) else _Sight.NONE

    def _check_rights(self, bucket: str, probe: str) -> None:
        """Ask the store whether the key may put an object.

        The object is sent with the digest of another content, so that a store which allows it refuses it as damaged,
        and nothing is written.

        Raises:
            AccessDenied: The key may not.
        """
        other = md5_header(hashlib.md5(b"", usedforsecurity=False))
        try:
            self._requests.send("PUT", bucket, probe, headers={"Content-MD5": other}, body=[b"\n"])
        except BucketError as error:
            if error.code not in ("BadDigest", "InvalidDigest"):
                raise
        else:
            self._delete_singly(bucket, [probe])  # a store that does not check digests


class ServiceKeyStore(_S3Buckets):
    """The buckets of a store that knows the service's access key only; `upload_credentials = service`."""

    def __init__(
        self, connection: StoreConfig, *, transport: HttpTransport | None = None, lock: Lock = _lock_of_this_process
    ) -> None:
        """Use the connection's own key.

        Args:
            connection: The store.
            transport: The connections to it, where several share them.
            lock: Held while a bucket is given an owner. Stores that know conditional writes (`If-None-Match`) do not
                need it; for others it must hold between all processes that claim buckets.
        """
        super().__init__(connection, transport=transport)
        self._lock = lock

    def on_behalf_of(self, _access_key_id: str) -> Self:
        """See Buckets."""
        return self

    def owner(self, bucket: str) -> str | None:
        """See Buckets."""
        try:
            return self._named_owner(bucket) or UNKNOWN_OWNER
        except (NoSuchBucket, InvalidBucketName):
            return None
        except NoSuchKey:
            return UNKNOWN_OWNER
        except AccessDenied:  # of an object that is not there, too, if the key may not list the bucket
            try:
                return UNKNOWN_OWNER if self._exists(bucket) else None
            except AccessDenied:
                return UNKNOWN_OWNER if _could_be_created(bucket) else None

    def create(self, bucket: str, owner: str, *, probe: str | None = None) -> bool:  # noqa: ARG002 (see Buckets)
        """See Buckets. An empty bucket that names nobody is one whose creation was cut off, or was made by hand."""
        made = False
        found = self.owner(bucket)
        if found is None:
            check_bucket_name(bucket)
            # The store's word on who has it by now does not count: all buckets are the service's there. Its owner does.
            with suppress(BucketAlreadyExists):
                made = self._create(bucket)
            found = self.owner(bucket)
        if found is None:
            raise TransientError("OperationAborted", 409, "The store does not show yet the bucket that it has created")
        if found == UNKNOWN_OWNER:
            found = self._claim_or_remove(bucket, owner, made=made)
        if found != owner:
            raise BucketAlreadyExists
        return made

    def remove(self, bucket: str, owner: str) -> bool:
        """See Buckets. Until the store has removed it, another attempt finds its owner again, or names it anew."""
        found = self.owner(bucket)
        if found is None:
            return True
        if found not in (owner, UNKNOWN_OWNER):
            return False
        if self._is_empty(bucket):
            self._delete_singly(bucket, [OWNER_KEY])
            if self._remove(bucket):
                return True
        # Somebody was quicker, or an earlier attempt was cut off: it stays its owner's.
        self._name_owner(bucket, owner)
        return False

    def put(self, bucket: str, key: str, data: Buffer, *, policy: UploadPolicy | None = None) -> str | None:
        """See Buckets."""
        _check_policy(policy, bucket, key, data)
        return super().put(bucket, key, data)

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """See Buckets."""
        return (key for key in super().list(bucket, prefix) if key != OWNER_KEY)

    def _named_owner(self, bucket: str) -> str:
        answer = self._requests.send("GET", bucket, OWNER_KEY, limit=_OWNER_BYTES)
        return answer.body.decode("ascii", "replace").strip()

    def _claim_or_remove(self, bucket: str, owner: str, *, made: bool) -> str | None:
        """Claim a bucket that names nobody; if the store refuses that, remove the bucket if we made it."""
        try:
            with self._lock(bucket):
                return self._claim(bucket, owner)
        except TransientError:
            raise
        except BucketError as error:
            if made:
                with suppress(BucketError):
                    self._remove(bucket)
            elif isinstance(error, AccessDenied):
                self._refuse_unless_visible(bucket)
            raise

    def _refuse_unless_visible(self, bucket: str) -> None:
        """Say of a bucket that the key may neither look at nor write to that it is somebody else's."""
        try:
            self._exists(bucket)
        except AccessDenied:
            raise BucketAlreadyExists from None

    def _claim(self, bucket: str, owner: str) -> str | None:
        """Give a bucket that names nobody an owner, if it is empty; say who has it then.

        A key that may not list the bucket was given the right to write into it on purpose: it counts as empty.
        """
        with suppress(AccessDenied):
            if not self._is_empty(bucket):
                return self.owner(bucket)  # named by another call meanwhile, or nobody's
        self._name_owner(bucket, owner)
        try:
            return self._named_owner(bucket)
        except (NoSuchKey, NoSuchBucket):
            raise TransientError("NoSuchKey", 404, "The store has not kept the name of the bucket's owner") from None

    def _name_owner(self, bucket: str, owner: str) -> None:
        """Store the owner's name in a bucket that has none; of several at once the first one counts.

        Raises:
            AccessDenied: The bucket is somebody else's in the store, or the key may not write that object.
        """
        content = f"{owner}\n".encode()
        digest = hashlib.md5(content, usedforsecurity=False)
        try:
            self._put(bucket, OWNER_KEY, content, digest, {"If-None-Match": "*"})
        except NoSuchBucket:
            raise TransientError("OperationAborted", 409, "The bucket was removed by another call") from None
        except StoreError as error:
            if error.code == "PreconditionFailed":  # another was quicker
                return
            if error.kind is not Kind.SETTING:
                raise
            # No conditional writes. The lock is held, and the look before found no owner: look once more, and write.
            if self.owner(bucket) == UNKNOWN_OWNER:
                self._put(bucket, OWNER_KEY, content, digest)


def _could_be_created(bucket: str) -> bool:
    """Whether a new bucket could have that name; of others stores say as well that a key may not look at them."""
    try:
        check_bucket_name(bucket)
    except InvalidBucketName:
        return False
    return True


def _check_policy(policy: UploadPolicy | None, bucket: str, key: str, data: Buffer) -> None:
    """Refuse what a policy does not allow in S3's words, before it is sent; some stores are more lenient."""
    if policy is not None:
        policy.check_upload(bucket, key, content_length=memoryview(data).nbytes, now=utc_now())
