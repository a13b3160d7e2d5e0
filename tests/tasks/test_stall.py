"""A disk that stops responding during bundling, through the real service: qemu-nbd is stopped."""

from contextlib import suppress

import psutil

from support.disks.qemu_images import converted
from support.disks.raw_disk import make_disk
from support.eventually import eventually
from support.service.bundle_tasks import await_task
from support.service.forked_server import ForkedServer
from thrave.compute.description_files import InstanceDescription
from thrave.compute.directory_driver import new_instance_id
from thrave.compute.instance import InstanceState, VolumeFile

MIB = 1 << 20


def test_unresponsive_disk_fails_task_and_instance_runs_again(tmp_path):
    image = converted(make_disk(tmp_path / "root.raw", 400 * MIB), "qcow2")
    with ForkedServer.running(tmp_path / "thrave", stall_timeout=10) as server:
        account, key = server.account("alice")
        instance = InstanceDescription(
            instance_id=new_instance_id(),
            account_id=account.account_id,
            platform="windows",
            root_volume=VolumeFile(path=image, format="qcow2"),
        )
        server.instances.add(instance)
        ec2, bucket = server.client(key), server.data.buckets / "disks"
        storage = server.storage(key, "disks", "winami")
        bundle_id = ec2.bundle_instance(InstanceId=instance.instance_id, Storage=storage)["BundleTask"]["BundleId"]

        def disk_servers():
            children = psutil.Process(server.process.pid).children(recursive=True)
            return [child for child in children if child.name() == "qemu-nbd"]

        eventually(lambda: [*bucket.glob("winami.part.*")])
        (disk,) = disk_servers()
        disk.suspend()
        task = await_task(ec2, bundle_id)
        assert task["BundleTaskError"]["Code"] == "Server.NoProgress"
        assert server.instances.state(instance.instance_id) is InstanceState.RUNNING
        eventually(lambda: [*bucket.rglob("*")], "the bucket is empty", until=lambda found: not found)
        with suppress(psutil.NoSuchProcess):  # it was killed because it did not end
            disk.resume()
        eventually(lambda: not disk_servers())
