"""A service on a real store, with an account that has a key of the store: what a client requests and finds.

The store is looked at directly, never through what may stand between the service and it.
"""

import shutil
import subprocess
import sys
import uuid
from pathlib import Path

from botocore.config import Config

from support.bundles.open_check import opened_folder_sha256
from support.disks.raw_disk import make_disk
from support.servers import stores
from support.service.bundle_tasks import await_task
from thrave.buckets.errors import NoSuchBucket
from thrave.buckets.s3_objects import S3ObjectClient

UPLOAD_BY_SERVICE = {
    "upload_credentials": "service",
    "s3_access_key_id": stores.SERVICE.access_key_id,
    "s3_secret_access_key": stores.SERVICE.secret_access_key,
}
"""Settings of a service that has a key of its own."""


class ServiceOnStore:
    """A service on a store, with the account of Alice, who has a key that the store knows too."""

    def __init__(self, server, store, folder):
        self.server, self.store = server, store
        self.account, self.own_key = server.account("alice")
        self.disk = make_disk(folder / "disk.raw", 3 << 20)
        self._import_key(stores.ALICE, folder / "credentials")

    def begin(self, folder):
        self.bucket = f"alice-{uuid.uuid4().hex[:12]}"
        self.objects = S3ObjectClient(self.store.connection(stores.ALICE))
        self._folder = folder
        return self

    def _import_key(self, key, file):
        file.touch(mode=0o600)
        secret = f"aws_secret_access_key = {key.secret_access_key}\n"
        file.write_text(f"[default]\naws_access_key_id = {key.access_key_id}\n{secret}")
        thrave = [sys.executable, "-m", "thrave", "account", "key", "import", self.account.account_id]
        data = ["--data-dir", str(self.server.data.root)]
        subprocess.run([*thrave, "--credentials", str(file), *data], check=True, capture_output=True)

    def instance(self):
        # A disk of its own: a volume that another machine may write to is refused.
        disk = Path(shutil.copyfile(self.disk, self.disk.with_name(f"{uuid.uuid4().hex}.raw")))
        return self.server.instance(self.account.account_id, disk).instance_id

    def bundle(self, policy, signature, key=stores.ALICE):
        """Ask for a bundle as boto3 does; give the task when it has ended."""
        ec2 = self.server.client(self.own_key, config=Config(retries={"total_max_attempts": 1}))
        storage = {
            "Bucket": self.bucket,
            "Prefix": "winami",
            "AWSAccessKeyId": key.access_key_id,
            "UploadPolicy": policy,
            "UploadPolicySignature": signature,
        }
        task = ec2.bundle_instance(InstanceId=self.instance(), Storage={"S3": storage})["BundleTask"]
        return self.ended(task["BundleId"])

    def ended(self, bundle_id):
        """Wait for the end of a task and return it."""
        return await_task(self.server.client(self.own_key), bundle_id)

    def files(self):
        """Return the keys in the bucket; a failed task removes a bucket that was created for it."""
        try:
            return sorted(self.objects.list(self.bucket, ""))
        except NoSuchBucket:
            return []

    def is_whole(self):
        folder = self._folder / "fetched"
        folder.mkdir()
        for key in self.files():
            (folder / key).write_bytes(self.objects.get(self.bucket, key))
        output = self._folder / "opened.raw"
        opened_folder_sha256(self.server, folder, "winami", output)
        return output.read_bytes() == self.disk.read_bytes()
