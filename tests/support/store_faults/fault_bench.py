"""Makes bundles on a store behind the fault proxy, step by step as the service does, and opens them from there.

It has everything except the engine and the HTTP server: buckets are created as for a request, tasks run in this
process, and remaining objects are deleted as the housekeeping does.
"""

import base64
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from types import SimpleNamespace

from support.disks.raw_disk import make_disk
from support.servers import stores
from support.store_faults.fault_proxy import Kind
from support.store_faults.fault_table import SURVIVES
from thrave.buckets.errors import NoSuchBucket
from thrave.buckets.retrying_store import RetryingStore
from thrave.buckets.s3_client import HttpTransport
from thrave.buckets.s3_objects import S3ObjectClient
from thrave.buckets.s3_store import OWNER_KEY, KeyOwner, OwnerKeyStore, ServiceKeyStore
from thrave.bundle.model import manifest_filename, side_filename
from thrave.bundle.opener import open_bundle
from thrave.cli.folders import FolderParts
from thrave.cli.remote_folders import S3Folder
from thrave.components import open_components
from thrave.compute.description_files import InstanceDescription
from thrave.compute.directory_driver import new_instance_id
from thrave.compute.instance import InstanceState, VolumeFile
from thrave.config import Settings
from thrave.ec2.bundle_actions import S3Storage, ensure_bucket
from thrave.ec2.errors import EC2Error
from thrave.tasks.created_buckets import CreatedBuckets
from thrave.tasks.housekeeping import ObjectCleanup
from thrave.tasks.models import BundleRequest
from thrave.tasks.workflow import TaskContext, TaskSettings, run_bundle_task
from thrave.testing import upload_policy

PREFIX = "winami"
KEY = stores.ALICE
BY_POLICY = {Kind.HEAD_BUCKET, Kind.CREATE_BUCKET, Kind.POST_OBJECT, Kind.POST_MANIFEST}
"""Requests of a service with `upload_credentials = policy`; the others are tested with `service`."""


@dataclass(frozen=True)
class StoreTimeouts:
    """Timeouts of the service, in seconds."""

    timeout: float
    """`s3_timeout`."""
    retry_timeout: float
    """`s3_retry_timeout`."""


