"""Bundle tasks through the real service: a server process, boto3, files."""

import hashlib
import signal
import sys
from dataclasses import replace

import pytest
from botocore.exceptions import ClientError, WaiterError

from support.bundles.open_check import opened_sha256
from support.disks.qemu_images import converted
from support.disks.raw_disk import make_disk
from support.eventually import eventually
from support.service.bundle_tasks import await_task
from support.service.forked_server import ForkedServer
from thrave.compute.instance import InstanceState, VolumeFile

MIB = 1 << 20


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bundled(server, key, instance_id, prefix="winami"):
    ec2 = server.client(key)
    task = ec2.bundle_instance(InstanceId=instance_id, Storage=server.storage(key, "alices-bucket", prefix))
    return ec2, task["BundleTask"]["BundleId"]


def bucket_files(server, bucket="alices-bucket"):
    folder = server.data.buckets / bucket
    return sorted(path.name for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def test_bundle_opens_to_root_volume(thrave_server, alice, tmp_path):
    account, key = alice
    root = make_disk(tmp_path / "root.raw", 40 * MIB)
    second = make_disk(tmp_path / "second.raw", MIB, seed=9)
    instance = thrave_server.instance(account.account_id, root, volumes=[second])
    ec2, bundle_id = bundled(thrave_server, key, instance.instance_id)
    ec2.get_waiter("bundle_task_complete").wait(BundleIds=[bundle_id], WaiterConfig={"Delay": 1, "MaxAttempts": 60})
    assert opened_sha256(thrave_server, "alices-bucket", "winami", tmp_path / "opened.raw") == sha256(root)
    (task,) = ec2.describe_bundle_tasks(BundleIds=[bundle_id])["BundleTasks"]
    assert (task["State"], task["Progress"], "BundleTaskError" in task) == ("complete", "100%", False)
    assert thrave_server.instances.state(instance.instance_id) is InstanceState.RUNNING


def test_workflow_has_states_of_ec2_in_order(thrave_server, alice, tmp_path):
    account, key = alice
    instance = thrave_server.instance(account.account_id, make_disk(tmp_path / "root.raw", 200 * MIB))
    ec2, bundle_id = bundled(thrave_server, key, instance.instance_id)
    seen = []
    await_task(ec2, bundle_id, "complete", seen=seen)
    order = ["pending", "waiting-for-shutdown", "bundling", "storing", "complete"]
    assert [state for state in order if state in seen] == seen
    assert "bundling" in seen


def test_instance_is_off_and_cannot_start_during_bundling(thrave_server, alice, tmp_path):
    account, key = alice
    instance = thrave_server.instance(account.account_id, make_disk(tmp_path / "root.raw", 200 * MIB))
    ec2, bundle_id = bundled(thrave_server, key, instance.instance_id)
    eventually(lambda: bucket_files(thrave_server), interval=0.005)
    assert thrave_server.instances.state(instance.instance_id) is InstanceState.STOPPED
    with pytest.raises(Exception, match="is locked"):
        thrave_server.instances.start(instance.instance_id)
    await_task(ec2, bundle_id, "complete")
    assert thrave_server.instances.state(instance.instance_id) is InstanceState.RUNNING


def test_workflow_leaves_stopped_instance_stopped(thrave_server, alice, tmp_path):
    account, key = alice
    instance = thrave_server.instance(account.account_id, make_disk(tmp_path / "root.raw", MIB))
    thrave_server.instances.request_stop(instance.instance_id)
    ec2, bundle_id = bundled(thrave_server, key, instance.instance_id)
    await_task(ec2, bundle_id, "complete")
    assert thrave_server.instances.state(instance.instance_id) is InstanceState.STOPPED


def test_second_request_names_task_in_progress(thrave_server, alice, tmp_path):
    account, key = alice
    instance = thrave_server.instance(account.account_id, make_disk(tmp_path / "root.raw", 200 * MIB))
    _, bundle_id = bundled(thrave_server, key, instance.instance_id)
    with pytest.raises(ClientError, match=bundle_id) as refusal:
        bundled(thrave_server, key, instance.instance_id)
    assert refusal.value.response["Error"]["Code"] == "BundlingInProgress"


def test_instance_can_be_bundled_again_immediately(thrave_server, alice, tmp_path):
    account, key = alice
    instance = thrave_server.instance(account.account_id, make_disk(tmp_path / "root.raw", MIB))
    for turn in range(3):
        ec2, bundle_id = bundled(thrave_server, key, instance.instance_id, prefix=f"turn-{turn}")
        await_task(ec2, bundle_id, "complete")
    assert len(ec2.describe_bundle_tasks()["BundleTasks"]) == 3


@pytest.mark.parametrize("state", ["pending", "bundling"])
def test_cancelled_task_restores_instance_and_bucket(thrave_server, alice, tmp_path, state):
    account, key = alice
    instance = thrave_server.instance(account.account_id, make_disk(tmp_path / "root.raw", 400 * MIB))
    ec2, bundle_id = bundled(thrave_server, key, instance.instance_id)
    await_task(ec2, bundle_id, state)
    ec2.cancel_bundle_task(BundleId=bundle_id)
    seen = []
    task = await_task(ec2, bundle_id, seen=seen)
    assert set(seen) <= {"cancelling", "failed"}
    assert task["BundleTaskError"] == {
        "Code": "Client.Cancelled",
        "Message": "User has requested bundling operation cancellation",
    }
    assert thrave_server.instances.state(instance.instance_id) is InstanceState.RUNNING
    # An upload that has not ended before its task is cleaned up later.
    eventually(lambda: bucket_files(thrave_server), "the bucket is empty", until=lambda files: not files)


def test_cancel_rejects_ended_task(thrave_server, alice, tmp_path):
    account, key = alice
    instance = thrave_server.instance(account.account_id, make_disk(tmp_path / "root.raw", MIB))
    ec2, bundle_id = bundled(thrave_server, key, instance.instance_id)
    await_task(ec2, bundle_id, "complete")
    with pytest.raises(ClientError, match="complete") as refusal:
        ec2.cancel_bundle_task(BundleId=bundle_id)
    assert refusal.value.response["Error"]["Code"] == "IncorrectState"


@pytest.mark.parametrize("state", ["pending", "bundling", "storing"])
def test_workflow_resumes_after_kill(tmp_path, state):
    root = make_disk(tmp_path / "root.raw", 300 * MIB)
    with ForkedServer.running(tmp_path / "thrave") as server:
        account, key = server.account("alice")
        instance = server.instance(account.account_id, root)
        ec2, bundle_id = bundled(server, key, instance.instance_id)
        await_task(ec2, bundle_id, state)
        server.stop(signal.SIGKILL)
        server.start()
        ec2 = server.client(key)
        task = await_task(ec2, bundle_id, "complete", "failed")
        assert task["State"] == "complete", task
        assert opened_sha256(server, "alices-bucket", "winami", tmp_path / "opened.raw") == sha256(root)
        assert server.instances.state(instance.instance_id) is InstanceState.RUNNING
        assert not [name for name in bucket_files(server) if not name.startswith("winami.")]


UPLOAD_CONCURRENCY = 4  # the default


def test_stored_parts_are_not_uploaded_again_after_kill(tmp_path):
    root = make_disk(tmp_path / "root.raw", 400 * MIB)
    with ForkedServer.running(tmp_path / "thrave") as server:
        account, key = server.account("alice")
        _, bundle_id = bundled(server, key, server.instance(account.account_id, root).instance_id)
        folder = server.data.buckets / "alices-bucket"
        eventually(lambda: len(list(folder.glob("winami.part.*"))) > 5, interval=0.005)
        server.stop(signal.SIGKILL)
        before = {path.name: path.stat().st_ino for path in folder.glob("winami.part.*")}
        server.start()
        await_task(server.client(key), bundle_id, "complete")
        after = {path.name: path.stat().st_ino for path in folder.glob("winami.part.*")}
        sent_again = [name for name in before if before[name] != after[name]]
        assert len(sent_again) <= UPLOAD_CONCURRENCY  # the parts in flight
        assert opened_sha256(server, "alices-bucket", "winami", tmp_path / "opened.raw") == sha256(root)


def test_disk_that_changed_after_kill_is_sealed_again(tmp_path):
    root = make_disk(tmp_path / "root.raw", 400 * MIB)
    with ForkedServer.running(tmp_path / "thrave") as server:
        account, key = server.account("alice")
        _, bundle_id = bundled(server, key, server.instance(account.account_id, root).instance_id)
        folder = server.data.buckets / "alices-bucket"
        eventually(lambda: len(list(folder.glob("winami.part.*"))) > 3, interval=0.005)
        server.stop(signal.SIGKILL)
        with root.open("r+b") as disk:
            disk.write(b"overwritten part")
        server.start()
        await_task(server.client(key), bundle_id, "complete")
        assert opened_sha256(server, "alices-bucket", "winami", tmp_path / "opened.raw") == sha256(root)


def test_workflow_resumes_after_service_stop(tmp_path):
    with ForkedServer.running(tmp_path / "thrave") as server:
        account, key = server.account("alice")
        instance = server.instance(account.account_id, make_disk(tmp_path / "root.raw", 300 * MIB))
        ec2, bundle_id = bundled(server, key, instance.instance_id)
        await_task(ec2, bundle_id, "bundling")
        server.stop()
        assert server.process.returncode == 0
        server.start()
        await_task(server.client(key), bundle_id, "complete")


def test_guest_that_does_not_power_off_keeps_running(tmp_path):
    with ForkedServer.running(tmp_path / "thrave", shutdown_timeout=1) as server:
        account, key = server.account("alice")
        ignored = (sys.executable, "-c", "")
        state = (sys.executable, "-c", "print('running')")
        root = make_disk(tmp_path / "root.raw", MIB)
        commands = {"stop_command": ignored, "start_command": ignored, "state_command": state}
        instance = server.instance(account.account_id, root, **commands)
        ec2, bundle_id = bundled(server, key, instance.instance_id)
        task = await_task(ec2, bundle_id, "failed")
        assert task["BundleTaskError"]["Code"] == "Server.InstanceNotStopped"
        assert server.instances.state(instance.instance_id) is InstanceState.RUNNING
        assert bucket_files(server) == []


def test_guest_that_powers_off_after_cancellation_is_started(thrave_server, alice, tmp_path):
    account, key = alice
    state, off, on = (tmp_path / name for name in ("state", "off", "on"))
    off.write_text("shut off")
    on.write_text("running")
    state.write_text("running")
    copy = "import shutil, sys, time; time.sleep(float(sys.argv[3])); shutil.copy(sys.argv[1], sys.argv[2])"
    later = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {copy!r}, *sys.argv[1:]])"
    commands = {
        "stop_command": (sys.executable, "-c", later, str(off), str(state), "3"),
        "start_command": (sys.executable, "-c", copy, str(on), str(state), "0"),
        "state_command": (sys.executable, "-c", "import sys; print(open(sys.argv[1]).read())", str(state)),
    }
    instance = thrave_server.instance(account.account_id, make_disk(tmp_path / "root.raw", MIB), **commands)
    ec2, bundle_id = bundled(thrave_server, key, instance.instance_id)
    await_task(ec2, bundle_id, "waiting-for-shutdown")
    ec2.cancel_bundle_task(BundleId=bundle_id)
    await_task(ec2, bundle_id, "failed")
    assert state.read_text() == "running"
    eventually(lambda: state.read_text() == "shut off", interval=0.005)
    eventually(lambda: state.read_text() == "running", interval=0.005)


