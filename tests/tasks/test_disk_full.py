"""A data directory without room: on a small tmpfs of its own, which takes the right to mount one."""

import shutil
import subprocess
import time
from contextlib import suppress

import pytest

from support.killing import MIB, Scene
from thrave.tasks.states import BundleTaskState

PASSES = 10


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB, and what makes it larger."""
    folder = tmp_path / "small"
    folder.mkdir()

    def resize(options, size):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", f"{options}size={size}", "tmpfs", folder], check=False)

    if resize("", 24 * MIB).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder, lambda size: resize("remount,", size)
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_a_task_that_finds_no_room_fails_and_leaves_the_room_that_there_was(small_disk, tmp_path):
    folder, resize = small_disk
    scene = Scene(tmp_path, data=folder / "thrave")
    free = None
    for _ in range(PASSES):
        task = scene.come_to_an_end()
        assert (task.state, task.error_code) == (BundleTaskState.FAILED, "Server.S3Error")
        assert task.error_message.startswith("InternalError(500)- ")
        assert scene.objects() == {}
        scene.await_power()
        before, free = free, shutil.disk_usage(folder).free
        assert before is None or free > before - MIB
        scene.bundle_id = None
    resize(128 * MIB)
    assert scene.come_to_an_end().state is BundleTaskState.COMPLETE
    scene.check_complete()
    scene.check_nothing_is_left()


def test_a_task_whose_record_cannot_be_written_goes_on_when_there_is_room(small_disk, tmp_path):
    folder, resize = small_disk
    scene = Scene(tmp_path, data=folder / "thrave")
    resize(128 * MIB)
    scene.machine.deafen()
    assert scene.live()
    scene.ask()
    scene.await_state("waiting-for-shutdown")
    with (folder / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while filler.write(bytes(MIB)):
            pass
    scene.machine.hear()
    time.sleep(3)
    assert scene.is_alive
    assert scene.task().state == "waiting-for-shutdown"
    (folder / "filler").unlink()
    assert scene.come_to_an_end().state is BundleTaskState.COMPLETE
    scene.check_complete()
    scene.check_nothing_is_left()
