"""Object stores with the S3 API: two drivers, which differ in how accounts own buckets.

`OwnerKeyStore` (`upload_credentials = policy`): the store knows the accounts' access keys. A bucket belongs to the user
of the store whose key signed the upload policy. `ServiceKeyStore` (`upload_credentials = service`): the store knows the
service's key only. A bucket belongs to the account in its object `.thrave-owner`.
"""

# With OwnerKeyStore the account's key creates the bucket and deletes objects, and the store itself evaluates the upload
# policy. With ServiceKeyStore the service evaluates the policy (`upload_policy`); no bundle can have the name
# `.thrave-owner`, and listings omit it.
#
# Both send HEAD for the bucket first, and create or list buckets only if that is not sufficient. So a key that may use
# one existing bucket has enough permissions (docs/reference/store-rights.md).

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
"""The object with the account id of a bucket's owner (ServiceKeyStore)."""

_MAX_OWNER_BYTES = 1024  # of that object

Lock = Callable[[str], AbstractContextManager[object]]
"""Returns a lock for a name; only one thread holds it at a time."""

_LOCKS = tuple(new_lock() for _ in range(64))  # shared by all names


def _lock_in_process(name: str) -> AbstractContextManager[object]:
    return _LOCKS[hash(name) % len(_LOCKS)]


@dataclass(frozen=True)
class KeyOwner:
    """The account of an access key, with the key."""

    account_id: str
    credentials: Credentials


class _Access(Enum):
    """What an access key may do with a bucket."""

    MISSING = "the bucket does not exist"
    ALLOWED = "the key may use the bucket"
    DENIED = "the bucket exists and is not one of the key's own"
    UNKNOWN = "the key may neither send HEAD for the bucket nor list its own buckets"


class _S3Store(S3ObjectClient):
    """Checks, creates and removes buckets; base class of both drivers."""

    def head(self, bucket: str, key: str) -> ObjectHead | None:
        """See ObjectStore.

        If the key may not list the bucket, S3 returns AccessDenied for a missing object too. If the key can then put
        and read another object with the same start, the object is missing.
        """
        try:
            return super().head(bucket, key)
        except AccessDenied:
            if not self._can_read_new_objects(bucket, key):
                raise
        return None

    def _can_read_new_objects(self, bucket: str, key: str) -> bool:
        folder, slash, name = key.rpartition("/")
        start = f"{folder}{slash}{name.partition('.')[0]}"
        if (bucket, start) not in self._readable:
            probe = f"{key}.probe"
            self._put(bucket, probe, b"", hashlib.md5(b"", usedforsecurity=False))
            try:
                if super().head(bucket, probe) is None:
                    return False
            except AccessDenied:
                return False
            finally:
                with suppress(AccessDenied):
                    self._delete_each(bucket, [probe])
            self._readable.add((bucket, start))
        return True

    @cached_property
    def _readable(self) -> set[tuple[str, str]]:
        """(bucket, start of keys) that the access key may read."""
        return set()

    def _exists(self, bucket: str) -> bool:
        """Return whether the bucket exists and the key may use it.

        Raises:
            AccessDenied: The bucket may exist, and the key may not use it.
        """
        try:
            self._requests.send("HEAD", bucket)
        except (NoSuchBucket, NoSuchKey):  # a response to HEAD has no code, so the class depends on the status only
            return False
        return True

    def _is_own(self, bucket: str) -> bool:
        """Return whether the user of the store with this key owns a bucket.

        Raises:
            BucketError: The key may not list its buckets, or the store does not support it.
        """
        return any(bucket in page for page in self._pages(None, {"prefix": bucket}, read_buckets))

    def _create(self, bucket: str) -> bool:
        """Create a bucket that did not exist; return whether this request created it.

        Raises:
            BucketAlreadyExists: The bucket exists now, perhaps with the same owner: SeaweedFS returns this error also
                for requests with the same key at the same time.
        """
        location = write_location(self._config.region)
        for body in [[location], []] if location else [[]]:  # some stores accept no location
            try:
                self._requests.send("PUT", bucket, body=body)
            except NoSuchBucket:  # SeaweedFS, while another request creates the bucket
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
        return all(listed.key == OWNER_KEY for listed in self._objects(bucket, "", 2))

    def _remove(self, bucket: str) -> bool:
        """Remove an empty bucket; return whether it no longer exists. The store refuses one that is not empty."""
        try:
            self._requests.send("DELETE", bucket)
        except (NoSuchBucket, NoSuchKey):
            return True
        except StoreError as error:
            if error.code == "BucketNotEmpty":
                return False
            raise
        return True