def test_removed_instance_fails_task_with_reason(thrave_server, alice, tmp_path):
    account, key = alice
    instance = thrave_server.instance(account.account_id, make_disk(tmp_path / "root.raw", MIB))
    ec2, bundle_id = bundled(thrave_server, key, instance.instance_id)
    next(thrave_server.data.instances.glob("i-*.json")).unlink()
    task = await_task(ec2, bundle_id, "failed", "complete")
    assert task["State"] == "complete" or task["BundleTaskError"]["Code"] == "Client.InstanceTerminated"


def test_unreadable_volume_fails_task_and_waiter(thrave_server, alice, tmp_path):
    account, key = alice
    root = make_disk(tmp_path / "root.raw", MIB)
    gone_when_stopped = ("rm", "-f", str(root))
    instance = thrave_server.instance(account.account_id, root, stop_command=gone_when_stopped)
    ec2, bundle_id = bundled(thrave_server, key, instance.instance_id)
    with pytest.raises(WaiterError):
        ec2.get_waiter("bundle_task_complete").wait(BundleIds=[bundle_id], WaiterConfig={"Delay": 1})
    (task,) = ec2.describe_bundle_tasks(BundleIds=[bundle_id])["BundleTasks"]
    assert task["BundleTaskError"]["Code"] == "Server.VolumeError"
    assert thrave_server.instances.state(instance.instance_id) is InstanceState.RUNNING


