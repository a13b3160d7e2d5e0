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


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """A service that has completed a bundle, and a copy of its data with the database of the moment before."""
    folder = tmp_path_factory.mktemp("restored")
    gate, begun = folder / "gate", folder / "begun"
    with ForkedServer.running(folder / "thrave") as server:
        account, key = server.account("alice")
        disk = make_disk(folder / "disk.raw", 28 * MIB, holes=False)
        shutil.copy(disk, folder / "disk.copy")
        instance = server.instance(
            account.account_id, disk, stop_command=("true",), start_command=command_that_waits(gate, begun)
        )
        ec2 = server.client(key)
        storage = server.storage(key, "golden", "win")
        bundle_id = ec2.bundle_instance(InstanceId=instance.instance_id, Storage=storage)["BundleTask"]["BundleId"]
        eventually(begun.exists, "every part is stored, and the instance is being started")
        with sqlite3.connect(server.data.database_file) as old, sqlite3.connect(folder / "thrave.db") as backup:
            old.backup(backup)
        gate.touch()
        assert await_task(ec2, bundle_id)["State"] == "complete"
        server.stop()
        shutil.copytree(server.data.root, folder / "backup", ignore=shutil.ignore_patterns("thrave.db*"))
        shutil.copy(folder / "thrave.db", folder / "backup")
        return server, key, bundle_id, disk


@pytest.fixture
def restored(completed):
    """The service, stopped, with its complete bundle and the older database."""
    server, _, _, disk = completed
    shutil.copy(disk.with_suffix(".copy"), disk)
    shutil.rmtree(server.data.root)
    shutil.copytree(server.data.root.parent / "backup", server.data.root)
    yield completed
    server.stop()


def objects(server):
    """Files of the bucket with their content."""
    bucket = server.data.buckets / "golden"
    return {path.name: path.read_bytes() for path in bucket.rglob("*") if path.is_file()}


def change(disk, position):
    with disk.open("r+b") as file:
        file.seek(position)
        file.write(b"changed at " + str(position).encode())


def test_cancelled_task_of_restored_database_keeps_complete_bundle(restored):
    server, key, bundle_id, _ = restored
    before = objects(server)
    assert {"win.manifest.xml", "win.part.1"} <= before.keys()
    subprocess.run(
        [sys.executable, "-m", "thrave", "task", "cancel", bundle_id, "--data-dir", server.data.root], check=True
    )
    server.start()
    assert await_task(server.client(key), bundle_id)["State"] == "failed"
    assert objects(server) == before


def test_resumed_task_of_restored_database_keeps_complete_bundle(restored):
    server, key, bundle_id, disk = restored
    before = objects(server)
    change(disk, 0)
    server.start()
    assert await_task(server.client(key), bundle_id)["State"] == "complete"
    assert objects(server).items() >= before.items()  # a second side file may be added


def test_task_of_restored_database_that_resumes_sealing_overwrites_no_part(restored):
    """The database is of the moment after the first part. The disk has changed since, in the last part."""
    server, key, bundle_id, disk = restored
    before = objects(server)
    with sqlite3.connect(server.data.database_file) as database:
        database.execute(
            "UPDATE bundle_task SET next_step = 'seal', state = 'bundling', documents = NULL, checkpoint = NULL"
        )
        database.execute("DELETE FROM bundle_part WHERE key <> 'win.part.0'")
    change(disk, 27 * MIB)
    server.start()
    assert await_task(server.client(key), bundle_id)["BundleTaskError"]["Code"] == "Client.PrefixInUse"
    assert objects(server) == before