class OwnerKeyStore(_S3Store):
    """A store that knows the accounts' access keys; `upload_credentials = policy`."""

    def __init__(
        self,
        config: StoreConfig,
        find_key_owner: Callable[[str], KeyOwner | None],
        *,
        transport: HttpTransport | None = None,
        key_owner: KeyOwner | None = None,
    ) -> None:
        """Use the key of `key_owner`, or the key in `config`.

        Args:
            config: The store.
            find_key_owner: Returns the owner of an access key id; None for an unknown id.
            transport: The store's connections, if several drivers share them.
            key_owner: The account on whose behalf requests are sent.
        """
        super().__init__(config, transport=transport, credentials=key_owner.credentials if key_owner else None)
        self._find_key_owner = find_key_owner
        self._key_owner = key_owner

    def on_behalf_of(self, access_key_id: str) -> "OwnerKeyStore":
        """See ObjectStore."""
        key_owner = self._find_key_owner(access_key_id)
        if key_owner is None:
            raise AccessDenied(f"The service does not have the access key {access_key_id}")
        return OwnerKeyStore(self._config, self._find_key_owner, transport=self._transport, key_owner=key_owner)

    def owner(self, bucket: str) -> str | None:
        """See ObjectStore. The only known account is the one on whose behalf requests are sent."""
        match self._find_access(bucket):
            case _Access.MISSING:
                return None
            case _Access.DENIED:
                return UNKNOWN_OWNER
            case _Access.ALLOWED | _Access.UNKNOWN:
                return UNKNOWN_OWNER if self._key_owner is None else self._key_owner.account_id

    def create(self, bucket: str, owner: str, *, probe: str | None = None) -> bool:
        """See ObjectStore. The owner must be the account on whose behalf requests are sent."""
        self._check_key_owner(owner)
        access = self._find_access(bucket)
        if access is _Access.UNKNOWN and probe is not None:
            self._check_put_permission(bucket, probe)
        if access is _Access.DENIED:
            raise BucketAlreadyExists
        if access is not _Access.MISSING:
            return False
        check_bucket_name(bucket)
        is_created = False
        with suppress(BucketAlreadyExists):  # perhaps with the same owner, which is checked next
            is_created = self._create(bucket)
        current_owner = self.owner(bucket)
        if current_owner is None:
            raise TransientError("NoSuchBucket", 404, "The store reported success but has not created the bucket")
        if current_owner != owner:
            raise BucketAlreadyExists
        return is_created

    def remove(self, bucket: str, owner: str) -> bool:
        """See ObjectStore."""
        self._check_key_owner(owner)
        try:  # checked here too, since SeaweedFS also removes a bucket that is not empty
            return self._is_empty(bucket) and self._remove(bucket)
        except NoSuchBucket:
            return True

    def put(self, bucket: str, key: str, data: Buffer, *, policy: UploadPolicy | None = None) -> str | None:
        """See ObjectStore."""
        _check_policy(policy, bucket, key, data)
        return super().put(bucket, key, data, policy=policy)

    def _check_key_owner(self, owner: str) -> None:
        if self._key_owner is None or self._key_owner.account_id != owner:
            raise AccessDenied("The owner's access key is needed to create or remove a bucket; this key is not it")

    def _find_access(self, bucket: str) -> _Access:
        """Return what the key may do with a bucket."""
        try:
            return _Access.ALLOWED if self._exists(bucket) else _Access.MISSING
        except InvalidBucketName:
            return _Access.MISSING
        except AccessDenied:
            try:
                if self._is_own(bucket):
                    return _Access.ALLOWED
            except BucketError as error:
                if error.code not in ("AccessDenied", "MethodNotAllowed", "NotImplemented"):
                    raise
                return _Access.UNKNOWN
            return _Access.DENIED if _is_new_bucket_name(bucket) else _Access.MISSING

    def _check_put_permission(self, bucket: str, probe: str) -> None:
        """Check whether the key may put an object, without writing the object.

        The object is sent with a wrong digest. A store that allows the request then returns BadDigest.

        Raises:
            AccessDenied: The key may not put the object.
        """
        wrong_md5 = md5_header(hashlib.md5(b"", usedforsecurity=False))
        try:
            self._requests.send("PUT", bucket, probe, headers={"Content-MD5": wrong_md5}, body=[b"\n"])
        except BucketError as error:
            if error.code not in ("BadDigest", "InvalidDigest"):
                raise
        else:
            self._delete_each(bucket, [probe])  # the store does not check digests


