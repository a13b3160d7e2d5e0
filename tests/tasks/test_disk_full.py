"""A data directory on a full disk: a small tmpfs, which needs permission to mount."""

import shutil
import subprocess
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from support.crashes.kill_sweep import MIB, KilledService
from support.disks.raw_disk import make_disk
from thrave.buckets.directory_store import MIN_FREE
from thrave.compute.description_files import InstanceDescription
from thrave.compute.directory_driver import DirectoryDriver
from thrave.compute.instance import InstanceState, VolumeFile
from thrave.tasks.instance_power import InstancePower
from thrave.tasks.models import BundleTaskState, Step

PART = 10 * MIB
KIB = 1 << 10
PASSES = 10


@pytest.fixture
def small_disk(tmp_path):
    """Yield the folder of a file system of 40 MiB, and a function that resizes it."""
    folder = tmp_path / "small"
    folder.mkdir()

    def resize(options, size):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", f"{options}size={size}", "tmpfs", folder], check=False)

    if resize("", 40 * MIB).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder, lambda size: resize("remount,", size)
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_task_on_full_disk_fails_and_frees_its_space(small_disk, tmp_path):
    folder, resize = small_disk
    scene = KilledService(tmp_path, data=folder / "thrave")
    free = None
    for _ in range(PASSES):
        task = scene.run_to_end()
        assert (task.state, task.error_code) == (BundleTaskState.FAILED, "Server.S3Error")
        assert task.error_message.startswith("InternalError(500)- ")
        scene.wait_for_empty_bucket()
        scene.wait_for_power()
        before, free = free, shutil.disk_usage(folder).free
        assert before is None or free > before - MIB
        scene.bundle_id = None
    resize(128 * MIB)
    assert scene.run_to_end().state is BundleTaskState.COMPLETE
    scene.check_complete()
    scene.check_no_traces()


@pytest.mark.sweep
@pytest.mark.parametrize("reserve", [0, MIN_FREE])
def test_parts_leave_space_for_undo(small_disk, tmp_path, reserve):
    """Two of five parts fit, and some KiB more: each task makes the write-ahead log of the database 440 KiB longer."""
    folder, resize = small_disk
    resize(128 * MIB)
    scene = KilledService(tmp_path, data=folder / "thrave")
    assert scene.start()
    for remaining in range(256 * KIB, 513 * KIB, 40 * KIB):
        filler = shutil.disk_usage(folder).free - reserve - 2 * PART - remaining
        (folder / "filler").write_bytes(bytes(filler))
        assert scene.run_to_end().state is BundleTaskState.FAILED
        scene.wait_for_empty_bucket()
        scene.wait_for_power()
        scene.bundle_id = None
        (folder / "filler").unlink()
    scene.server.stop()


def test_task_resumes_when_database_can_write_again(small_disk, tmp_path):
    folder, resize = small_disk
    scene = KilledService(tmp_path, data=folder / "thrave")
    resize(128 * MIB)
    scene.machine.ignore_power_button()
    assert scene.start()
    scene.bundle()
    scene.wait_for_state("waiting-for-shutdown")
    with (folder / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while filler.write(bytes(MIB)):
            pass
    scene.machine.obey_power_button()
    time.sleep(3)
    assert scene.is_alive
    assert scene.task().state == "waiting-for-shutdown"
    (folder / "filler").unlink()
    assert scene.run_to_end().state is BundleTaskState.COMPLETE
    scene.check_complete()
    scene.check_no_traces()


def test_restore_without_record_starts_instance_on_full_disk(small_disk, tmp_path):
    folder, _ = small_disk
    machine = tmp_path / "on"
    instances = DirectoryDriver(folder / "instances")
    description = InstanceDescription(
        instance_id="i-0123456789abcdef0",
        account_id="123456789012",
        root_volume=VolumeFile(path=make_disk(tmp_path / "root.raw", MIB)),
        stop_command=("rm", "-f", str(machine)),
        start_command=("touch", str(machine)),
        state_command=("sh", "-c", f"[ -e {machine} ] && echo running || echo stopped"),
    )
    instances.add(description)
    instances.start(description.instance_id)
    task = SimpleNamespace(
        bundle_id="bun-0",
        instance_id=description.instance_id,
        run_after_task=True,
        power_recovery_until=None,
        next_step=Step.SEAL,
    )
    power = InstancePower(
        instances, None, task, shutdown_timeout=1, shutdown_timeout_action="fail"
    )  # no repository: the database is not used
    assert not power.restore_without_record(), "the instance runs"
    machine.unlink()
    with (folder / "filler").open("wb", buffering=0) as filler:
        for size in (MIB, 4096, 512):
            with suppress(OSError):
                while filler.write(bytes(size)):
                    pass
    with instances.hold_stopped(description.instance_id):
        assert not power.restore_without_record(), "the volume is being read"
        assert not machine.exists()
    assert power.restore_without_record()
    assert machine.exists()


def test_restore_without_record_leaves_stopped_instance(instances_off):
    instances, task = instances_off
    assert not InstancePower(
        instances, None, task, shutdown_timeout=1, shutdown_timeout_action="fail"
    ).restore_without_record()
    assert instances.state(task.instance_id) is InstanceState.STOPPED


@pytest.fixture
def instances_off(tmp_path):
    instances = DirectoryDriver(tmp_path / "instances")
    root = VolumeFile(path=make_disk(tmp_path / "root.raw", MIB))
    described = InstanceDescription(
        instance_id="i-0123456789abcdef0", account_id="123456789012", root_volume=root, state="stopped"
    )
    instances.add(described)
    return instances, SimpleNamespace(
        bundle_id="bun-0",
        instance_id=described.instance_id,
        run_after_task=False,
        power_recovery_until=None,
        next_step=Step.SEAL,
    )
