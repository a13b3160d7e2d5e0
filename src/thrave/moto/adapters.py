"""moto's instances, buckets and access keys in the form that Thrave's EC2 actions use.

Each adapter belongs to one account and region of moto, and keeps nothing of its own.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from moto.iam.models import iam_backends
from moto.s3.exceptions import MissingBucket, S3ClientError
from moto.s3.models import s3_backends
from moto.utilities.utils import PARTITION_NAMES

from thrave.buckets.base import ObjectHead, check_bucket_name
from thrave.buckets.errors import AccessDenied, BucketAlreadyExists, NoSuchBucket, NoSuchKey
from thrave.buckets.upload_policy import UploadPolicy
from thrave.compute.errors import IncorrectInstanceState, InstanceNotFound
from thrave.compute.instance import Instance, InstanceState, VolumeFile
from thrave.concurrency import utc_now
from thrave.identity.accounts import AccessKey


class MotoInstances:
    """The instances of one account and region. An `InstanceInventory`."""

    def __init__(self, ec2: Any) -> None:  # noqa: ANN401 (moto's EC2Backend)
        self._ec2 = ec2

    def list(self, account_id: str | None = None) -> Sequence[Instance]:
        """See InstanceInventory."""
        found = [_to_instance(instance) for instance in self._ec2.all_instances()]
        return [instance for instance in found if account_id in (None, instance.account_id)]

    def get(self, instance_id: str) -> Instance:
        """See InstanceInventory."""
        return _to_instance(self.find(instance_id))

    def get_owner(self, instance_id: str) -> str:
        """See InstanceInventory."""
        return str(self.find(instance_id).owner_id)

    def request_stop(self, instance_id: str) -> None:
        """Stop the instance. moto's instances stop at once."""
        self._set_power(instance_id, "stop")

    def start(self, instance_id: str) -> None:
        """Start the instance. moto's instances start at once."""
        self._set_power(instance_id, "start")

    def terminate(self, instance_id: str) -> None:
        """See InstanceInventory."""
        self.find(instance_id).terminate()

    def find(self, instance_id: str) -> Any:  # noqa: ANN401 (moto's Instance)
        """Return moto's object of an instance. Raises InstanceNotFound."""
        for instance in self._ec2.all_instances():
            if instance.id == instance_id:
                return instance
        raise InstanceNotFound(instance_id)

    def _set_power(self, instance_id: str, change: str) -> None:
        instance = self.find(instance_id)
        if instance.state == "terminated":
            raise IncorrectInstanceState(instance_id, f"{instance_id} is terminated")
        getattr(instance, change)()


def _to_instance(instance: Any) -> Instance:  # noqa: ANN401 (moto's Instance)
    return Instance(
        instance_id=instance.id,
        account_id=instance.owner_id,
        platform="windows" if (instance.platform or "").lower() == "windows" else None,
        architecture=instance.architecture or "x86_64",
        root_device_type="instance-store" if instance.root_device_type == "instance-store" else "ebs",
        root_device_name=instance.root_device_name,
        root_volume=VolumeFile(path=Path("/", instance.id)),  # in memory: see `disks.py`
        state=InstanceState(instance.state),
        launch_time=instance.launch_time,
    )


