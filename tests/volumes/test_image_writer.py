"""New images in QEMU's formats: their content as QEMU reads it, and errors while they are written."""

import os
import subprocess
from random import Random

import psutil
import pytest

from support.disks.qemu_images import qemu_img
from support.required_programs import require
from thrave.volumes.errors import ToolNotInstalled, UnknownFormatError, VolumeUnwritableError
from thrave.volumes.formats import open_volume
from thrave.volumes.qemu_nbd import WRITABLE_FORMATS, create_image

pytestmark = pytest.mark.usefixtures("nbd")

KIB, MIB = 1024, 1024 * 1024
SIZE = 16 * MIB + 512
RUNS = {
    offset: Random(offset).randbytes(length)
    for offset, length in [(512, 5000), (MIB, MIB - 512), (2 * MIB - 512, 70_000), (SIZE - 300, 300)]
}
FORMATS = pytest.mark.parametrize("image_format", WRITABLE_FORMATS)


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "disk.raw"
    with path.open("wb") as disk:
        disk.truncate(SIZE)
        for offset, data in RUNS.items():
            disk.seek(offset)
            disk.write(data)
    return path


def write(path, image_format, size=SIZE, runs=RUNS):
    path.touch(0o600)
    with create_image(path, image_format, size) as image:
        for offset, data in runs.items():
            image.write(offset, memoryview(data))
    return path


def servers(image):
    """The running servers of the image; a server that has ended has no command line."""
    children = psutil.Process().children()
    return [process for process in children if process.name() == "qemu-nbd" and str(image) in process.cmdline()]


@FORMATS
def test_qemu_checks_and_reads_the_written_image(raw, tmp_path, image_format):
    image = write(tmp_path / "image", image_format)
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", image_format, raw, image)
    if image_format != "vpc":  # QEMU has no check for vpc
        assert "No errors" in qemu_img("check", "-f", image_format, image)
    assert servers(tmp_path / "image") == []


@FORMATS
def test_unwritten_ranges_stay_unallocated(tmp_path, image_format):
    image = write(tmp_path / "image", image_format, 1 << 32, {3 << 30: b"data" * KIB})
    assert image.stat().st_blocks * 512 < 4 * MIB
    with open_volume(image, image_format) as volume:
        assert volume.size == 1 << 32
        assert sum(extent.length for extent in volume.extents()) <= 2 * MIB


@FORMATS
def test_writer_keeps_the_mode_of_the_file(tmp_path, image_format):
    assert write(tmp_path / "image", image_format, MIB, {}).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("image_format", ["raw", "vhdx", "vdi", "nbd", "", "qcow2,backing_file=/etc/passwd"])
def test_writer_rejects_other_formats(tmp_path, image_format):
    with pytest.raises(UnknownFormatError, match="known are qcow2"):
        write(tmp_path / "image", image_format)


def test_writer_does_not_interpret_file_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nbd:image", "-o", "a,b=c"):
        (tmp_path / name).touch()
        with create_image((tmp_path / name).relative_to(tmp_path), "qcow2", MIB):
            pass
        assert b"QFI" in (tmp_path / name).read_bytes()


def test_writer_rejects_impossible_size(tmp_path):
    for size in (1 << 62, (1 << 63) - 1):
        with pytest.raises(VolumeUnwritableError, match="cannot write"):
            write(tmp_path / "image", "qcow2", size)


def test_writer_reports_missing_folder(tmp_path):
    with pytest.raises(VolumeUnwritableError), create_image(tmp_path / "no" / "image", "qcow2", MIB):
        pass


def write_after_the_server_was_killed(path):
    with create_image(path, "qcow2", MIB) as image:
        (server,) = servers(path)
        server.kill()
        image.write(0, memoryview(b"x" * 512))


def test_writer_reports_killed_server(tmp_path):
    (tmp_path / "image").touch()
    with pytest.raises(VolumeUnwritableError):
        write_after_the_server_was_killed(tmp_path / "image")
    assert servers(tmp_path / "image") == []


def test_failed_writer_leaves_no_server(tmp_path):
    (tmp_path / "image").touch()
    with pytest.raises(ValueError, match="stop"), create_image(tmp_path / "image", "qcow2", MIB) as image:
        raise ValueError("stop")
    assert servers(tmp_path / "image") == []
    with pytest.raises(VolumeUnwritableError, match="closed"):
        image.write(0, memoryview(b"x"))


def test_writer_reports_full_disk(tmp_path):
    """A limit on the size of files, which the server inherits, has the same effect as a full disk."""
    program = require("prlimit", package="util-linux")
    script = (
        "import signal, sys; from pathlib import Path; from thrave.volumes.qemu_nbd import create_image\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "path = Path(sys.argv[1]); path.touch()\n"
        "with create_image(path, 'qcow2', 1 << 26) as image:\n"
        "    for offset in range(0, 1 << 26, 1 << 20): image.write(offset, memoryview(b'x' * (1 << 20)))\n"
    )
    python = os.sys.executable
    argv = [program, f"--fsize={8 * MIB}", python, "-c", script, str(tmp_path / "image")]
    finished = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "VolumeUnwritableError" in finished.stderr


def test_writer_names_package_of_missing_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolNotInstalled, match="apt-get install qemu-utils"):
        write(tmp_path / "image", "qcow2")
