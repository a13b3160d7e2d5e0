"""A service on the libvirt host of `libvirt_host.py`, with an account `alice` that bundles the host's guests.

The service is a forked `thrave serve`, as in `kill_sweep.py`. A test can kill it, or stop it (SIGSTOP) while it reads a
root volume, so that what the test does next happens during the read.
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from botocore.config import Config
from botocore.exceptions import BotoCoreError

from support.bundles.open_check import opened_sha256
from support.eventually import eventually
from support.libvirt.guest import NOISE, GuestImage
from support.libvirt.guest_disk import GuestDisk
from support.libvirt.guest_domain import TIMEOUT, Domain
from support.libvirt.libvirt_host import Host
from support.service.bundle_tasks import ENDED
from support.service.forked_server import ForkedServer
from thrave.bundle.model import PART_SIZE
from thrave.config import DataDirectory
from thrave.database import open_engine
from thrave.tasks.repository import TaskRepository
from thrave.testing import ServerError
from thrave.vault import Vault

BUCKET = "alices-guests"
# A service that has stood still has closed what it was asked on before; one that has died never answers.
_FEW_TRIES = Config(retries={"total_max_attempts": 2}, connect_timeout=10, read_timeout=60)
_EARLY = NOISE // PART_SIZE // 2  # parts; when no more are stored, some of the volume is still to be read


class LibvirtService:
    """A service with its settings; it lives from `start` to `stop` or `kill`."""

    def __init__(self, folder: Path, host: Host, **settings: object) -> None:
        """Have everything of it in `folder`."""
        self.folder = folder
        self.host = host
        self._settings = {
            "hypervisor": "libvirt", "libvirt_uri": host.uri, "upload_concurrency": 2, "shutdown_timeout": 60,
            **settings,
        }  # fmt: skip
        self.server = ForkedServer(DataDirectory(folder / "thrave"))
        self.account, self._key = self.server.account("alice")
        self._bundles = self._domains = 0

    def start(self, **changes: object) -> None:
        """Start it, with other settings from now on; with a `failpoint` it may be dead before it answers."""
        self._settings = {**self._settings, "failpoint": None, **changes}
        told = {name: value for name, value in self._settings.items() if value is not None}
        self.server.environment = {f"THRAVE_{name.upper()}": _as_text(value) for name, value in told.items()}
        with suppress(ServerError) if "failpoint" in changes else nullcontext():
            self.server.start()
            self.ec2 = self.server.client(self._key, config=_FEW_TRIES)

    def stop(self) -> None:
        """Stop it, if it lives."""
        if self.lives:
            self.server.stop()

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.server.stop(signal.SIGKILL)

    @property
    def lives(self) -> bool:
        """Whether its process is there."""
        return self.server.process is not None and self.server.process.poll() is None

    def await_death(self) -> None:
        """Wait until it has killed itself."""
        eventually(lambda: not self.lives, "the service kills itself at its failpoint")
        self.server.stop()
        assert self.server.process.returncode == -signal.SIGKILL

    def domain(self, name: str, guest: GuestImage, **details: object) -> Domain:
        """A guest of Alice's; of those of one name only one can be there at a time."""
        self._domains += 1
        folder = self.folder / f"{name}-{self._domains}"
        return Domain(self.host, name, folder, guest, self.account.account_id, **details)

    def bundle(self, domain: Domain) -> "Bundle":
        """Call BundleInstance."""
        self._bundles += 1
        prefix = f"{domain.name}-{self._bundles}"
        storage = self.server.storage(self._key, BUCKET, prefix)
        with suppress(BotoCoreError):  # a service that is to crash may not answer
            self.ec2.bundle_instance(InstanceId=domain.instance_id, Storage=storage)
        return Bundle(self, domain, prefix)

    @contextmanager
    def standing_still(self, bundle: "Bundle") -> Iterator[None]:
        """Have the service stand still while it reads the volume, for as long as the block lasts."""

        def stored_parts() -> list[Path]:
            assert self.lives, "the service has ended"
            task = bundle.task()
            assert task["State"] != "failed", task
            return bundle.parts()

        eventually(stored_parts, "a part is stored", interval=0, details=bundle.task)
        os.kill(self.server.process.pid, signal.SIGSTOP)
        try:
            assert len(bundle.parts()) <= _EARLY, "it may have read the volume before it could be stopped"
            yield
        finally:
            os.kill(self.server.process.pid, signal.SIGCONT)


@dataclass(frozen=True)
class Bundle:
    """A bundle that was asked for."""

    service: LibvirtService
    domain: Domain
    prefix: str

    def task(self) -> dict[str, object]:
        """The task, as DescribeBundleTasks gives it."""
        tasks = self.service.ec2.describe_bundle_tasks()["BundleTasks"]
        (task,) = (task for task in tasks if task["Storage"]["S3"]["Prefix"] == self.prefix)
        return task

    def ended(self, timeout: float = TIMEOUT) -> dict[str, object]:
        """The task, when it has ended."""
        return eventually(self.task, "the task ends", until=lambda task: task["State"] in ENDED, timeout=timeout)

    def completed(self, timeout: float = TIMEOUT) -> "Bundle":
        """Wait for its end, which must be a good one."""
        task = self.ended(timeout)
        assert task["State"] == "complete", task
        return self

    def failure(self) -> tuple[str, str]:
        """Code and message of the task, which must fail, and leave nothing in the bucket."""
        task = self.ended()
        assert task["State"] == "failed", task
        eventually(self._objects, "the bucket is empty", until=lambda objects: not objects)
        return task["BundleTaskError"]["Code"], task["BundleTaskError"]["Message"]

    def notice(self) -> str:
        """What the operator is told of the task, besides how it has ended."""
        data = self.service.server.data
        database = open_engine(data.database)
        try:
            return (
                TaskRepository(database, Vault.open_or_create(data.vault_key)).get(self.task()["BundleId"]).warning
                or ""
            )
        finally:
            database.dispose()

    def parts(self) -> list[Path]:
        """Its parts that are in the bucket."""
        return [path for path in self._objects() if ".part." in path.name]

    def opened(self) -> Path:
        """The image in it, every check passed; a raw disk."""
        image = self.service.folder / f"{self.prefix}.raw"
        if not image.exists():
            opened_sha256(self.service.server, BUCKET, self.prefix, image)
        return image

    def drive(self) -> GuestDisk:
        """C: in it."""
        return GuestDisk(self.opened(), self.service.folder)

    def remove(self) -> None:
        """Take it out of the bucket, past the service."""
        for path in self._objects():
            path.unlink()

    def _objects(self) -> list[Path]:
        return [*(self.service.server.data.buckets / BUCKET).glob(f"{self.prefix}.*")]


@contextmanager
def running_service(folder: Path, host: Host, **settings: object) -> Iterator[LibvirtService]:
    """A service that lives, stopped at the end."""
    service = LibvirtService(folder, host, **settings)
    service.start()
    try:
        yield service
    finally:
        service.stop()


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