class MotoBuckets:
    """The buckets of moto's S3. An `ObjectStore`."""

    def __init__(self, region: str, partition: str) -> None:
        self._region, self._partition = region, partition

    def on_behalf_of(self, _access_key_id: str) -> Self:
        """See ObjectStore."""
        return self

    def owner(self, bucket: str) -> str | None:
        """See ObjectStore."""
        found = s3_backends.bucket_accounts.get(bucket)
        return None if found is None else str(found[1])

    def create(self, bucket: str, owner: str, *, probe: str | None = None) -> bool:  # noqa: ARG002 (see ObjectStore)
        """See ObjectStore."""
        current = self.owner(bucket)
        if current not in (None, owner):
            raise BucketAlreadyExists
        if current is not None:
            return False
        check_bucket_name(bucket)
        self._s3(owner).create_bucket(bucket, self._region)
        return True

    def remove(self, bucket: str, owner: str) -> bool:
        """See ObjectStore."""
        current = self.owner(bucket)
        if current != owner:
            return current is None
        return self._s3(owner).delete_bucket(bucket) is not None

    def put(self, bucket: str, key: str, data: bytes | memoryview, *, policy: UploadPolicy | None = None) -> str | None:
        """See ObjectStore."""
        if policy is not None:
            policy.check_upload(bucket, key, content_length=len(data), now=utc_now())
        with _converted_errors():
            stored = self._of(bucket).put_object(bucket, key, bytes(data))
        return str(stored.etag).strip('"')

    def head(self, bucket: str, key: str) -> ObjectHead | None:
        """See ObjectStore."""
        try:
            data = self.get(bucket, key)
        except (NoSuchKey, NoSuchBucket):
            return None
        return ObjectHead(len(data))

    def get(self, bucket: str, key: str) -> bytes:
        """See ObjectStore."""
        with _converted_errors():
            found = self._of(bucket).get_object(bucket, key)
        if found is None:
            raise NoSuchKey("The specified key does not exist.")
        return bytes(found.value)

    def get_range(self, bucket: str, key: str, start: int, length: int) -> bytes:
        """See ObjectStore."""
        return self.get(bucket, key)[start : start + length]

    def list(self, bucket: str, prefix: str) -> Iterator[str]:
        """See ObjectStore."""
        keys = self._of(bucket).get_bucket(bucket).keys
        yield from sorted(key for key in keys if key.startswith(prefix))

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """See ObjectStore."""
        if self.owner(bucket) is not None:
            for key in keys:
                self._of(bucket).delete_object(bucket, key)

    def _of(self, bucket: str) -> Any:  # noqa: ANN401 (moto's S3Backend)
        owner = self.owner(bucket)
        if owner is None:
            raise NoSuchBucket("The specified bucket does not exist")
        return self._s3(owner)

    def _s3(self, account_id: str) -> Any:  # noqa: ANN401 (moto's S3Backend)
        return s3_backends[account_id][self._partition]


@contextmanager
def _converted_errors() -> Iterator[None]:
    """Turn moto's exceptions into those of an ObjectStore."""
    try:
        yield
    except MissingBucket:
        raise NoSuchBucket("The specified bucket does not exist") from None
    except S3ClientError as error:
        raise AccessDenied(str(error)) from None


class MotoKeys:
    """Access keys whose secret is known, so that the signature of an upload policy can be verified.

    These are the keys that moto's IAM has created, those given to `install`, and the one in this process's environment
    (`AWS_ACCESS_KEY_ID`), which `mock_aws` sets.

    Args:
        account_id: Account of the keys that moto's IAM has not created.
        known: Secrets of further keys, by their ids.
    """

    def __init__(self, account_id: str, known: dict[str, str]) -> None:
        self._account_id = account_id
        self._known = known

    def find_key(self, access_key_id: str) -> AccessKey | None:
        """Return a key; None if its secret is not known."""
        for account_id, partitions in list(iam_backends.items()):
            for partition in PARTITION_NAMES:
                key = partitions[partition].access_keys.get(access_key_id)
                if key is not None:
                    return AccessKey(
                        access_key_id=access_key_id,
                        secret_access_key=key.secret_access_key,
                        account_id=account_id,
                        status=key.status,
                        create_date=key.create_date,
                    )
        known = dict(self._known)
        if "AWS_ACCESS_KEY_ID" in os.environ:
            known.setdefault(os.environ["AWS_ACCESS_KEY_ID"], os.environ.get("AWS_SECRET_ACCESS_KEY", ""))
        if not known.get(access_key_id):
            return None
        return AccessKey(
            access_key_id=access_key_id,
            secret_access_key=known[access_key_id],
            account_id=self._account_id,
            status="Active",
            create_date=utc_now(),
        )

    def certificate(self, account_id: str) -> str | None:
        """Return the newest active signing certificate of an account's users, as PEM; None if there is none."""
        certificates = [
            certificate
            for partition in PARTITION_NAMES
            for user in iam_backends[account_id][partition].users.values()
            for certificate in user.signing_certificates.values()
            if certificate.status == "Active"
        ]
        newest = max(certificates, key=lambda certificate: certificate.upload_date, default=None)
        return None if newest is None else str(newest.body)
