"""Block devices, raw and with an image on them. Only loop devices are tested; LVM's behave the same for a reader."""

import os

import pytest

from support.disks.block_devices import loop_device
from support.disks.qemu_images import converted, encrypted, qemu_io, write_passphrase, written_to
from thrave.volumes.base import Extent
from thrave.volumes.errors import VolumeEncryptedError, VolumeInUseError
from thrave.volumes.formats import open_volume

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make block devices")


def content(volume):
    buffer = bytearray(volume.size)
    volume.read_into(0, memoryview(buffer))
    return bytes(buffer)


@pytest.fixture
def device(raw):
    with loop_device(raw) as device:
        yield device


def test_block_device_is_one_extent(device, raw):
    with open_volume(device, "raw") as volume:
        assert volume.extents() == [Extent(0, 8 << 20)]
        assert content(volume) == raw.read_bytes()


def test_qemu_and_open_volume_exclude_each_other_on_a_device(device, nbd):
    with written_to(device, "raw"), pytest.raises(VolumeInUseError), open_volume(device, "raw"):
        pass
    with open_volume(device, "raw"):
        assert 'Failed to get "write" lock' in qemu_io(device, "raw").stderr


def test_lock_covers_the_device_node_only(device, nbd, tmp_path):
    """A known limit, documented in `image_locks` for libvirt's nodes. If this test fails, the limit is gone."""
    node = tmp_path / "node"
    os.mknod(node, 0o600 | 0o060000, device.stat().st_rdev)
    with written_to(node, "raw"), open_volume(device, "raw"):
        pass


@pytest.mark.parametrize("image_format", ["qcow2", "luks"])
def test_open_volume_reads_image_on_a_device(raw, image_format, nbd):
    secret_file = write_passphrase(raw)
    image = encrypted(raw, image_format, secret_file)
    os.truncate(image, 16 << 20)
    with loop_device(image) as device, open_volume(device, image_format, secret_file=secret_file) as volume:
        assert content(volume)[: 8 << 20] == raw.read_bytes()


def test_qcow2_on_a_device_has_holes(raw, nbd):
    image = converted(raw, "qcow2")
    os.truncate(image, 16 << 20)
    with loop_device(image) as device, open_volume(device, "qcow2") as volume, open_volume(raw, "raw") as plain:
        assert volume.extents() == plain.extents()


def test_open_volume_rejects_device_as_passphrase_file(device, raw, nbd):
    image = encrypted(raw, "luks", write_passphrase(raw))
    with (
        pytest.raises(VolumeEncryptedError, match=f"{device} is not a regular file"),
        open_volume(image, "luks", secret_file=device),
    ):
        pass
