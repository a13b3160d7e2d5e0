"""Power changes of an instance by other clients during its bundle task, through the real service."""

import json
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest
from botocore.exceptions import ClientError

from support.disks.raw_disk import make_disk
from support.eventually import eventually
from support.service.bundle_tasks import await_task
from support.service.forked_server import ForkedServer
from thrave.compute.instance import InstanceState

MIB = 1 << 20


def bundle(server, key, instance_id):
    ec2 = server.client(key)
    storage = server.storage(key, "alices-bucket", "winami")
    return ec2, ec2.bundle_instance(InstanceId=instance_id, Storage=storage)["BundleTask"]["BundleId"]


def stored(server):
    return [path.name for path in (server.data.buckets / "alices-bucket").rglob("*") if path.is_file()]


@contextmanager
def paused_while_it_reads(server, volume):
    """Stop the service process after its first part: otherwise it may have read the rest before the change."""
    eventually(lambda: stored(server), "a part is stored")
    process = psutil.Process(server.process.pid)
    process.suspend()
    try:
        assert str(volume) in {file.path for file in process.open_files()}, "the volume has been read"
        yield
    finally:
        process.resume()


def test_termination_during_reading_fails_task(thrave_server, alice, tmp_path):
    account, key = alice
    instance = thrave_server.instance(account.account_id, make_disk(tmp_path / "root.raw", 400 * MIB))
    ec2, bundle_id = bundle(thrave_server, key, instance.instance_id)
    await_task(ec2, bundle_id, "bundling")
    ec2.terminate_instances(InstanceIds=[instance.instance_id])
    task = await_task(ec2, bundle_id, "failed", "complete")
    assert task["BundleTaskError"] == {
        "Code": "Client.InstanceTerminated",
        "Message": "The instance was terminated while it was being bundled.",
    }
    assert thrave_server.instances.state(instance.instance_id) is InstanceState.TERMINATED
    assert stored(thrave_server) == []


def test_start_during_reading_fails_task(thrave_server, alice, tmp_path):
    account, key = alice
    instance = thrave_server.instance(account.account_id, make_disk(tmp_path / "root.raw", 1600 * MIB))
    ec2, bundle_id = bundle(thrave_server, key, instance.instance_id)
    with paused_while_it_reads(thrave_server, instance.root_volume.path):
        file = thrave_server.data.instances / f"{instance.instance_id}.json"
        changed = file.with_suffix(".new")  # a partial description would be invalid
        changed.write_text(file.read_text().replace('"stopped"', '"running"'))
        changed.replace(file)
    task = await_task(ec2, bundle_id, "failed", "complete")
    assert task["BundleTaskError"]["Code"] == "Server.VolumeError"
    assert "is running while its root volume is read" in task["BundleTaskError"]["Message"]
    assert stored(thrave_server) == []


def test_instance_without_overlay_is_off_during_reading(tmp_path):
    with ForkedServer.running(tmp_path / "overlay", capture_mode="overlay") as server:
        account, key = server.account("alice")
        instance = server.instance(account.account_id, make_disk(tmp_path / "root.raw", MIB))
        ec2, bundle_id = bundle(server, key, instance.instance_id)
        assert await_task(ec2, bundle_id, "failed", "complete")["State"] == "complete"
        seen = subprocess.run(
            [sys.executable, "-m", "thrave", "task", "show", bundle_id, "-d", server.data.root, "--output", "json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        notice = "The instance is off until its root volume has been read: its hypervisor has no overlays."
        assert json.loads(seen.stdout)["warning"].startswith(notice)  # the content of the disk does not matter here


def test_termination_during_shutdown_fails_task(thrave_server, alice, tmp_path):
    account, key = alice
    gate = tmp_path / "gate"
    code = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    commands = {"stop_command": (sys.executable, "-c", code), "start_command": ("true",)}
    root = make_disk(tmp_path / "root.raw", MIB)
    instance = thrave_server.instance(account.account_id, root, **commands)
    ec2, bundle_id = bundle(thrave_server, key, instance.instance_id)
    await_task(ec2, bundle_id, "waiting-for-shutdown")
    (change,) = ec2.terminate_instances(InstanceIds=[instance.instance_id])["TerminatingInstances"]
    assert change["CurrentState"]["Name"] == "shutting-down"
    assert await_task(ec2, bundle_id, "failed")["BundleTaskError"]["Code"] == "Client.InstanceTerminated"
    gate.touch()
    ec2.get_waiter("instance_terminated").wait(InstanceIds=[instance.instance_id], WaiterConfig={"Delay": 1})


def test_start_and_reboot_are_refused_during_bundling(thrave_server, alice, tmp_path):
    account, key = alice
    instance = thrave_server.instance(account.account_id, make_disk(tmp_path / "root.raw", 400 * MIB))
    ids = [instance.instance_id]
    ec2, bundle_id = bundle(thrave_server, key, instance.instance_id)
    await_task(ec2, bundle_id, "bundling")
    for ask in (ec2.start_instances, ec2.reboot_instances):
        with pytest.raises(ClientError, match=f"it is being bundled by {bundle_id}") as refusal:
            ask(InstanceIds=ids)
        assert refusal.value.response["Error"]["Code"] == "IncorrectInstanceState"
    ec2.stop_instances(InstanceIds=ids)
    assert await_task(ec2, bundle_id, "failed", "complete")["State"] == "complete"
    assert thrave_server.instances.state(instance.instance_id) is InstanceState.STOPPED  # the last request
    ec2.start_instances(InstanceIds=ids)
    ec2.get_waiter("instance_running").wait(InstanceIds=ids, WaiterConfig={"Delay": 1})
