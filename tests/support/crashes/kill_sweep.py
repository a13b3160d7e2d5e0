"""A service that is killed while it bundles an instance, and the conditions that must hold after each kill.

The instance is a machine with commands of its own, so that switching it takes processes; what it has been through, and
what is in the bucket, is looked at from outside: in files, in the database, in /proc.
"""

import hashlib
import os
import random
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from support.bundles.open_check import opened_sha256
from support.eventually import eventually, one_of
from support.instances.command_machine import Machine
from support.service.forked_server import ForkedServer
from thrave.bundle.manifest import read_manifest
from thrave.bundle.model import bound_side_filename, manifest_filename, side_filename
from thrave.compute.description_files import InstanceDescription
from thrave.compute.directory_driver import new_instance_id
from thrave.compute.instance import InstanceState, VolumeFile
from thrave.config import DataDirectory
from thrave.database import bundle_task, open_engine, task_in_progress
from thrave.tasks.models import FINISHED, BundleTaskState
from thrave.tasks.repository import TaskRepository
from thrave.testing import ServerError
from thrave.vault import Vault

BUCKET, PREFIX = "bucket", "winami"
UPLOAD_CONCURRENCY = 2
TIMEOUT = 60.0  # seconds that anything may take
ONE_TRY = Config(retries={"total_max_attempts": 1}, connect_timeout=10, read_timeout=30)
MIB = 1 << 20


# The steps of a task that nobody disturbs, in the order in which it comes to them.
TO_COMPLETE = [
    "record", "power noted", "shutdown sent", "shutdown seen", "volume opened", "sealing begun", "part sealed",
    "part stored", "part recorded", "sealing ended", "instance started", "side file stored", "earlier bundle noted",
    "manifest stored", "record closed",
]  # fmt: skip
# Those that touch what is in the bucket, when a bundle there is replaced.
TO_REPLACE = [
    "sealing begun", "part sealed", "part stored", "part recorded", "sealing ended", "side file stored",
    "earlier bundle noted", "manifest stored", "earlier bundle removed", "record closed",
]  # fmt: skip


_running = []  # services of the current test


def kill_remaining_services():
    """Kill the services that a failed test did not stop, so that the next test does not meet them."""
    while _running:
        server = _running.pop().server
        if server.process is not None and not server.process.stdout.closed:
            server.stop(signal.SIGKILL)


