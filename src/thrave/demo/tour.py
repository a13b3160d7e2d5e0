"""The steps of `thrave demo`: create an account and an instance, bundle with boto3, open the bundle and compare.

Every step uses the public interface: the server is a `thrave serve` process, the client is an unmodified boto3 with its
own waiter, and the bundle is opened from the files in the bucket. The server is stopped at the end.
"""

import hashlib
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrave import files
from thrave.bundle.base import DirectoryParts
from thrave.bundle.model import manifest_filename, side_filename
from thrave.bundle.opener import open_bundle
from thrave.bundle.verifier import OpenResult
from thrave.compute.instance import Instance, InstanceState
from thrave.concurrency import Call, monotonic, random_hex, sleep
from thrave.config import DataDirectory
from thrave.demo.disk import check_size, make_demo_disk, make_ephemeral_disk
from thrave.identity.accounts import AccessKey
from thrave.identity.certificates import CERTIFICATE_FILE, load_certificate, load_private_key, new_certificate
from thrave.tasks.models import FINISHED
from thrave.testing import REGION, ThraveServer, import_boto3

BUCKET = "demo-bundles"
PREFIX = "winami"
POLL_INTERVAL = 0.1  # seconds between two requests for the task's state
WAIT_TIMEOUT = 3600  # seconds for the whole task

Task = dict[str, Any]
"""A bundle task as boto3 returns it."""


class DemoError(Exception):
    """A step of the demo had an unexpected result."""


@dataclass(frozen=True)
class DemoAccount:
    """The account of the demo, with its access key and certificate."""

    account_id: str
    key: AccessKey
    certificate: Path
    private_key: Path


def create_account(server: ThraveServer) -> DemoAccount:
    """Create an account with an access key and a certificate."""
    name = f"demo-{random_hex(4)}"
    certificate, private_key = new_certificate(name)
    account, key = server.account(name, certificate)
    keys = server.data.root / "demo-keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    paths = keys / f"cert-{name}.pem", keys / f"pk-{name}.pem"
    for path, pem in zip(paths, (certificate, private_key), strict=True):
        files.create_exclusive(path, pem.encode())
    return DemoAccount(account.account_id, key, *paths)


def make_instance(server: ThraveServer, demo_account: DemoAccount, size: int) -> Instance:
    """Create a Windows-like instance with a root disk of `size` bytes (C:) and an ephemeral disk."""
    disks = server.data.root / "demo-disks" / random_hex(4)
    disks.mkdir(parents=True)
    root, ephemeral = disks / "root.raw", disks / "ephemeral0.raw"
    make_demo_disk(root, size)
    make_ephemeral_disk(ephemeral)
    return server.instance(demo_account.account_id, root, volumes=[ephemeral])


def bundle_with_boto3(
    server: ThraveServer, demo_account: DemoAccount, instance_id: str, prefix: str, report_task: Callable[[Task], None]
) -> Task:
    """Bundle an instance with boto3 and boto3's waiter; call `report_task` with the task at each poll.

    Raises:
        botocore.exceptions.WaiterError: The task failed.
    """
    ec2 = server.client(demo_account.key)
    storage = server.storage(demo_account.key, BUCKET, prefix)
    task: Task = ec2.bundle_instance(InstanceId=instance_id, Storage=storage)["BundleTask"]
    ids = {"BundleIds": [task["BundleId"]]}
    waiter = ec2.get_waiter("bundle_task_complete")
    waiting = Call("waiter", lambda: waiter.wait(**ids, WaiterConfig={"Delay": 1, "MaxAttempts": WAIT_TIMEOUT}))
    while task["State"] not in FINISHED:
        report_task(task)
        sleep(POLL_INTERVAL)
        (task,) = ec2.describe_bundle_tasks(**ids)["BundleTasks"]
    report_task(task)
    waiting.result(WAIT_TIMEOUT)
    return task


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class TourResult:
    """The result of the demo."""

    data: Path
    demo_account: DemoAccount
    instance_id: str
    bundle_id: str
    prefix: str
    size: int
    """Bytes of the root disk."""
    sha256: str
    bundled_size: int
    """Bytes of all parts."""
    parts: int
    seconds: float
    """From the call of BundleInstance to the state `complete`."""
    image: Path

    @property
    def bucket_folder(self) -> Path:
        """The directory that is the bucket."""
        return DataDirectory(self.data).buckets / BUCKET

    @property
    def manifest(self) -> Path:
        """Path of the manifest."""
        return self.bucket_folder / f"{self.prefix}.manifest.xml"

    def document(self) -> dict[str, object]:
        """Return the result as JSON."""
        return {
            "accountId": self.demo_account.account_id,
            "accessKeyId": self.demo_account.key.access_key_id,
            "instanceId": self.instance_id,
            "bundleId": self.bundle_id,
            "bucket": BUCKET,
            "prefix": self.prefix,
            "size": self.size,
            "sha256": self.sha256,
            "bundledSize": self.bundled_size,
            "parts": self.parts,
            "seconds": round(self.seconds, 3),
            "manifest": self.manifest,
            "image": self.image,
            "data": self.data,
        }

    def aws_commands(self) -> list[str]:
        """Return shell commands that do the same with the AWS CLI."""
        key, data = self.demo_account.key, shlex.quote(str(self.data))
        aws = f"aws --endpoint-url http://127.0.0.1:8773 --region {REGION} ec2"
        opened = shlex.quote(str(self.image.with_name("by-hand.raw")))
        manifest = shlex.quote(str(self.bucket_folder / "by-hand.manifest.xml"))
        bundle_instance = (
            f"{aws} bundle-instance --instance-id {self.instance_id} --bucket {BUCKET} --prefix by-hand"
            " --owner-akid $AWS_ACCESS_KEY_ID --owner-sak $AWS_SECRET_ACCESS_KEY"
        )
        return [
            f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            f"thrave serve --data-dir {data} &",
            f"export AWS_ACCESS_KEY_ID={key.access_key_id}",
            f"export AWS_SECRET_ACCESS_KEY={key.secret_access_key}",
            bundle_instance,
            f"{aws} wait bundle-task-complete --filters Name=s3-prefix,Values=by-hand",
            f"{aws} describe-bundle-tasks",
            f"thrave open {manifest} --key {shlex.quote(str(self.demo_account.private_key))} -o {opened}",
        ]

    def openssl_commands(self) -> list[str]:
        """Return shell commands that open the bundle with openssl, gunzip and tar only."""
        manifest, key = shlex.quote(str(self.manifest)), shlex.quote(str(self.demo_account.private_key))
        folder = shlex.quote(str(self.bucket_folder))
        decode_key = f'sed "s/.*<user_encrypted_$1[^>]*>//; s/<.*//; s/../\\\\\\\\x&/g" {manifest}'
        return [
            f'slot() {{ printf "$({decode_key})" | openssl pkeyutl -decrypt -inkey {key}; }}',
            f"parts() {{ sed 's/<filename>/\\n&/g' {manifest} | sed -n 's/^<filename>\\([^<]*\\)<.*/\\1/p'; }}",
            f"parts | (cd {folder} && xargs -d '\\n' cat) |",
            "    openssl enc -d -aes-128-cbc -K $(slot key) -iv $(slot iv) | gunzip | tar -xSf -",
        ]


