"""Images in QEMU's formats: damaged and malicious images, missing programs, servers that end or do not answer."""

import math
import os
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.disks.qemu_images import converted, qemu_img, written_to
from support.eventually import eventually
from thrave.volumes import qemu_nbd
from thrave.volumes.errors import ToolNotInstalled, VolumeError, VolumeInUseError, VolumeUnreadableError
from thrave.volumes.formats import QEMU_FORMATS, open_volume
from thrave.volumes.image_chain import MAX_CHAIN_LENGTH

pytestmark = pytest.mark.usefixtures("nbd")

BACKING_FORMAT = bytes.fromhex("e2792aca")  # the qcow2 header extension with the format of the backing file


@pytest.fixture
def qcow2(raw):
    return converted(raw, "qcow2")


def refused(image, image_format):
    """Return the error of opening the image."""
    with pytest.raises(VolumeError) as caught, open_volume(image, image_format):
        pass
    return str(caught.value)


def content(image, image_format):
    with open_volume(image, image_format) as volume:
        buffer = bytearray(volume.size)
        volume.read_into(0, memoryview(buffer))
    return bytes(buffer)


def servers_of(image):
    """The servers that have the image open; their command lines do not contain its name."""
    return [process for process in psutil.process_iter(["name"]) if is_server_of(process, image)]


def is_server_of(process, image):
    with suppress(psutil.Error):
        return process.info["name"] == "qemu-nbd" and any(file.path == str(image) for file in process.open_files())
    return False


def await_no_server(image):
    """Wait until no server of the image runs."""

    def running():
        return [process for process in servers_of(image) if process.status() != psutil.STATUS_ZOMBIE]

    eventually(running, "no qemu-nbd has the image open", until=lambda servers: not servers)


@pytest.mark.parametrize(
    "options", [["-c"], ["-o", "cluster_size=4096"], ["-o", "extended_l2=on"], ["-o", "compat=0.10"]]
)
def test_open_volume_reads_every_kind_of_qcow2(raw, options):
    assert content(converted(raw, "qcow2", *options), "qcow2") == raw.read_bytes()


def test_open_volume_reads_a_chain_of_images(raw, tmp_path):
    base, middle = converted(raw, "vmdk"), tmp_path / "middle.qcow2"
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "vmdk", middle)
    qemu_img("create", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    assert content(top, "qcow2") == raw.read_bytes()


def test_relative_backing_file_starts_at_the_folder_of_the_image(raw, tmp_path, monkeypatch):
    qemu_img("create", "-f", "qcow2", "-b", raw.name, "-F", "raw", tmp_path / "top.qcow2")
    monkeypatch.chdir("/")
    assert content(tmp_path / "top.qcow2", "qcow2") == raw.read_bytes()


def test_open_volume_rejects_backing_file_without_format(raw, tmp_path):
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", raw, "-F", "raw", top)
    image = top.read_bytes()
    assert BACKING_FORMAT in image
    top.write_bytes(image.replace(BACKING_FORMAT, b"\x01\x02\x03\x04"))
    assert "does not name the format of its backing file" in refused(top, "qcow2")


@pytest.mark.parametrize("backing", ["nbd://127.0.0.1:9/x", "http://127.0.0.1:9/x", 'json:{"driver":"null-co"}'])
def test_open_volume_rejects_remote_backing_file(qcow2, backing):
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", qcow2)
    assert "not a local file" in refused(qcow2, "qcow2")


def test_open_volume_rejects_cyclic_chain(qcow2):
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", qcow2)
    assert f"more than {MAX_CHAIN_LENGTH} backing files" in refused(qcow2, "qcow2")


def test_open_volume_rejects_external_data_file(tmp_path):
    image = tmp_path / "x.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'secret'},data_file_raw=on", image, "1M")
    assert "its data is in another file" in refused(image, "qcow2")


def test_open_volume_rejects_vmdk_that_names_a_file_elsewhere(raw, tmp_path):
    folder = tmp_path / "vm"
    folder.mkdir()
    descriptor = folder / "disk.vmdk"
    sectors = raw.stat().st_size // 512
    descriptor.write_text(
        '# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        f'RW {sectors} FLAT "{raw}" 0\n'
    )
    assert f"cannot read {raw}: it is in {tmp_path}, neither the image's own folder" in refused(descriptor, "vmdk")


