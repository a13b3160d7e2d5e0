"""The setting `skip_unused`, through the real service."""

import pytest
from botocore.exceptions import WaiterError

from support.bundles.open_check import opened_sha256
from support.disks.ntfs_disk import Damage
from support.disks.raw_disk import make_disk
from support.service.forked_server import ForkedServer
from thrave.compute.instance import InstanceState
from thrave.demo.disk import make_demo_disk


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ForkedServer.running(tmp_path_factory.mktemp("service"), skip_unused=True) as server:
        yield server


@pytest.fixture(scope="module")
def alice(server):
    return server.account("alice")


def finished(server, alice, root, prefix):
    """Bundle a disk, wait for the end of the task, and return the task."""
    account, key = alice
    instance = server.instance(account.account_id, root)
    ec2 = server.client(key)
    task = ec2.bundle_instance(InstanceId=instance.instance_id, Storage=server.storage(key, "disks", prefix))
    ids = [task["BundleTask"]["BundleId"]]
    try:
        ec2.get_waiter("bundle_task_complete").wait(BundleIds=ids, WaiterConfig={"Delay": 1, "MaxAttempts": 60})
    finally:
        assert server.instances.state(instance.instance_id) is InstanceState.RUNNING
    return ec2.describe_bundle_tasks(BundleIds=ids)["BundleTasks"][0]


def test_bundle_has_no_deleted_files(server, alice, tmp_path):
    demo = make_demo_disk(tmp_path / "root.raw", 64 << 20)
    task = finished(server, alice, demo.path, "clean")
    assert (task["State"], task["Progress"]) == ("complete", "100%")
    opened_sha256(server, "disks", "clean", tmp_path / "opened.raw")
    deleted = [file for file in demo.files if file.deleted and file.kind == "random"]
    before, after = demo.path.read_bytes(), (tmp_path / "opened.raw").read_bytes()
    leaked = [content for file in deleted if (content := next(demo.content(file))[:2000]) in before]
    assert leaked
    assert [content for content in leaked if content in after] == []
    assert before[: 1 << 20] == after[: 1 << 20]


def dirty(path):
    damage = Damage.to(make_demo_disk(path, 64 << 20).path)
    damage.set_flags(1)
    path.write_bytes(damage.disk[:])
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda path: make_disk(path, 1 << 20), "there is no NTFS volume"), (dirty, "it is marked as dirty")],
)
def test_unknown_unused_space_fails_task_with_reason(server, alice, tmp_path, make, words):
    path = make(tmp_path / "root.raw")
    with pytest.raises(WaiterError) as waiting:
        finished(server, alice, path, "refused")
    (task,) = waiting.value.last_response["BundleTasks"]
    assert task["BundleTaskError"]["Code"] == "Server.VolumeError"
    assert f"{path.name}: cannot leave out what is unused: " in task["BundleTaskError"]["Message"]
    assert words in task["BundleTaskError"]["Message"]
