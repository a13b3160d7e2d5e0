"""The service that all clients call, with an account and instances."""

from itertools import count
from pathlib import Path

from support.disks.raw_disk import make_disk
from support.service.bundle_tasks import await_task
from thrave.testing import ThraveServer, upload_policy

MIB = 1 << 20
BUCKET = "alices-bucket"


class World:
    """Alice's account and instances; their disks are in `folder`."""

    def __init__(self, server: ThraveServer, folder: Path) -> None:
        self.server = server
        self.account, self.key = server.account("alice")
        self._disks = (make_disk(folder / f"root{number}.raw", MIB) for number in count())
        self.ec2 = server.client(self.key)

    def instance(self, **details: object) -> str:
        """Create an instance with its own disk, since a disk of a running instance is refused; return its id."""
        return self.server.instance(self.account.account_id, next(self._disks), **details).instance_id

    def unresponsive_instance(self) -> str:
        """Create an instance that never powers off, so that its task waits until it is cancelled."""
        return self.instance(stop_command=("true",), state_command=("echo", "running"))

    def bundling(self, instance_id: str, prefix: str) -> tuple[str, ...]:
        """Return the arguments of a driver's `bundle`."""
        policy, signature = upload_policy(self.key.secret_access_key, BUCKET, prefix)
        return instance_id, BUCKET, prefix, policy.decode(), signature

    def bundle(self, instance_id: str, prefix: str) -> str:
        """Bundle with boto3; return the id of the task."""
        storage = self.server.storage(self.key, BUCKET, prefix)
        return self.ec2.bundle_instance(InstanceId=instance_id, Storage=storage)["BundleTask"]["BundleId"]

    def ended(self, bundle_id: str):
        """Wait for the end of a task; return the task as boto3 describes it."""
        return await_task(self.ec2, bundle_id)

    def tasks_of(self, instance_id: str):
        """Return the tasks of an instance."""
        filters = [{"Name": "instance-id", "Values": [instance_id]}]
        return self.ec2.describe_bundle_tasks(Filters=filters)["BundleTasks"]

    def stored(self, prefix: str) -> bool:
        """Return whether a complete bundle with this prefix exists."""
        return (self.server.data.buckets / BUCKET / f"{prefix}.manifest.xml").exists()
