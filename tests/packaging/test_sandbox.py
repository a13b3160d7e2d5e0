"""The sandbox of a unit allows what a bundle needs, and little else.

The whole service, bundling a real guest in it, is the how-to's (`tests/docs/test_howtos.py`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.required_programs import require
from support.service.systemd_sandbox import confined
from thrave import host_files
from thrave.demo.disk import make_demo_disk

UNIT = Path(host_files.__file__).parent / "systemd" / "thrave.service"

FORBIDDEN = """
import ctypes, mmap, os, socket
def tried(name, what):
    try:
        what()
    except OSError as error:
        print(name, os.strerror(error.errno))
tried("write", lambda: open("/etc/thrave-was-here", "w"))
tried("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
tried("code", lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC))
tried("give away", lambda: os.chown(".", 1, 1))
tried("priority", lambda: os.setpriority(os.PRIO_PROCESS, 0, 1))
tried("disks", lambda: os.stat("/dev/loop-control"))
tried("machine", lambda: os.stat("/proc/meminfo"))
"""

BUNDLE = """
import sys
from pathlib import Path
from thrave.volumes.formats import open_volume
with open_volume(Path(sys.argv[1]), "qcow2", skip_unused=True) as volume:
    print(sum(extent.length for extent in volume.extents()))
"""

OVERLAY = """
import sys, time
from pathlib import Path
from thrave.compute.libvirt.domain_xml import DiskImage as Image
from thrave.compute.libvirt.overlay_files import commit; from thrave.compute.libvirt.overlay_files import create
disk, overlay = map(Path, sys.argv[1:])
create("i-00000000", overlay, Image(disk, "raw"))
commit("i-00000000", overlay, time.sleep)
"""


def python(code, *words, writable):
    """Run code in the sandbox; return its status and output."""
    argv = confined(UNIT, [writable], [sys.executable, "-c", code, *map(str, words)])
    # Coverage in the process could not write its results there.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120, cwd=writable, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_sandbox_refuses_unneeded_operations(tmp_path):
    status, said = python(FORBIDDEN, writable=tmp_path)
    assert status == 0, said
    assert said.splitlines() == [
        "write Read-only file system",
        "netlink Operation not permitted",
        "code Operation not permitted",
        "give away Operation not permitted",
        "priority Operation not permitted",
        "disks No such file or directory",
        "machine No such file or directory",
    ]


def test_sandbox_allows_reading_an_image_and_scanning_ntfs(tmp_path):
    pytest.importorskip("pytsk3")
    disk, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    make_demo_disk(disk, 64 << 20)
    qemu_img = require("qemu-img", package="qemu-utils")
    subprocess.run([qemu_img, "convert", "-f", "raw", "-O", "qcow2", disk, image], check=True)
    status, said = python(BUNDLE, image, writable=tmp_path)
    assert status == 0, said
    assert 0 < int(said) < disk.stat().st_blocks * 512


def test_sandbox_allows_overlays_only_in_writable_folders(tmp_path):
    require("qemu-img", package="qemu-utils")
    pool, elsewhere = tmp_path / "pool", tmp_path / "elsewhere"
    for folder in (pool, elsewhere):
        folder.mkdir()
    disk = pool / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    status, said = python(OVERLAY, disk, pool / ".overlay.qcow2", writable=pool)
    assert status == 0, said
    status, said = python(OVERLAY, disk, pool / ".overlay.qcow2", writable=elsewhere)
    assert (status, "Read-only file system" in said) == (1, True)
