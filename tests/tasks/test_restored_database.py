"""A service whose database was restored from a backup that is older than its bucket."""

import shutil
import sqlite3
import subprocess
import sys

import pytest

from support.disks.raw_disk import make_disk
from support.eventually import eventually
from support.instances.command_machine import command_that_waits
from support.service.bundle_tasks import await_task
from support.service.forked_server import ForkedServer

MIB = 1 << 20


@pytest.fixture
def restored(tmp_path):
    """A stopped service with a complete bundle, and a database in which its task has only stored all parts."""
    gate, begun = tmp_path / "gate", tmp_path / "begun"
    with ForkedServer.running(tmp_path / "thrave") as server:
        account, key = server.account("alice")
        disk = make_disk(tmp_path / "disk.raw", 25 * MIB)
        instance = server.instance(
            account.account_id, disk, stop_command=("true",), start_command=command_that_waits(gate, begun)
        )
        ec2 = server.client(key)
        storage = server.storage(key, "golden", "win")
        bundle_id = ec2.bundle_instance(InstanceId=instance.instance_id, Storage=storage)["BundleTask"]["BundleId"]
        eventually(begun.exists, "the instance is being started")
        with sqlite3.connect(server.data.database_file) as old, sqlite3.connect(tmp_path / "backup.db") as backup:
            old.backup(backup)
        gate.touch()
        assert await_task(ec2, bundle_id)["State"] == "complete"
        server.stop()
        for name in ("thrave.db", "thrave.db-wal", "thrave.db-shm"):
            (server.data.root / name).unlink(missing_ok=True)
        shutil.copy(tmp_path / "backup.db", server.data.database_file)
        yield server, key, bundle_id, disk


def objects(server):
    """Files of the bucket with their content."""
    bucket = server.data.buckets / "golden"
    return {path.name: path.read_bytes() for path in bucket.rglob("*") if path.is_file()}


def test_cancelled_task_of_restored_database_keeps_complete_bundle(restored):
    server, key, bundle_id, _ = restored
    before = objects(server)
    assert "win.manifest.xml" in before
    subprocess.run(
        [sys.executable, "-m", "thrave", "task", "cancel", bundle_id, "--data-dir", server.data.root], check=True
    )
    server.start()
    assert await_task(server.client(key), bundle_id)["State"] == "failed"
    assert objects(server) == before


def test_resumed_task_of_restored_database_keeps_complete_bundle(restored):
    server, key, bundle_id, disk = restored
    before = objects(server)
    with disk.open("r+b") as file:
        file.write(b"changed since")
    server.start()
    assert await_task(server.client(key), bundle_id)["State"] == "complete"
    assert objects(server).items() >= before.items()  # a second side file may be added
