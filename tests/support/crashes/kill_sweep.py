"""A service that is killed while it bundles an instance, and the conditions that must hold after each kill.

The instance has power commands, so each power change starts processes. The conditions are checked from outside of the
service: in files, in the database, in /proc.
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
TIMEOUT = 60.0  # seconds for each wait
ONE_TRY = Config(retries={"total_max_attempts": 1}, connect_timeout=10, read_timeout=30)
MIB = 1 << 20


# The failpoints of a task without errors, in their order.
NEW_BUNDLE_FAILPOINTS = [
    "task-recorded", "power-state-recorded", "shutdown-requested", "shutdown-recorded", "volume-size-recorded",
    "bundle-key-recorded", "part-claimed", "part-stored", "part-recorded", "documents-recorded", "instance-started",
    "side-file-stored", "earlier-bundle-recorded", "manifest-stored", "task-ended",
]  # fmt: skip
# The failpoints of a task that replaces a bundle, where that differs in the bucket.
REPLACEMENT_FAILPOINTS = [
    "bundle-key-recorded", "part-claimed", "part-stored", "part-recorded", "documents-recorded", "side-file-stored",
    "earlier-bundle-recorded", "manifest-stored", "earlier-bundle-deleted", "task-ended",
]  # fmt: skip


_running = []  # services of the current test


def kill_remaining_services():
    """Kill the services that a failed test did not stop, so that the next test does not meet them."""
    while _running:
        server = _running.pop().server
        if server.process is not None and not server.process.stdout.closed:
            server.stop(signal.SIGKILL)


class KilledService:
    """A service with one instance (a disk of five parts) and one task. Tests kill it and start it again.

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
        self._set_failpoint(None)
        self.account, self.key = self.server.account("alice")
        disk = folder / "root.raw"
        disk.write_bytes(random.Random(1).randbytes(size))
        self.sha256 = hashlib.sha256(disk.read_bytes()).hexdigest()
        self.machine = Machine(folder)
        self.instance_id = self._instance(disk, image_format)
        self.bundle_id = None
        self.kills = 0
        self.resent_parts = 0
        self._stored = {}
        self._earlier = None
        self._disk = disk

    def prepare_replacement(self):
        """Store a bundle of another disk for the next task to replace. After each kill one of the two must open."""
        self.environment["THRAVE_EXISTING_BUNDLE"] = "replace"
        assert self.run_to_end().state is BundleTaskState.COMPLETE
        self.wait_for_power()
        self.server.stop()
        self._earlier = _Earlier(self.sha256, frozenset(self.objects()))
        changed = random.Random(2).randbytes(self._disk.stat().st_size)
        self._disk.write_bytes(changed)
        self.sha256, self.bundle_id, self._stored = hashlib.sha256(changed).hexdigest(), None, {}

    def check_earlier_bundle(self):
        """Check that the bucket has the earlier bundle unchanged, and nothing else."""
        assert self._opened() == self._earlier.sha256
        assert self.objects().keys() == self._earlier.names

    def start(self, failpoint=None):
        """Start the service; return whether it runs. With a failpoint it may be killed before it responds."""
        self._set_failpoint(failpoint)
        with suppress(ServerError):
            self.server.start()
        return self.is_alive

    @property
    def is_alive(self):
        return self.server.process is not None and self.server.process.poll() is None

    def kill(self):
        """Kill the service with SIGKILL."""
        self.server.stop(signal.SIGKILL)
        self._check_after_kill()

    def run_until_killed(self, failpoint):
        """Start the service, and the task if there is none; wait until the process kills itself at the failpoint."""
        if self.start(failpoint) and self.bundle_id is None:
            self.bundle()
        self.wait_for_kill(failpoint)

    def wait_for_kill(self, failpoint):
        """Wait until the service has killed itself, and check the state that it leaves."""
        eventually(lambda: not self.is_alive, f"the service kills itself at: {failpoint}", timeout=TIMEOUT)
        self.server.stop()
        assert self.server.process.returncode == -signal.SIGKILL
        self._check_after_kill()

    def bundle(self):
        """Call BundleInstance; there may be no response."""
        storage = self.server.storage(self.key, BUCKET, PREFIX)
        self.bundle_id = self._call("bundle_instance", InstanceId=self.instance_id, Storage=storage)

    def cancel(self):
        """Call CancelBundleTask; there may be no response."""
        self._call("cancel_bundle_task", BundleId=self.bundle_id)

    def cancel_while_stopped(self):
        """Cancel the task in the database while the service is stopped."""
        with self.records() as records:
            assert records.cancel(self.bundle_id)

    def run_to_end(self):
        """Run the service until the task has ended; return the task."""
        assert self.is_alive or self.start()
        if self.bundle_id is None:
            self.bundle()
        return self.wait_for_state(*FINISHED)

    def wait_for_state(self, *states):
        """Wait until the task is in one of these states; return the task."""

        def task():
            task = self.task()
            assert task.state in states or self.is_alive, f"the service has ended: {task}"
            return task

        return eventually(task, f"the task is {states}", until=lambda task: task.state in states, timeout=TIMEOUT)

    def task(self):
        with self.records() as records:
            return records.get(self.bundle_id)

    @contextmanager
    def records(self):
        """Open the task repository from outside of the service."""
        database = open_engine(self.environment.get("THRAVE_DATABASE_URL", self.server.data.database))
        try:
            yield TaskRepository(database, Vault.open_or_create(self.server.data.vault_key))
        finally:
            database.dispose()

    def check_complete(self):
        """Check that the bundle opens to the disk, and that a kill repeats `UPLOAD_CONCURRENCY` uploads at most."""
        assert self._opened() == self.sha256
        manifest = (self.server.data.buckets / BUCKET / manifest_filename(PREFIX)).read_bytes()
        parts = {part.filename for part in read_manifest(manifest).parts}
        (side_file,) = self.objects().keys() - {manifest_filename(PREFIX), *parts}
        assert side_file in {side_filename(PREFIX), bound_side_filename(PREFIX, manifest)}
        assert self.resent_parts <= UPLOAD_CONCURRENCY * self.kills

    def _opened(self):
        image = self.folder / "opened.raw"
        found = opened_sha256(self.server, BUCKET, PREFIX, image)
        image.unlink()
        return found

    def check_no_traces(self):
        """Check that the instance runs, and stop the service: no process, lock or temporary file may remain."""
        self.wait_for_power()
        self.server.stop()
        self.wait_for_no_process()
        with self.server.instances.hold_stopped(self.instance_id):
            pass
        data = self.server.data
        assert [*data.root.rglob(".new-*")] == []
        assert [*self.temporary.iterdir()] == []

    def wait_for_power(self):
        """Wait until the instance runs, as before the task."""
        state = partial(self.server.instances.state, self.instance_id)
        eventually(state, "the instance runs again", until=one_of(InstanceState.RUNNING), timeout=TIMEOUT)

    def wait_for_no_process(self):
        """Wait until no other process uses a file of this test."""
        eventually(lambda: find_processes(self.folder), "no process remains", until=lambda found: not found)

    def objects(self):
        """Return the objects in the bucket by name, each with a value that differs for each upload."""
        folder = self.server.data.buckets / BUCKET
        return {path.name: _identity(path) for path in folder.glob("*")} if folder.exists() else {}

    def wait_for_empty_bucket(self):
        """Wait until the bucket is empty: cleanup takes longer if an upload has not ended with its task."""
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

    def _set_failpoint(self, failpoint):
        self.server.environment = {**self.environment, "TMPDIR": str(self.temporary)}
        if failpoint is not None:
            self.server.environment["THRAVE_FAILPOINT"] = failpoint

    def _call(self, name, **parameters):
        with suppress(BotoCoreError):
            return getattr(self.server.client(self.key, config=ONE_TRY), name)(**parameters)["BundleTask"]["BundleId"]
        return None

    def _find_task(self):
        with self.records() as records:
            tasks = records.find(sa.or_(bundle_task.c.bundle_id == self.bundle_id, task_in_progress))
        assert len(tasks) <= 1
        self.bundle_id = tasks[0].bundle_id if tasks else None

    def _check_after_kill(self):
        """Check that recorded objects are in the bucket, unchanged, and that unrecorded ones were in flight."""
        self.kills += 1
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
            assert objects.get(key) in {identity, None}, f"{key} was uploaded again although it was recorded as stored"
        self._stored = {key: objects[key] for key in stored if key in objects and ".part." in key}
        in_flight = objects.keys() - stored
        assert len(in_flight) <= UPLOAD_CONCURRENCY, f"more uploads in flight than {UPLOAD_CONCURRENCY}: {in_flight}"
        self.resent_parts += len(in_flight)