class ServiceKeyStore(_S3Store):
    """A store that knows only the service's access key; `upload_credentials = service`."""

    def __init__(
        self, config: StoreConfig, *, transport: HttpTransport | None = None, lock: Lock = _lock_in_process
    ) -> None:
        """Use the key in `config`.

        Args:
            config: The store.
            transport: The store's connections, if several drivers share them.
            lock: Held while the owner of a bucket is written. Not needed for stores with conditional writes
                (`If-None-Match`). For others it must work between all processes that create buckets.
        """
        super().__init__(config, transport=transport)
        self._lock = lock

    def on_behalf_of(self, _access_key_id: str) -> Self:
        """See ObjectStore."""
        return self

    def owner(self, bucket: str) -> str | None:
        """See ObjectStore."""
        try:
            return self._read_owner(bucket) or UNKNOWN_OWNER
        except (NoSuchBucket, InvalidBucketName):
            return None
        except NoSuchKey:
            return UNKNOWN_OWNER
        except AccessDenied:  # also for a missing object, if the key may not list the bucket
            try:
                return UNKNOWN_OWNER if self._exists(bucket) else None
            except AccessDenied:
                return UNKNOWN_OWNER if _is_new_bucket_name(bucket) else None

    def create(self, bucket: str, owner: str, *, probe: str | None = None) -> bool:  # noqa: ARG002 (see ObjectStore)
        """See ObjectStore. An empty bucket without an owner is claimed: its creation was interrupted, or manual."""
        is_created = False
        current_owner = self.owner(bucket)
        if current_owner is None:
            check_bucket_name(bucket)
            # In the store all buckets belong to the service, so this error does not show the account that owns it.
            with suppress(BucketAlreadyExists):
                is_created = self._create(bucket)
            current_owner = self.owner(bucket)
        if current_owner is None:
            raise TransientError("OperationAborted", 409, "The bucket that the store has created is not visible yet")
        if current_owner == UNKNOWN_OWNER:
            current_owner = self._claim_or_remove(bucket, owner, is_created=is_created)
        if current_owner != owner:
            raise BucketAlreadyExists
        return is_created

    def remove(self, bucket: str, owner: str) -> bool:
        """See ObjectStore. A call after an interrupted one also removes a bucket that has lost its owner."""
        current_owner = self.owner(bucket)
        if current_owner is None:
            return True
        if current_owner not in (owner, UNKNOWN_OWNER):
            return False
        if self._is_empty(bucket):
            self._delete_each(bucket, [OWNER_KEY])
            if self._remove(bucket):
                return True
        # Another process has stored an object, perhaps after an earlier call deleted the owner: write the owner again.
        self._write_owner(bucket, owner)
        return False

    def put(self, bucket: str, key: str, data: Buffer, *, policy: UploadPolicy | None = None) -> str | None:
        """See ObjectStore."""
        _check_policy(policy, bucket, key, data)
        return super().put(bucket, key, data)

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """See ObjectStore."""
        return (key for key in super().list(bucket, prefix) if key != OWNER_KEY)

    def _read_owner(self, bucket: str) -> str:
        response = self._requests.send("GET", bucket, OWNER_KEY, limit=_MAX_OWNER_BYTES)
        return response.body.decode("ascii", "replace").strip()

    def _claim_or_remove(self, bucket: str, owner: str, *, is_created: bool) -> str | None:
        """Claim a bucket without an owner and return its owner; after an error remove a bucket that we have created."""
        try:
            with self._lock(bucket):
                return self._claim(bucket, owner)
        except TransientError:
            raise
        except BucketError as error:
            if is_created:
                with suppress(BucketError):
                    self._remove(bucket)
            elif isinstance(error, AccessDenied):
                try:
                    self._exists(bucket)
                except AccessDenied:  # neither readable nor writable: the bucket belongs to another user of the store
                    raise BucketAlreadyExists from None
            raise

    def _claim(self, bucket: str, owner: str) -> str | None:
        """Write the owner of a bucket without one, if the bucket is empty; return its owner.

        A bucket that the key may not list counts as empty: its operator has granted the key to write on purpose.
        """
        with suppress(AccessDenied):
            if not self._is_empty(bucket):
                return self.owner(bucket)  # perhaps written by another call in the meantime
        self._write_owner(bucket, owner)
        try:
            return self._read_owner(bucket)
        except (NoSuchKey, NoSuchBucket):
            raise TransientError("NoSuchKey", 404, "The store has not stored the bucket's owner") from None

    def _write_owner(self, bucket: str, owner: str) -> None:
        """Store the owner of a bucket that has none; the first of several calls succeeds.

        Raises:
            AccessDenied: The bucket belongs to another user of the store, or the key may not write that object.
        """
        content = f"{owner}\n".encode()
        digest = hashlib.md5(content, usedforsecurity=False)
        try:
            self._put(bucket, OWNER_KEY, content, digest, {"If-None-Match": "*"})
        except NoSuchBucket:
            raise TransientError("OperationAborted", 409, "The bucket was removed by another call") from None
        except StoreError as error:
            if error.code == "PreconditionFailed":  # another call was first
                return
            if error.kind is not Kind.SETTING:
                raise
            # The store has no conditional writes. Under the lock, check the owner again and write.
            if self.owner(bucket) == UNKNOWN_OWNER:
                self._put(bucket, OWNER_KEY, content, digest)


def _is_new_bucket_name(bucket: str) -> bool:
    """Return whether a new bucket can have that name; stores also return AccessDenied for impossible names."""
    try:
        check_bucket_name(bucket)
    except InvalidBucketName:
        return False
    return True


def _check_policy(policy: UploadPolicy | None, bucket: str, key: str, data: Buffer) -> None:
    """Refuse an upload that the policy does not allow, before it is sent: some stores do not check all of it."""
    if policy is not None:
        policy.check_upload(bucket, key, content_length=memoryview(data).nbytes, now=utc_now())