def ended_as(ec2, bundle_id):
    task = await_task(ec2, bundle_id, "failed", "complete")
    return task["State"], task.get("BundleTaskError", {})


def test_file_in_use_by_another_machine_is_not_read(thrave_server, alice, tmp_path):
    account, key = alice
    root = make_disk(tmp_path / "root.raw", MIB)
    other = thrave_server.instance(account.account_id, root, state=InstanceState.STOPPED)
    file = thrave_server.data.instances / f"{other.instance_id}.json"
    starts_other = ("sed", "-i", "s/stopped/running/", str(file))
    instance = thrave_server.instance(account.account_id, root, stop_command=starts_other)
    ec2, bundle_id = bundled(thrave_server, key, instance.instance_id)
    state, error = ended_as(ec2, bundle_id)
    assert (state, error["Code"]) == ("failed", "Server.VolumeError")
    assert error["Message"] == "root.raw is also a disk of another machine, which is not off"
    assert thrave_server.instances.state(instance.instance_id) is InstanceState.RUNNING


@pytest.mark.parametrize("where", ["before", "meanwhile"])
def test_image_that_is_not_a_whole_disk_is_not_read(thrave_server, alice, tmp_path, where):
    account, key = alice
    root = converted(make_disk(tmp_path / "root.raw", MIB), "qcow2")
    part = tmp_path / "part.qcow2"
    part.write_bytes(root.read_bytes()[:79] + b"\x02" + root.read_bytes()[80:])  # marked as corrupt
    if where == "before":
        part.rename(root)
    command = ("cp", str(part), str(root))
    volume = VolumeFile(path=root, format="qcow2")
    raw = thrave_server.instance(account.account_id, root, stop_command=command)
    thrave_server.instances.remove(raw.instance_id)
    instance = replace(raw, root_volume=volume)
    thrave_server.instances.add(instance)
    if where == "before":
        with pytest.raises(
            ClientError, match=r"IncorrectInstanceState.*root\.qcow2: it is marked as corrupt"
        ) as refused:
            bundled(thrave_server, key, instance.instance_id)
        assert str(tmp_path) not in str(refused.value)
        return
    ec2, bundle_id = bundled(thrave_server, key, instance.instance_id)
    state, error = ended_as(ec2, bundle_id)
    assert (state, error["Code"]) == ("failed", "Server.VolumeError")
    assert "root.qcow2: it is marked as corrupt" in error["Message"]
    assert str(tmp_path) not in error["Message"]
