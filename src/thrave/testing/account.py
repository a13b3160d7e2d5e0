"""An account of a test, and the clock of the service."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrave.compute.directory_driver import new_instance_id
from thrave.compute.errors import InstanceError
from thrave.compute.instance import Instance
from thrave.identity.accounts import AccessKey
from thrave.testing.server import REGION

if TYPE_CHECKING:
    from thrave.testing.service import ThraveService


@dataclass
class ServiceAccount:
    """An account of `ThraveService` with an access key."""

    service: "ThraveService"
    account_id: str
    key: AccessKey
    _instances: list[str] = field(default_factory=list, repr=False)
    _disks: list[Path] = field(default_factory=list, repr=False)

    def client(self, service: str = "ec2", **options: Any) -> Any:  # noqa: ANN401 (boto3 ships no types)
        """Return an unmodified boto3 client for `ec2`, `s3` or `sts`; `options` are those of `boto3.client`."""
        return self.service.client(self.key, service, **options)

    def instance(self, root_volume: Path | None = None, **details: Any) -> Instance:  # noqa: ANN401 (each field has its own type)
        """Add a running Windows instance.

        Args:
            root_volume: The raw disk that is bundled. By default a new disk of 4 MiB, different for each instance.
            details: Those of `ThraveServer.instance`.
        """
        instance_id = details.pop("instance_id", None) or new_instance_id()
        if root_volume is None:
            root_volume = self._new_disk(instance_id)
        instance = self.service.instance(self.account_id, root_volume, instance_id=instance_id, **details)
        self._instances.append(instance_id)
        return instance

    def storage(self, bucket: str, prefix: str, **changes: object) -> dict[str, dict[str, object]]:
        """Return the `Storage` of a BundleInstance call, with an upload policy as the AWS CLI creates it."""
        return self.service.storage(self.key, bucket, prefix, **changes)

    def wait_for_end(self, bundle_id: str) -> str:
        """Wait until a task has ended, without polling; return its state: `complete` or `failed`.

        Raises:
            TimeoutError: The task has not ended after a minute.
        """
        return str(self.service.commands.send("wait_for_end", bundle_id))

    def environment(self) -> Mapping[str, str]:
        """Return variables with which boto3 and the AWS CLI use the service: endpoints, region and credentials.

        Requests to other services of AWS are also sent to Thrave, which refuses them.
        """
        return {
            "AWS_ACCESS_KEY_ID": self.key.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.key.secret_access_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.service.url,  # an error of ours for the services that Thrave does not have
            "AWS_ENDPOINT_URL_EC2": self.service.url,
            "AWS_ENDPOINT_URL_S3": self.service.s3_url,
            "AWS_ENDPOINT_URL_STS": self.service.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def close(self) -> None:
        """Remove the account's tasks, instances, generated disks and buckets; `reset` the service."""
        self.service.reset()
        ec2 = self.client("ec2")
        for task in ec2.describe_bundle_tasks()["BundleTasks"]:
            if task["State"] not in {"complete", "failed"}:
                with suppress(ec2.exceptions.ClientError):  # it has ended meanwhile
                    ec2.cancel_bundle_task(BundleId=task["BundleId"])
                self.wait_for_end(task["BundleId"])
        for instance_id in self._instances:
            with suppress(InstanceError):  # the test has removed it
                self.service.instances.remove(instance_id)
        for disk in self._disks:
            disk.unlink(missing_ok=True)
        self.service.commands.send("remove_buckets", self.account_id)

    def _new_disk(self, instance_id: str) -> Path:
        from thrave.moto.disks import GeneratedDisk  # noqa: PLC0415 (needs moto, as the service)

        folder = self.service.data.root / "disks"
        folder.mkdir(exist_ok=True)
        disk = folder / f"{instance_id}.raw"
        disk.write_bytes(GeneratedDisk(instance_id).content)
        self._disks.append(disk)
        return disk


@dataclass(frozen=True)
class ServiceClock:
    """The clock of the service. It is stopped, and a task changes its state when the test says so.

    The times of tasks, and the expiration of upload policies, are those of this clock.
    """

    service: "ThraveService"

    @property
    def now(self) -> datetime:
        """The time of the service, in UTC."""
        return datetime.fromisoformat(self.service.commands.send("time"))

    def set(self, time: datetime) -> None:
        """Set the clock. A time without a zone is in UTC."""
        aware = time.replace(tzinfo=UTC) if time.tzinfo is None else time
        self.service.commands.send("set_time", aware.isoformat())

    def tick(self, seconds: float | timedelta) -> None:
        """Advance the clock."""
        given = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
        self.service.commands.send("add_time", given)

    def hold(self) -> None:
        """From now on each task stops at the beginning of each state."""
        self.service.commands.send("hold")

    def advance(self, bundle_id: str, until: str | None = None) -> str:
        """Let a task continue until it is in a state or has ended; return its state then.

        The states are `pending` (nothing was done), `waiting-for-shutdown` (the instance still runs), `bundling` (the
        instance is stopped), `storing` (the parts are stored and the instance runs) and `complete`.

        Args:
            bundle_id: The task.
            until: The state; None: the next one.

        Raises:
            TimeoutError: The task has not reached the state after a minute.
            ValueError: There is no such state.
        """
        return str(self.service.commands.send("advance", bundle_id, until))
