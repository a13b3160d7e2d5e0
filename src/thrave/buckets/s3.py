"""Buckets in an S3-compatible store, and whose they are.

There are two ways for a service:

- `OwnersBuckets` (`upload = policy`): the accounts' access keys are the store's too. A bucket belongs to the store's
  user whose key signed the upload policy; with that key it is created and cleaned up. A bundle is uploaded by the
  policy's own signature alone, so that the store itself judges it.
- `ServiceBuckets` (`upload = service`): the store knows the service's key only, and every bucket is the service's
  there. It writes what the policy allows by our own judgement (`policy.py`). A bucket belongs to the account that its
  object `.thrave-owner` names; no bundle can have that name, and no listing shows it.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from thrave.buckets.buckets import NOBODY
from thrave.buckets.connection import Credentials, StoreConnection
from thrave.buckets.errors import (
    AccessDenied,
    BucketAlreadyExists,
    BucketError,
    InvalidBucketName,
    NoSuchBucket,
    NoSuchKey,
    StoreError,
    TransientError,
)
from thrave.buckets.listings import read_buckets, write_location
from thrave.buckets.naming import check_bucket_name
from thrave.buckets.objects import S3Objects, md5_header
from thrave.buckets.policy import UploadPolicy
from thrave.buckets.transport import Buffer, Transport

OWNER_KEY = ".thrave-owner"
"""The object of a bucket that names the account that it belongs to, where all buckets are the service's."""


@dataclass(frozen=True)
class Holder:
    """Who holds an access key of ours."""

    account_id: str
    credentials: Credentials


class _S3Buckets(S3Objects):
    """What both ways have in common: the store's own word on buckets."""

    def _exists(self, bucket: str) -> bool:
        try:
            self._requests.send("HEAD", bucket)
        except (NoSuchBucket, NoSuchKey):  # an answer to HEAD has no words
            return False
        except AccessDenied:
            return True
        return True

    def _is_ours(self, bucket: str) -> bool:
        """Whether the store's user whose key we use owns a bucket."""
        return bucket in self._pages(None, {"prefix": bucket}, read_buckets)

    def _create(self, bucket: str) -> None:
        """Create a bucket, if its name is free. One's own is not created again: S3 would reset its ACL."""
        if self._is_ours(bucket):
            return
        location = write_location(self._connection.region)
        try:
            self._requests.send("PUT", bucket, body=[location] if location else ())
        except AccessDenied:
            if self._exists(bucket):
                raise BucketAlreadyExists from None
            raise
        except NoSuchBucket:  # SeaweedFS, of one that another call is just creating
            raise TransientError("OperationAborted", 409, "The bucket is being created by another call") from None
        except StoreError as error:
            if error.code != "BucketAlreadyOwnedByYou":
                raise


class OwnersBuckets(_S3Buckets):
    """The buckets of a store that knows our accounts' access keys; `upload = policy`."""

    def __init__(
        self,
        connection: StoreConnection,
        find_holder: Callable[[str], Holder | None],
        *,
        transport: Transport | None = None,
        holder: Holder | None = None,
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

    def on_behalf_of(self, access_key_id: str) -> "OwnersBuckets":
        """See Buckets."""
        holder = self._find_holder(access_key_id)
        if holder is None:
            raise AccessDenied(f"The service does not hold the access key {access_key_id}")
        return OwnersBuckets(self._connection, self._find_holder, transport=self._transport, holder=holder)

    def owner(self, bucket: str) -> str | None:
        """See Buckets. Of the accounts it knows the one on whose behalf it acts."""
        try:
            if self._holder is not None and self._is_ours(bucket):
                return self._holder.account_id
            return NOBODY if self._exists(bucket) else None
        except InvalidBucketName:
            return None

    def create(self, bucket: str, owner: str) -> None:
        """See Buckets. The owner must be the account on whose behalf it acts."""
        check_bucket_name(bucket)
        if self._holder is None or self._holder.account_id != owner:
            raise AccessDenied("A bucket is created with the access key of its owner, and the service acts for another")
        self._create(bucket)
        if not self._exists(bucket):
            raise TransientError("NoSuchBucket", 404, "The store has not created the bucket though it said so")

    def put(self, bucket: str, key: str, data: Buffer, *, grant: UploadPolicy | None = None) -> str | None:
        """See Buckets."""
        _judge(grant, bucket, key, data)
        return super().put(bucket, key, data, grant=grant)


class ServiceBuckets(_S3Buckets):
    """The buckets of a store that knows the service's access key only; `upload = service`."""

    def on_behalf_of(self, _access_key_id: str) -> Self:
        """See Buckets."""
        return self

    def owner(self, bucket: str) -> str | None:
        """See Buckets."""
        try:
            return self.get(bucket, OWNER_KEY).decode("ascii", "replace").strip() or NOBODY
        except (NoSuchBucket, InvalidBucketName):
            return None
        except BucketError as error:
            if error.is_the_stores:  # whose it is, it will say when it is mended
                raise
            return NOBODY if self._exists(bucket) else None

    def create(self, bucket: str, owner: str) -> None:
        """See Buckets. An empty bucket of the service's that names nobody is one whose creation was cut off."""
        self._create(bucket)
        if self.owner(bucket) == NOBODY and not any(super().list(bucket, "")):
            self._name_owner(bucket, owner)
        if self.owner(bucket) != owner:
            raise BucketAlreadyExists

    def put(self, bucket: str, key: str, data: Buffer, *, grant: UploadPolicy | None = None) -> str | None:
        """See Buckets."""
        _judge(grant, bucket, key, data)
        return super().put(bucket, key, data)

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """See Buckets."""
        return (key for key in super().list(bucket, prefix) if key != OWNER_KEY)

    def _name_owner(self, bucket: str, owner: str) -> None:
        content = f"{owner}\n".encode()
        digest = md5_header(hashlib.md5(content, usedforsecurity=False))
        try:
            self._put(bucket, OWNER_KEY, content, {"If-None-Match": "*", "Content-MD5": digest})
        except StoreError as error:
            if error.code != "PreconditionFailed":  # another was quicker
                raise
        if self.head(bucket, OWNER_KEY) is None:
            raise TransientError("NoSuchKey", 404, "The store has not kept the name of the bucket's owner")


def _judge(grant: UploadPolicy | None, bucket: str, key: str, data: Buffer) -> None:
    """Refuse what a policy does not allow in S3's words, before it is sent; some stores are more lenient."""
    if grant is not None:
        grant.check_upload(bucket, key, content_length=memoryview(data).nbytes, now=datetime.now(UTC))