class KilledService:
    """One instance with a disk of five parts, one task on it, and the service, which is killed.

    `kill_remaining_services` stops it at the end of a test.
    """

    def __init__(
        self, folder, *, size=45 * MIB, image_format="raw", data=None, server=ForkedServer, environment=(), **settings
    ):
        self.folder = folder
        settings = {"upload_concurrency": UPLOAD_CONCURRENCY, "shutdown_timeout": 30, **settings}
        self.environment = {f"THRAVE_{name.upper()}": str(value) for name, value in settings.items()}
        self.environment.update(environment)
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.server = server(DataDirectory(data or folder / "thrave"))
        _running.append(self)
        self._arm(None)
        self.account, self.key = self.server.account("alice")
        disk = folder / "root.raw"
        disk.write_bytes(random.Random(1).randbytes(size))
        self.sha256 = hashlib.sha256(disk.read_bytes()).hexdigest()
        self.machine = Machine(folder)
        self.instance_id = self._instance(disk, image_format)
        self.bundle_id = None
        self.deaths = 0
        self.sent_again = 0
        self._stored = {}
        self._earlier = None
        self._disk = disk

    def replace(self):
        """Have a bundle of another disk replaced: from now on one of the two can be opened at each death."""
        self.environment["THRAVE_EXISTING_BUNDLE"] = "replace"
        assert self.come_to_an_end().state is BundleTaskState.COMPLETE
        self.await_power()
        self.server.stop()
        self._earlier = _Earlier(self.sha256, frozenset(self.objects()))
        changed = random.Random(2).randbytes(self._disk.stat().st_size)
        self._disk.write_bytes(changed)
        self.sha256, self.bundle_id, self._stored = hashlib.sha256(changed).hexdigest(), None, {}

    def check_earlier(self):
        """The bundle that was not replaced after all is as it was, and nothing else is there."""
        assert self._opened() == self._earlier.sha256
        assert self.objects().keys() == self._earlier.names

    def live(self, crash_at=None):
        """Start the service; with a crash point it may be dead before it answers."""
        self._arm(crash_at)
        with suppress(ServerError):
            self.server.start()
        return self.is_alive

    @property
    def is_alive(self):
        return self.server.process is not None and self.server.process.poll() is None

    def kill(self):
        """Kill it by SIGKILL, wherever it is."""
        self.server.stop(signal.SIGKILL)
        self._look_at_the_dead()

    def die_at(self, crash_at):
        """Have it live until it kills itself there; ask for the task if there is none yet."""
        if self.live(crash_at) and self.bundle_id is None:
            self.ask()
        self.await_death(crash_at)

    def await_death(self, crash_at):
        eventually(lambda: not self.is_alive, f"the service kills itself at: {crash_at}", timeout=TIMEOUT)
        self.server.stop()
        assert self.server.process.returncode == -signal.SIGKILL
        self._look_at_the_dead()

    def ask(self):
        """Call BundleInstance; the answer may never come."""
        storage = self.server.storage(self.key, BUCKET, PREFIX)
        self.bundle_id = self._call("bundle_instance", InstanceId=self.instance_id, Storage=storage)

    def cancel(self):
        """Call CancelBundleTask; the answer may never come."""
        self._call("cancel_bundle_task", BundleId=self.bundle_id)

    def cancel_behind_its_back(self):
        """Cancel the task while nobody works on it."""
        with self.records() as records:
            assert records.cancel(self.bundle_id)

    def come_to_an_end(self):
        """Let it live until the task has ended; give the task."""
        assert self.is_alive or self.live()
        if self.bundle_id is None:
            self.ask()
        return self.await_state(*FINISHED)

    def await_state(self, *states):
        """Wait until the task is in one of these states; give the task."""

        def task():
            task = self.task()
            assert task.state in states or self.is_alive, f"the service has died: {task}"
            return task

        return eventually(task, f"the task is {states}", until=lambda task: task.state in states, timeout=TIMEOUT)

    def task(self):
        with self.records() as records:
            return records.get(self.bundle_id)

    @contextmanager
    def records(self):
        """The records, from outside."""
        database = open_engine(self.environment.get("THRAVE_DATABASE_URL", self.server.data.database))
        try:
            yield TaskRepository(database, Vault.open_or_create(self.server.data.vault_key))
        finally:
            database.dispose()

    def check_complete(self):
        """A complete task's bundle opens to the disk, and it has sent nothing twice that it need not."""
        assert self._opened() == self.sha256
        manifest = (self.server.data.buckets / BUCKET / manifest_filename(PREFIX)).read_bytes()
        parts = {part.filename for part in read_manifest(manifest).parts}
        (side_file,) = self.objects().keys() - {manifest_filename(PREFIX), *parts}
        assert side_file in {side_filename(PREFIX), bound_side_filename(PREFIX, manifest)}
        assert self.sent_again <= UPLOAD_CONCURRENCY * self.deaths

    def _opened(self):
        image = self.folder / "opened.raw"
        found = opened_sha256(self.server, BUCKET, PREFIX, image)
        image.unlink()
        return found

    def check_nothing_is_left(self):
        """The instance runs as at first; when the service has been stopped, nobody and nothing is left of it."""
        self.await_power()
        self.server.stop()
        self.await_nobody()
        with self.server.instances.hold_stopped(self.instance_id):
            pass
        data = self.server.data
        assert [*data.root.rglob(".new-*")] == []
        assert [*self.temporary.iterdir()] == []

    def await_power(self):
        """Wait until the instance runs, as it did at first."""
        state = partial(self.server.instances.state, self.instance_id)
        eventually(state, "the instance runs again", until=one_of(InstanceState.RUNNING), timeout=TIMEOUT)

    def await_nobody(self):
        """Wait until no process has to do with any of this."""
        eventually(lambda: holders(self.folder), "no process remains", until=lambda found: not found)

    def objects(self):
        """The objects in the bucket, each with what tells one upload from another."""
        folder = self.server.data.buckets / BUCKET
        return {path.name: _identity(path) for path in folder.glob("*")} if folder.exists() else {}

    def await_empty_bucket(self):
        """Wait until the bucket has no object: the cleanup takes longer if an upload has not ended with its task."""
        eventually(self.objects, "the bucket is empty", until=lambda objects: not objects)

    def _instance(self, disk, image_format):
        if image_format != "raw":
            raw, disk = disk, disk.with_suffix(f".{image_format}")
            subprocess.run(["qemu-img", "convert", "-O", image_format, raw, disk], check=True)
        description = InstanceDescription(
            instance_id=new_instance_id(),
            account_id=self.account.account_id,
            platform="windows",
            root_volume=VolumeFile(path=disk, format=image_format),
            **self.machine.commands,
        )
        self.server.instances.add(description)
        return description.instance_id

    def _arm(self, crash_at):
        self.server.environment = {**self.environment, "TMPDIR": str(self.temporary)}
        if crash_at is not None:
            self.server.environment["THRAVE_FAILPOINT"] = crash_at

    def _call(self, name, **parameters):
        with suppress(BotoCoreError):
            return getattr(self.server.client(self.key, config=ONE_TRY), name)(**parameters)["BundleTask"]["BundleId"]
        return None

    def _find_task(self):
        with self.records() as records:
            tasks = records.find(sa.or_(bundle_task.c.bundle_id == self.bundle_id, task_in_progress))
        assert len(tasks) <= 1
        self.bundle_id = tasks[0].bundle_id if tasks else None

    def _look_at_the_dead(self):
        """What is recorded as stored is in the bucket as before, and beyond it no more than was in flight."""
        self.deaths += 1
        self._find_task()
        if self.bundle_id is None:
            return
        with self.records() as records:
            stored = {item.key for item in records.journal(self.bundle_id).objects() if item.size is not None}
        objects = self.objects()
        if self._earlier is not None:
            assert self._opened() in {self._earlier.sha256, self.sha256}
            objects = {key: identity for key, identity in objects.items() if key not in self._earlier.names}
        for key, identity in self._stored.items():
            assert objects.get(key) in {identity, None}, f"{key} was sent again though it was recorded as stored"
        self._stored = {key: objects[key] for key in stored if key in objects and ".part." in key}
        in_flight = objects.keys() - stored
        assert len(in_flight) <= UPLOAD_CONCURRENCY, f"more in flight than {UPLOAD_CONCURRENCY}: {in_flight}"
        self.sent_again += len(in_flight)


