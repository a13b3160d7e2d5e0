"""Bundle tasks run in this process on the real components of one host: SQLite, directory store, instance files.

There is no task queue: `run` runs a task as the worker does, and a test may run the task again.
"""

import base64
from itertools import count

from support.disks.raw_disk import make_disk
from thrave.bundle.base import DirectoryParts
from thrave.bundle.model import bound_side_filename, manifest_filename, side_filename
from thrave.bundle.opener import open_bundle
from thrave.components import open_components
from thrave.compute.description_files import InstanceDescription
from thrave.compute.directory_driver import new_instance_id
from thrave.compute.instance import VolumeFile
from thrave.config import Settings
from thrave.tasks.created_buckets import CreatedBuckets
from thrave.tasks.models import BundleRequest
from thrave.tasks.workflow import TaskContext, TaskSettings, run_bundle_task
from thrave.testing import upload_policy

BUCKET = "alice-bundles"
HOST = "localhost"


class OneHost:
    """The components of one host, and an account with a bucket."""

    def __init__(self, folder, size=300 << 10):
        self.folder = folder
        self.components = open_components(Settings(data_dir=folder / "thrave"))
        self.records = self.components.records()
        self.account, self.key = self.components.accounts.create("alice")
        self.components.buckets.create(BUCKET, self.account.account_id)
        self.lease = self.components.hosts.acquire_lease(HOST, worker_concurrency=1)
        self.buckets, self.instances = self.components.buckets, self.components.instances
        self._size = size
        self._numbers = count(1)

    def close(self):
        self.components.database.dispose()

    def task(self, **details):
        """Record a task of a new instance with a prefix of its own; return the task's id."""
        number = next(self._numbers)
        instance_id = new_instance_id()
        disk = make_disk(self.folder / f"{instance_id}.raw", self._size)
        self.components.instances.add(
            InstanceDescription(
                instance_id=instance_id, account_id=self.account.account_id, platform="windows",
                root_volume=VolumeFile(path=disk), **details,
            )
        )  # fmt: skip
        prefix = f"winami{number}"
        policy, signature = upload_policy(self.key.secret_access_key, BUCKET, prefix)
        bundle_id = f"bun-{number:017x}"
        request = BundleRequest(
            account_id=self.account.account_id, owner_id=self.account.account_id, instance_id=instance_id,
            bucket=BUCKET, prefix=prefix, access_key_id=self.key.access_key_id,
            upload_policy=base64.b64encode(policy).decode(), upload_policy_signature=signature,
        )  # fmt: skip
        with self.components.database.begin() as connection:
            self.records.add(connection, bundle_id, HOST, request)
        return bundle_id

    def get(self, bundle_id):
        return self.records.get(bundle_id)

    def run(self, bundle_id, lease=None, **changes):
        """Run the task as the worker does."""
        run_bundle_task(self.host(lease or self.lease, **changes), bundle_id)

    def host(self, lease, **changes):
        components = self.components
        settings, records = components.settings, components.records(lease)
        options = {
            "shutdown_timeout": 5.0, "shutdown_timeout_action": settings.shutdown_timeout_action,
            "capture_mode": settings.capture_mode, "sysprep_command": (), "unclean_volume": settings.unclean_volume,
            "image_dirs": (), "compression": "fast", "skip_unused": settings.skip_unused,
            "existing_bundle": settings.existing_bundle, "upload_concurrency": 2, "s3_retry_timeout": 0.0,
            "stall_timeout": 30.0,
        }  # fmt: skip
        options |= {name: changes.pop(name) for name in options.keys() & changes.keys()}
        given = {
            "host": HOST, "settings": TaskSettings(**options), "repository": records, "accounts": components.accounts,
            "driver": self.instances, "store": self.buckets, "identity": components.service,
            "created_buckets": CreatedBuckets(components.database, records),
        }  # fmt: skip
        return TaskContext(**{**given, **changes})

    def objects(self, bundle_id):
        """Return the keys in the bucket under the task's prefix."""
        return sorted(self.buckets.list(BUCKET, f"{self.get(bundle_id).prefix}."))

    def opens(self, bundle_id):
        """Whether the bundle opens to the content of the disk."""
        task = self.get(bundle_id)
        output = self.folder / f"{bundle_id}.raw"
        return self._opened(task, output) == self.instances.get(task.instance_id).root_volume.path.read_bytes()

    def _opened(self, task, output):
        folder = self.components.settings.directory.buckets / BUCKET
        manifest, service = (folder / manifest_filename(task.prefix)).read_bytes(), self.components.service
        bound = folder / bound_side_filename(task.prefix, manifest)
        side_file = (bound if bound.exists() else folder / side_filename(task.prefix)).read_bytes()
        open_bundle(
            manifest, DirectoryParts(folder), service.private_key, output,
            certificate=service.certificate, side_file=side_file,
        )  # fmt: skip
        return output.read_bytes()
