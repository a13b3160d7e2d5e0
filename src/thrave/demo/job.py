"""The demo's job: an account, an instance, a real server, and an unmodified boto3 client that has it bundled.

Everything is done as a user would do it: the server is the `thrave serve` command in a process of its own, the client
is boto3 with its own waiter, the bundle is opened from the files in the bucket. Nothing here is asked of the service
behind its door, and nothing is left running.
"""

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrave import files
from thrave.compute.instance import Instance
from thrave.concurrency import Call
from thrave.demo.disk import make_demo_disk, make_ephemeral_disk
from thrave.identity.accounts import AccessKey
from thrave.identity.certificates import new_certificate
from thrave.tasks.models import FINISHED
from thrave.testing import ThraveServer

BUCKET = "demo-bundles"
LOOK_AGAIN = 0.1  # seconds between two looks at the task
WAIT_TIMEOUT = 3600  # seconds for the whole task

Task = dict[str, Any]
"""A bundle task as boto3 gives it."""


@dataclass(frozen=True)
class Customer:
    """The demo's account, and what it signs with."""

    account_id: str
    key: AccessKey
    certificate: Path
    private_key: Path


def make_customer(server: ThraveServer) -> Customer:
    """Make an account with an access key and a certificate of its own."""
    name = f"demo-{secrets.token_hex(4)}"
    certificate, private_key = new_certificate(name)
    account, key = server.account(name, certificate)
    keys = server.data.root / "demo-keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    paths = keys / f"cert-{name}.pem", keys / f"pk-{name}.pem"
    for path, pem in zip(paths, (certificate, private_key), strict=True):
        files.create_exclusive(path, pem.encode())
    return Customer(account.account_id, key, *paths)


def make_instance(server: ThraveServer, customer: Customer, size: int) -> Instance:
    """Make a Windows-like instance: a root disk of `size` bytes (C:), and a second, ephemeral one."""
    disks = server.data.root / "demo-disks" / secrets.token_hex(4)
    disks.mkdir(parents=True)
    root, ephemeral = disks / "root.raw", disks / "ephemeral0.raw"
    make_demo_disk(root, size)
    make_ephemeral_disk(ephemeral)
    return server.instance(customer.account_id, root, volumes=[ephemeral])


def bundle_with_boto3(
    server: ThraveServer, customer: Customer, instance_id: str, prefix: str, show: Callable[[Task], None]
) -> Task:
    """Bundle an instance as any boto3 program would, with boto3's own waiter; `show` each look at the task.

    Raises:
        botocore.exceptions.WaiterError: The task failed.
    """
    ec2 = server.client(customer.key)
    storage = server.storage(customer.key, BUCKET, prefix)
    task: Task = ec2.bundle_instance(InstanceId=instance_id, Storage=storage)["BundleTask"]
    ids = {"BundleIds": [task["BundleId"]]}
    waiter = ec2.get_waiter("bundle_task_complete")
    waiting = Call("waiter", lambda: waiter.wait(**ids, WaiterConfig={"Delay": 1, "MaxAttempts": WAIT_TIMEOUT}))
    while task["State"] not in FINISHED:
        show(task)
        time.sleep(LOOK_AGAIN)
        (task,) = ec2.describe_bundle_tasks(**ids)["BundleTasks"]
    show(task)
    waiting.result(WAIT_TIMEOUT)
    return task


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
