"""A root volume on an unresponsive disk: the task ends, and the machine can be started."""

import os
import threading
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from support.disks.qemu_images import converted, written_to
from support.eventually import eventually
from thrave.tasks.errors import TaskCancelled
from thrave.tasks.root_volume import VolumeReader
from thrave.volumes.formats import open_volume
from thrave.volumes.qemu_nbd import QemuVolume
from thrave.volumes.raw import RawVolume

DRIVERS = {"raw": RawVolume, "qcow2": QemuVolume}


class Disk:
    """A disk that does not respond until the test releases it."""

    def __init__(self):
        self.asked, self.answers = threading.Event(), threading.Event()

    def hang(self, *_):
        self.asked.set()
        self.answers.wait(60)
        return []


@contextmanager
def opened_late(disk, image, image_format, **options):
    with open_volume(image, image_format, **options) as volume:
        disk.hang()
        yield volume


@pytest.mark.parametrize("image_format", DRIVERS)
@pytest.mark.parametrize("moment", ["opening", "extents", "a look", "closing"])
def test_unresponsive_disk_is_abandoned_and_instance_starts(bench, tmp_path, monkeypatch, image_format, moment):
    raw = tmp_path / "root.raw"
    raw.write_bytes(os.urandom(1 << 20))
    image = raw if image_format == "raw" else converted(raw, image_format)
    disk = Disk()
    opening = partial(opened_late, disk) if moment == "opening" else open_volume
    if moment == "extents":
        monkeypatch.setattr(DRIVERS[image_format], "extents", disk.hang)
    if moment == "closing":
        monkeypatch.setattr("thrave.volumes.image_chain.ImageChain.check_unchanged", disk.hang)

    def work():
        with bench.monitor() as monitor, VolumeReader(partial(opening, image, image_format), monitor) as reader:
            if moment == "a look":
                reader.run(disk.hang)

    def cancel():
        assert disk.asked.wait(60)
        bench.records.cancel(bench.bundle_id)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(TaskCancelled):
        work()
    canceller.join()
    with written_to(image, image_format):  # the machine runs although the call still hangs
        assert not disk.answers.is_set()
    disk.answers.set()
    eventually(lambda: str(image) not in open_files(), "the volume is closed by the call")


def open_files():
    links = []
    for number in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed in the meantime
            links.append(str(number.readlink()))
    return links
