"""The service that all clients call, with an account, and what the tests need to know of it."""

from itertools import count
from pathlib import Path

from support.disks.raw_disk import make_disk
from support.service.bundle_tasks import await_task
from thrave.testing import ThraveServer, upload_policy

MIB = 1 << 20
BUCKET = "alices-bucket"


class World:
    """Alice's account and instances; `folder` is for their disks."""

    def __init__(self, server: ThraveServer, folder: Path) -> None:
        self.server = server
        self.account, self.key = server.account("alice")
        self._disks = (make_disk(folder / f"root{number}.raw", MIB) for number in count())
        self.ec2 = server.client(self.key)

    def instance(self, **details: object) -> str:
        """The id of a new instance with a disk of its own: a running one's disk is not bundled for another."""
        return self.server.instance(self.account.account_id, next(self._disks), **details).instance_id

    def deaf_instance(self) -> str:
        """One whose guest hears no request to power off: its task waits until somebody cancels it."""
        return self.instance(stop_command=("true",), state_command=("echo", "running"))

    def bundling(self, instance_id: str, prefix: str) -> tuple[str, ...]:
        """The arguments of a driver's `bundle`."""
        policy, signature = upload_policy(self.key.secret_access_key, BUCKET, prefix)
        return instance_id, BUCKET, prefix, policy.decode(), signature

    def bundle(self, instance_id: str, prefix: str) -> str:
        """Bundle with a client of our own; the task's id."""
        storage = self.server.storage(self.key, BUCKET, prefix)
        return self.ec2.bundle_instance(InstanceId=instance_id, Storage=storage)["BundleTask"]["BundleId"]

    def ended(self, bundle_id: str):
        """The task as a client of our own describes it when it has ended."""
        return await_task(self.ec2, bundle_id)

    def tasks_of(self, instance_id: str):
        """The tasks of an instance."""
        filters = [{"Name": "instance-id", "Values": [instance_id]}]
        return self.ec2.describe_bundle_tasks(Filters=filters)["BundleTasks"]

    def stored(self, prefix: str) -> bool:
        """Whether there is a whole bundle of that name."""
        return (self.server.data.buckets / BUCKET / f"{prefix}.manifest.xml").exists()