class _Earlier(NamedTuple):
    """The bundle that the task replaces."""

    sha256: str
    names: frozenset[str]


def failpoints_of(*names):
    """Return the settings for the failpoints before and after each of these names, in their order."""
    return [f"{name}, {when}" for name in names for when in ("before", "after")]


def run_with_kills(folder, failpoints, *, replacing=False, **settings):
    """Run a task to its end, killed at each of these failpoints in turn, and check the result."""
    scene = KilledService(folder, **settings)
    if replacing:
        scene.prepare_replacement()
    for failpoint in failpoints:
        scene.run_until_killed(failpoint)
    return _completed(scene)


def run_with_random_kills(folder, draw, times, *, replacing=False, **settings):
    """Run a task to its end, killed `times` times at moments from `draw` (random.Random), and check the result."""
    scene = KilledService(folder, **settings)
    if replacing:
        scene.prepare_replacement()
    for _ in range(times):
        if scene.start() and scene.bundle_id is None:
            scene.bundle()
        time.sleep(draw.uniform(0.0, 1.0))
        scene.kill()
    return _completed(scene)


def _completed(scene):
    task = scene.run_to_end()
    assert task.state is BundleTaskState.COMPLETE, task
    scene.check_complete()
    scene.check_no_traces()
    return scene


def find_processes(folder):
    """Return the command lines of other processes that have a file of the folder open or name it as an argument."""
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