class _Earlier(NamedTuple):
    """The bundle that is to be replaced."""

    sha256: str
    names: frozenset[str]


def moments(*steps):
    """The crash points of steps, in their order."""
    return [f"{step}, {when}" for step in steps for when in ("before", "after")]


def killed_at(folder, crash_points, *, replacing=False, **settings):
    """A task that is killed at each of these moments in turn, in its end and checked."""
    scene = KilledService(folder, **settings)
    if replacing:
        scene.replace()
    for moment in crash_points:
        scene.die_at(moment)
    return _completed(scene)


def killed_at_random(folder, draw, times, *, replacing=False, **settings):
    """A task that is killed so many times at moments that `draw`, a random.Random, gives; in its end and checked."""
    scene = KilledService(folder, **settings)
    if replacing:
        scene.replace()
    for _ in range(times):
        if scene.live() and scene.bundle_id is None:
            scene.ask()
        time.sleep(draw.uniform(0.0, 1.0))
        scene.kill()
    return _completed(scene)


def _completed(scene):
    task = scene.come_to_an_end()
    assert task.state is BundleTaskState.COMPLETE, task
    scene.check_complete()
    scene.check_nothing_is_left()
    return scene


def holders(folder):
    """The command lines of processes, but this one, that have a file of a folder open or speak of it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            opened = [str(link.readlink()) for link in (process / "fd").iterdir()]
            if int(process.name) != os.getpid() and any(str(folder) in text for text in [command, *opened]):
                found.append(command)
    return found


def _identity(path):
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