def run_tour(
    data: Path, size: int, report_step: Callable[[str], None], report_task: Callable[[Task], None]
) -> TourResult:
    """Run all steps of the demo.

    Args:
        data: The data directory; created if needed, and kept.
        size: Bytes of the root disk.
        report_step: Called with a line of text at each step.
        report_task: Called with the bundle task at each poll.

    Raises:
        ComponentMissingError: boto3 is not installed.
        DemoDiskError: A disk cannot have this size.
        DemoError: A step had an unexpected result, or the disk has too little space.
    """
    import_boto3()
    check_size(size)
    _check_free_space(data, size)
    with ThraveServer.running(data) as server:
        report_step(f"thrave serve listens on {server.url}")
        demo_account = create_account(server)
        report_step("created an account with an access key and a certificate")
        instance = make_instance(server, demo_account, size)
        report_step("created a Windows-like instance: a root disk with NTFS, and an ephemeral disk that is not bundled")
        prefix = f"{PREFIX}-{instance.instance_id[-6:]}"
        report_step(f"boto3 calls BundleInstance for {instance.instance_id}, into {BUCKET}/{prefix}")
        start = monotonic()
        task = bundle_with_boto3(server, demo_account, instance.instance_id, prefix, report_task)
        seconds = monotonic() - start
        if server.instances.state(instance.instance_id) is not InstanceState.RUNNING:
            raise DemoError("The instance is not running again after the bundle task.")
    report_step("verifying and opening the bundle, comparing it with the root disk")
    opened = _open_bundle(server.data, demo_account, prefix)
    digest = sha256(opened.output)
    if digest != sha256(instance.root_volume.path):
        raise DemoError(f"The opened image {opened.output} differs from the root disk {instance.root_volume.path}.")
    return TourResult(
        data=data,
        demo_account=demo_account,
        instance_id=instance.instance_id,
        bundle_id=task["BundleId"],
        prefix=prefix,
        size=opened.manifest.size,
        sha256=digest,
        bundled_size=opened.manifest.bundled_size,
        parts=len(opened.manifest.parts),
        seconds=seconds,
        image=opened.output,
    )


def _check_free_space(data: Path, size: int) -> None:
    """Raise DemoError if the file system cannot hold the root disk, its bundle and the opened image."""
    folder = next(parent for parent in (data.absolute(), *data.absolute().parents) if parent.exists())
    free, needed = shutil.disk_usage(folder).free, 2 * size  # half of the disk is holes
    if free < needed:
        raise DemoError(
            f"{folder} has {free >> 20} MiB free, but the demo needs {needed >> 20} MiB. Pass a smaller --size."
        )


def _open_bundle(data: DataDirectory, demo_account: DemoAccount, prefix: str) -> OpenResult:
    bucket = data.buckets / BUCKET
    return open_bundle(
        (bucket / manifest_filename(prefix)).read_bytes(),
        DirectoryParts(bucket),
        load_private_key(demo_account.private_key.read_bytes()),
        data.root / f"{prefix}.raw",
        certificate=load_certificate((data.service / CERTIFICATE_FILE).read_bytes()),
        side_file=(bucket / side_filename(prefix)).read_bytes(),
    )
