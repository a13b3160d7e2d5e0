"""Bundling through a real server with an unmodified boto3 client, in one go and with the server killed on the way.

The server is `thrave serve` in a process of its own with all its data on tmpfs; the client's CPU is not counted.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from contenders import PREFIX, Contender, Keys, WrongOutputError, check_bundle, parts_in, total_size
from inputs import GIB
from measure import Run, Usage, observed

from thrave.identity.keys import AccessKey
from thrave.testing import ThraveServer

_BUCKET = "bench"
_LOOK_EVERY = 0.25  # seconds between two looks at the task: each costs the server some milliseconds
_LOOK_OFTEN = 0.005  # … at the bucket, for its next part
_PATIENCE = 600  # seconds


@dataclass
class _Client:
    """Somebody with an instance and a server."""

    server: ThraveServer
    key: AccessKey
    instance_id: str
    bundle_id: str = ""

    def bundle(self) -> None:
        """Call BundleInstance."""
        storage = self.server.storage(self.key, _BUCKET, PREFIX)
        answer = self.server.client(self.key).bundle_instance(InstanceId=self.instance_id, Storage=storage)
        self.bundle_id = answer["BundleTask"]["BundleId"]

    def wait_until_sealed(self, percent: int) -> None:
        """Wait for so much of the volume."""
        for task in self._looks():
            if int(task.get("Progress", "0%").rstrip("%")) >= percent:
                return

    def wait_until_complete(self) -> None:
        """Wait for the end."""
        for _ in self._looks():
            pass

    def used(self) -> Usage:
        """What the server has used so far."""
        assert self.server.process is not None
        return Usage.of(self.server.process.pid)

    def _looks(self) -> Iterator[dict[str, Any]]:
        """Look at the task again and again until it is complete."""
        ec2, given_up = self.server.client(self.key), time.monotonic() + _PATIENCE
        while time.monotonic() < given_up:
            (task,) = ec2.describe_bundle_tasks(BundleIds=[self.bundle_id])["BundleTasks"]
            if task["State"] == "failed":
                raise WrongOutputError(f"the task failed: {task['BundleTaskError']}")
            yield task
            if task["State"] == "complete":
                return
            time.sleep(_LOOK_EVERY)
        raise WrongOutputError("the task does not end")


def thrave_serving(name: str, disk: Path, data: int) -> Contender:
    """A task from BundleInstance to `complete`."""

    def bundle(folder: Path) -> Run:
        with _client(folder, disk) as client, observed() as seen:
            assert client.server.process is not None
            seen.roots.append(client.server.process.pid)
            before = client.used()
            client.bundle()
            client.wait_until_complete()
            used = client.used().since(before)
        size = total_size(parts_in(_bucket(folder)))
        return Run(seen.wall, used.cpu, seen.memory, used.written, foreign=seen.foreign(used.cpu), size=size)

    return Contender(name, data, bundle, partial(_check, disk))


def thrave_killed(name: str, disk: Path, data: int) -> Contender:
    """The same, with the server killed at half of it (SIGKILL) and started again.

    The run's CPU is both servers' while they answered. Its details: seconds from the server's answering again to the
    next new part in the bucket, parts that were sent twice, and GiB that were done at the kill.
    """

    def bundle(folder: Path) -> Run:
        bucket = _bucket(folder)
        with _client(folder, disk) as client, observed() as seen:
            before = client.used()
            client.bundle()
            client.wait_until_sealed(50)
            first = client.used().since(before)
            client.server.stop(signal.SIGKILL)
            sent = {part: part.stat().st_ino for part in parts_in(bucket)}
            client.server.start()
            answering, before = time.perf_counter(), client.used()
            _wait_for_more(bucket, len(sent))
            waited = time.perf_counter() - answering
            client.wait_until_complete()
            second = client.used().since(before)
        parts = parts_in(bucket)
        twice = sum(part.stat().st_ino != inode for part, inode in sent.items())
        done = {"first new part": waited, "sent twice": twice, "GiB done": len(sent) / len(parts) * data / GIB}
        cpu = first.cpu + second.cpu
        return Run(seen.wall, cpu, foreign=seen.foreign(cpu), size=total_size(parts), detail=done)

    return Contender(name, data, bundle, partial(_check, disk))


@contextmanager
def _client(folder: Path, disk: Path) -> Iterator[_Client]:
    keys = Keys.made_in(folder)
    with ThraveServer.running(folder / "data") as server:
        account, key = server.account("bench", keys.certificate.read_text())
        yield _Client(server, key, server.instance(account.account_id, disk).instance_id)


def _wait_for_more(bucket: Path, parts: int) -> None:
    given_up = time.monotonic() + _PATIENCE
    while len(parts_in(bucket)) <= parts:
        if time.monotonic() > given_up:
            raise WrongOutputError("no new part came after the restart")
        time.sleep(_LOOK_OFTEN)


def _bucket(folder: Path) -> Path:
    return folder / "data" / "buckets" / _BUCKET


def _check(disk: Path, folder: Path) -> None:
    bucket = _bucket(folder)
    secrets = Keys(folder / "cert.pem", folder / "pk.pem").secrets(bucket / f"{PREFIX}.manifest.xml")
    check_bundle(parts_in(bucket), secrets, disk, folder)