class FaultBench:
    """The components of one service; `url` is the proxy's, `store` the store behind it."""

    def __init__(self, folder, store, url):
        self._store = store
        self._url = url
        self._components = open_components(Settings(data_dir=folder / "thrave"))
        self._repository = self._components.records()
        self.account, _ = self._components.accounts.create("alice")
        self._disk = make_disk(folder / "disk.raw", 512 << 10)
        self._output = folder / "opened.raw"
        self._transports = {}
        self.bucket = _new_bucket_name()
        self.prefix = PREFIX
        """Prefix of the newest task. Each task has a new one, so its files have names without a series."""
        self._tasks = count(1)
        self._direct.send("PUT", self.bucket)

    def close(self):
        self._components.database.dispose()
        self._direct.send("DELETE", self.bucket)

    @cached_property
    def direct_store(self):
        """The store without the proxy, with the service's key."""
        return S3ObjectClient(self._store.connection())

    @property
    def _direct(self):
        return self.direct_store._requests

    # Operations of the service

    def claim(self, kind, timeouts):
        """Claim a bucket without an owner, as BundleInstance does; return the result, and remove the owner again.

        With `upload_credentials = policy` the bucket is a new one, otherwise one without an owner object.
        """
        bucket = _new_bucket_name() if kind in BY_POLICY else self.bucket
        policy, signature = upload_policy(KEY.secret_access_key, bucket, PREFIX)
        storage = S3Storage(bucket=bucket, prefix=PREFIX, access_key_id=KEY.access_key_id,
                          upload_policy=policy, upload_policy_signature=signature)  # fmt: skip
        backend = SimpleNamespace(buckets=RetryingStore(self._buckets(kind, timeouts), timeouts.retry_timeout))
        try:
            ensure_bucket(backend, storage, self.account.account_id)
        except EC2Error as error:
            return error.code
        else:
            return SURVIVES if self._is_owned(kind, bucket) else "not owned"
        finally:
            self._remove_owner(kind, bucket)

    def bundle(self, kind, timeouts):
        """Run a task to its end and return it."""
        instance = self._new_instance()
        bundle_id = self._new_task(instance)
        run_bundle_task(self._host(kind, timeouts), bundle_id)
        return self._repository.get(bundle_id)

    def instance_runs(self, task):
        return self._components.instances.state(task.instance_id) is InstanceState.RUNNING

    def has_recorded_objects(self, task):
        """Whether objects of a task are recorded that must still be deleted."""
        return bool(self._repository.journal(task.bundle_id).objects())

    def delete_orphaned_objects(self, timeouts):
        """Delete the objects of failed tasks, as the housekeeping does."""
        ObjectCleanup(self._repository, self._buckets(None, timeouts), "localhost", stall_timeout=60).run_once()

    def opens_to_same_disk(self, timeouts, *, url=None):
        """Open the bundle as `thrave open s3://…` does; return whether the image equals the disk."""
        self._output.unlink(missing_ok=True)
        connection = self._store.connection(KEY, endpoint=url or self._store.url)
        objects = S3ObjectClient(connection, transport=self._transport(timeouts, connection.endpoint))
        folder, service = S3Folder(objects, self.bucket, ""), self._components.service
        open_bundle(
            folder.read(manifest_filename(self.prefix), 1 << 20),
            FolderParts(folder),
            service.private_key,
            self._output,
            certificate=service.certificate,
            side_file=folder.read(side_filename(self.prefix), 1 << 20),
        )
        return self._output.read_bytes() == self._disk.read_bytes()

    def files(self):
        return sorted(self.direct_store.list(self.bucket, ""))

    def clear(self):
        self.direct_store.delete(self.bucket, self.files())

    # Helpers

    def _buckets(self, kind, timeouts):
        connection = self._store.connection(endpoint=self._url)
        transport = self._transport(timeouts, self._url)
        if kind in BY_POLICY:
            key_owners = {KEY.access_key_id: KeyOwner(self.account.account_id, KEY)}
            return OwnerKeyStore(connection, key_owners.get, transport=transport)
        return ServiceKeyStore(connection, transport=transport)

    def _transport(self, timeouts, url):
        kind = timeouts.timeout, url
        if kind not in self._transports:  # shared, since each one loads the system's certificates
            self._transports[kind] = HttpTransport(self._store.connection(endpoint=url, timeout=timeouts.timeout))
        return self._transports[kind]

    def _host(self, kind, timeouts):
        settings = self._components.settings
        return TaskContext(
            host="localhost",
            settings=TaskSettings(
                shutdown_timeout=settings.shutdown_timeout,
                shutdown_timeout_action=settings.shutdown_timeout_action,
                capture_mode=settings.capture_mode,
                sysprep_command=settings.sysprep_command,
                unclean_volume=settings.unclean_volume,
                image_dirs=settings.image_dirs,
                compression="fast",
                skip_unused=settings.skip_unused,
                existing_bundle=settings.existing_bundle,
                upload_concurrency=settings.upload_concurrency,
                s3_retry_timeout=timeouts.retry_timeout,
                stall_timeout=60,
            ),
            repository=self._repository,
            accounts=self._components.accounts,
            driver=self._components.instances,
            store=self._buckets(kind, timeouts),
            created_buckets=CreatedBuckets(self._components.database, self._repository),
            identity=self._components.service,
        )

    def _new_instance(self):
        # A copy of the disk: a volume that another machine may write to is refused.
        instance_id = new_instance_id()
        disk = Path(shutil.copyfile(self._disk, self._disk.with_name(f"{instance_id}.raw")))
        instance = InstanceDescription(
            instance_id=instance_id,
            account_id=self.account.account_id,
            platform="windows",
            root_volume=VolumeFile(path=disk),
        )
        self._components.instances.add(instance)
        return instance

    def _new_task(self, instance):
        self.prefix = f"{PREFIX}{next(self._tasks)}"
        policy, signature = upload_policy(KEY.secret_access_key, self.bucket, self.prefix)
        request = BundleRequest(
            account_id=self.account.account_id, owner_id=self.account.account_id, instance_id=instance.instance_id,
            bucket=self.bucket, prefix=self.prefix, access_key_id=KEY.access_key_id,
            upload_policy=base64.b64encode(policy).decode(), upload_policy_signature=signature,
        )  # fmt: skip
        bundle_id = f"bun-{uuid.uuid4().hex[:17]}"
        with self._components.database.begin() as connection:
            self._repository.add(connection, bundle_id, "localhost", request)
        return bundle_id

    def _is_owned(self, kind, bucket):
        if kind in BY_POLICY:
            own = OwnerKeyStore(self._store.connection(), {}.get, key_owner=KeyOwner(self.account.account_id, KEY))
            return own.owner(bucket) == self.account.account_id
        return self.direct_store.get(bucket, OWNER_KEY).decode().strip() == self.account.account_id

    def _remove_owner(self, kind, bucket):
        if kind not in BY_POLICY:
            self.direct_store.delete(bucket, [OWNER_KEY])
        else:
            with suppress(NoSuchBucket):  # the bucket was not created
                self._direct.send("DELETE", bucket)


def _new_bucket_name():
    return f"alice-{uuid.uuid4().hex[:12]}"
