"""Guests that ignore shutdown requests, and instances that do not start again, through the real service."""

import re
import signal
import sys
import time

import pytest

from support.disks.raw_disk import make_disk
from support.eventually import eventually
from support.service.bundle_tasks import await_task
from support.service.forked_server import ForkedServer
from thrave.compute.instance import InstanceState
from thrave.database import open_engine
from thrave.tasks.repository import TaskRepository
from thrave.vault import Vault

MIB = 1 << 20
IGNORED = ("true",)


def begin(server, tmp_path, **commands):
    """Start a task on an instance with these commands; return client, instance id and bundle id."""
    account, key = server.account("alice")
    instance = server.instance(account.account_id, make_disk(tmp_path / "root.raw", MIB), **commands)
    ec2 = server.client(key)
    task = ec2.bundle_instance(InstanceId=instance.instance_id, Storage=server.storage(key, "bucket", "winami"))
    return key, instance.instance_id, task["BundleTask"]["BundleId"]


def notice(server, bundle_id):
    database = open_engine(server.data.database)
    try:
        return TaskRepository(database, Vault.open_or_create(server.data.vault_key)).get(bundle_id).warning
    finally:
        database.dispose()


def test_power_off_action_cuts_power_with_warning(tmp_path, machine):
    commands = {**machine.commands, "stop_command": IGNORED}
    with ForkedServer.running(tmp_path / "data", shutdown_timeout=1, shutdown_timeout_action="power-off") as server:
        key, instance_id, bundle_id = begin(server, tmp_path, **commands)
        assert await_task(server.client(key), bundle_id, "failed", "complete")["State"] == "complete"
        assert server.instances.state(instance_id) is InstanceState.RUNNING
        assert notice(server, bundle_id).startswith(
            "The guest did not power off within 1 seconds: its power was cut, and what it had not written is lost."
        )


@pytest.mark.parametrize(
    ("force", "words"),
    [
        (None, "its power cannot be cut: i-.* has no forceStopCommand"),
        (("ls", "/nowhere"), "its power cannot be cut: .*ended with 2"),
        (IGNORED, "still runs although its power was cut"),
    ],
)
def test_failed_power_cut_fails_task_with_reason(tmp_path, machine, force, words):
    commands = {**machine.commands, "stop_command": IGNORED, "force_stop_command": force}
    with ForkedServer.running(tmp_path / "data", shutdown_timeout=1, shutdown_timeout_action="power-off") as server:
        key, instance_id, bundle_id = begin(server, tmp_path, **commands)
        error = await_task(server.client(key), bundle_id, "failed", "complete")["BundleTaskError"]
        assert error["Code"] == "Server.InstanceNotStopped"
        assert re.search(words, error["Message"])
        assert server.instances.state(instance_id) is InstanceState.RUNNING


def test_guest_that_powers_off_while_service_is_down_is_started(tmp_path, machine):
    commands = {**machine.commands, "stop_command": IGNORED}
    with ForkedServer.running(tmp_path / "data", shutdown_timeout=1) as server:
        key, instance_id, bundle_id = begin(server, tmp_path, **commands)
        await_task(server.client(key), bundle_id, "failed")
        server.stop(signal.SIGKILL)
        machine.set_state("shut off")
        time.sleep(1.5)  # longer than twice `shutdown_timeout`: power recovery would have ended
        server.start()
        eventually(lambda: server.instances.state(instance_id) is InstanceState.RUNNING)


def test_failed_start_is_retried(tmp_path, machine):
    gate = tmp_path / "gate"
    start = (sys.executable, "-c", "import os, subprocess, sys; os.stat(sys.argv[1]); subprocess.run(sys.argv[2:])")
    commands = {**machine.commands, "start_command": (*start, str(gate), *machine.commands["start_command"])}
    with ForkedServer.running(tmp_path / "data") as server:
        key, instance_id, bundle_id = begin(server, tmp_path, **commands)
        await_task(server.client(key), bundle_id, "complete")  # the failed start does not fail the task
        assert server.instances.state(instance_id) is InstanceState.STOPPED
        server.stop(signal.SIGKILL)
        gate.touch()
        server.start()
        eventually(lambda: server.instances.state(instance_id) is InstanceState.RUNNING)
