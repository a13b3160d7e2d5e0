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
# A service that was paused has closed its old connections; one that was killed never responds.
_FEW_ATTEMPTS = Config(retries={"total_max_attempts": 2}, connect_timeout=10, read_timeout=60)
_EARLY = NOISE // PART_SIZE // 2  # parts; if no more are stored, the read of the volume has not ended


class LibvirtService:
    """A service with its settings; it runs from `start` to `stop` or `kill`."""

    def __init__(self, folder: Path, host: Host, **settings: object) -> None:
        """Use `folder` for all files of the service."""
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
        """Start the service with changed settings, which are kept. With a `failpoint` it may end before it responds."""
        self._settings = {**self._settings, "failpoint": None, **changes}
        environment = {name: value for name, value in self._settings.items() if value is not None}
        self.server.environment = {f"THRAVE_{name.upper()}": _as_text(value) for name, value in environment.items()}
        with suppress(ServerError) if "failpoint" in changes else nullcontext():
            self.server.start()
            self.ec2 = self.server.client(self._key, config=_FEW_ATTEMPTS)

    def stop(self) -> None:
        """Stop the service if it is running."""
        if self.is_running:
            self.server.stop()

    def kill(self) -> None:
        """End the service by SIGKILL."""
        self.server.stop(signal.SIGKILL)

    @property
    def is_running(self) -> bool:
        """Whether the process of the service is running."""
        return self.server.process is not None and self.server.process.poll() is None

    def await_crash(self) -> None:
        """Wait until the service has killed itself at its failpoint."""
        eventually(lambda: not self.is_running, "the service kills itself at its failpoint")
        self.server.stop()
        assert self.server.process.returncode == -signal.SIGKILL

    def domain(self, name: str, guest: GuestImage, **details: object) -> Domain:
        """Create a guest of Alice's. Only one guest with the same name can exist at a time."""
        self._domains += 1
        folder = self.folder / f"{name}-{self._domains}"
        return Domain(self.host, name, folder, guest, self.account.account_id, **details)

    def bundle(self, domain: Domain) -> "Bundle":
        """Call BundleInstance."""
        self._bundles += 1
        prefix = f"{domain.name}-{self._bundles}"
        storage = self.server.storage(self._key, BUCKET, prefix)
        with suppress(BotoCoreError):  # a service that crashes may not respond
            self.ec2.bundle_instance(InstanceId=domain.instance_id, Storage=storage)
        return Bundle(self, domain, prefix)

    @contextmanager
    def paused_during_read(self, bundle: "Bundle") -> Iterator[None]:
        """Pause the service (SIGSTOP) for the block, while it reads the volume."""

        def stored_parts() -> list[Path]:
            assert self.is_running, "the service has ended"
            task = bundle.task()
            assert task["State"] != "failed", task
            return bundle.parts()

        eventually(stored_parts, "a part is stored", interval=0, details=bundle.task)
        os.kill(self.server.process.pid, signal.SIGSTOP)
        try:
            assert len(bundle.parts()) <= _EARLY, "the service may have read the whole volume before it was paused"
            yield
        finally:
            os.kill(self.server.process.pid, signal.SIGCONT)


@dataclass(frozen=True)
class Bundle:
    """A requested bundle."""

    service: LibvirtService
    domain: Domain
    prefix: str

    def task(self) -> dict[str, object]:
        """Return the task from DescribeBundleTasks."""
        tasks = self.service.ec2.describe_bundle_tasks()["BundleTasks"]
        (task,) = (task for task in tasks if task["Storage"]["S3"]["Prefix"] == self.prefix)
        return task

    def ended(self, timeout: float = TIMEOUT) -> dict[str, object]:
        """Wait until the task has ended, and return it."""
        return eventually(self.task, "the task ends", until=lambda task: task["State"] in ENDED, timeout=timeout)

    def completed(self, timeout: float = TIMEOUT) -> "Bundle":
        """Wait until the task is complete, and return the bundle."""
        task = self.ended(timeout)
        assert task["State"] == "complete", task
        return self

    def failure(self) -> tuple[str, str]:
        """Wait until the task has failed and the bucket is empty; return code and message."""
        task = self.ended()
        assert task["State"] == "failed", task
        eventually(self._objects, "the bucket is empty", until=lambda objects: not objects)
        return task["BundleTaskError"]["Code"], task["BundleTaskError"]["Message"]

    def warning(self) -> str:
        """Return the warning of the task, or an empty string."""
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
        """Return the stored parts."""
        return [path for path in self._objects() if ".part." in path.name]

    def opened(self) -> Path:
        """Open the bundle with every check; return the raw image."""
        image = self.service.folder / f"{self.prefix}.raw"
        if not image.exists():
            opened_sha256(self.service.server, BUCKET, self.prefix, image)
        return image

    def drive(self) -> GuestDisk:
        """Return C: in the bundle."""
        return GuestDisk(self.opened(), self.service.folder)

    def remove(self) -> None:
        """Delete the objects of the bundle without the service."""
        for path in self._objects():
            path.unlink()

    def _objects(self) -> list[Path]:
        return [*(self.service.server.data.buckets / BUCKET).glob(f"{self.prefix}.*")]


@contextmanager
def running_service(folder: Path, host: Host, **settings: object) -> Iterator[LibvirtService]:
    """Yield a running service; stop it after the block."""
    service = LibvirtService(folder, host, **settings)
    service.start()
    try:
        yield service
    finally:
        service.stop()


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