@pytest.mark.parametrize("image_format", [name for name in QEMU_FORMATS if name != "luks"])  # its header has no size
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
def test_open_volume_rejects_truncated_image(raw, image_format, share):
    image = converted(raw, image_format)
    os.truncate(image, int(image.stat().st_size * share))
    assert str(image) in refused(image, image_format)


@pytest.mark.parametrize("image_format", QEMU_FORMATS)
def test_open_volume_rejects_raw_disk_as_another_format(raw, image_format):
    assert str(raw) in refused(raw, image_format)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(offset=st.integers(4, 120), value=st.binary(min_size=1, max_size=8))
def test_any_qcow2_header_raises_only_volume_errors(qcow2, offset, value):
    damaged = qcow2.with_name("damaged.qcow2")
    image = qcow2.read_bytes()
    damaged.write_bytes(image[:offset] + value + image[offset + len(value) :])
    with suppress(VolumeError), open_volume(damaged, "qcow2") as volume:
        assert volume.size >= 0
        volume.extents()


def test_open_volume_refuses_image_that_is_written_to(qcow2):
    with (
        written_to(qcow2, "qcow2"),
        pytest.raises(VolumeInUseError, match="stop the machine"),
        open_volume(qcow2, "qcow2"),
    ):
        pass


def test_close_ends_the_server(qcow2):
    with open_volume(qcow2, "qcow2"):
        assert len(servers_of(qcow2)) == 1
    await_no_server(qcow2)


def test_server_ends_although_an_error_holds_its_connection(qcow2, monkeypatch):
    monkeypatch.setattr(qemu_nbd, "_STOP_TIMEOUT", math.inf)  # otherwise it would be killed after the timeout
    with pytest.raises(VolumeUnreadableError) as caught, open_volume(qcow2, "qcow2") as volume:
        volume.read_into(volume.size, memoryview(bytearray(1)))
    assert caught.value.__traceback__ is not None  # its frames hold libnbd's handle
    await_no_server(qcow2)


def test_server_ends_when_the_reader_is_killed(qcow2):
    code = (
        "import sys, time; from pathlib import Path; from thrave.volumes.formats import open_volume\n"
        "with open_volume(Path(sys.argv[1]), 'qcow2'): print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, qcow2], stdout=subprocess.PIPE) as reader:
        assert reader.stdout.readline() == b"open\n"
        assert servers_of(qcow2)
        reader.send_signal(signal.SIGKILL)
    await_no_server(qcow2)


def test_killed_server_raises_error_with_file_and_offset(qcow2):
    with open_volume(qcow2, "qcow2") as volume:
        (server,) = servers_of(qcow2)
        server.kill()
        with pytest.raises(VolumeUnreadableError, match=rf"{qcow2} at byte 4096") as caught:
            volume.read_into(4096, memoryview(bytearray(4096)))
        assert caught.value.offset == 4096
        with pytest.raises(VolumeUnreadableError, match="no extents"):
            volume.extents()


def test_silent_server_times_out(qcow2, tmp_path, monkeypatch):
    silent = tmp_path / "bin" / "qemu-nbd"
    silent.parent.mkdir()
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setenv("PATH", f"{silent.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(qemu_nbd, "START_TIMEOUT", 0.5)
    assert "did not answer within" in refused(qcow2, "qcow2")


def test_read_after_close_raises_error(qcow2):
    with open_volume(qcow2, "qcow2") as volume:
        pass
    with pytest.raises(VolumeUnreadableError, match="closed"):
        volume.read_into(0, memoryview(bytearray(1)))


def test_missing_program_names_its_package(qcow2, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ToolNotInstalled, match="qemu-img is not installed: apt-get install qemu-utils"),
        open_volume(qcow2, "qcow2"),
    ):
        pass


def test_missing_binding_names_its_package(qcow2, tmp_path, monkeypatch):
    for module in ("nbd", "libnbdmod"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("thrave.debian_modules.FOLDER", str(tmp_path))
    with pytest.raises(ToolNotInstalled, match="apt-get install python3-libnbd"), open_volume(qcow2, "qcow2"):
        pass


def test_other_debian_modules_are_not_imported(nbd):
    assert not any("dist-packages" in path for path in sys.path)
