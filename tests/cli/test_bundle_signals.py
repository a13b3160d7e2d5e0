"""Signals that end `thrave open` and `copy`: no incomplete file remains."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from support.bundles.sample_bundles import VECTORS
from support.required_programs import missing
from support.servers import web
from thrave.volumes import qemu_nbd
from thrave.volumes.errors import ToolNotInstalled

KEYS = VECTORS / "keys"
BUNDLE = "ec2-ami-tools-1.5.3-dense-2-parts/small.img.manifest.xml"
ENDS = {signal.SIGTERM: -signal.SIGTERM, signal.SIGHUP: -signal.SIGHUP, signal.SIGINT: 130, signal.SIGKILL: -9}
END = pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)


@pytest.fixture
def asked():
    """Set when the second part is requested; the server never sends this part."""
    return threading.Event()


@pytest.fixture
def address(asked):
    with web.serving_files(VECTORS) as site:

        def hold(_):
            asked.set()
            site.ended.wait()
            return False

        site.behaviour[".part.1"] = hold
        yield f"{site.url}/{BUNDLE}"


@contextmanager
def running(*words):
    command = [sys.executable, "-m", "thrave", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def opening(address, image, *more):
    return ("open", address, "--key", KEYS / "user-pk.pem", "-o", image, *more)


@END
@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk", "vpc"])
def test_signal_during_open_leaves_no_file(address, asked, tmp_path, number, image_format):
    if image_format != "raw":
        try:
            qemu_nbd.load_binding()
        except ToolNotInstalled as error:
            missing(error.component, package=error.package)
    (tmp_path / "out").mkdir()
    with running(*opening(address, tmp_path / "out" / "image", "--format", image_format)) as process:
        assert asked.wait(120), process.stderr.read()
        process.send_signal(number)
        assert process.wait(60) == ENDS[number]
    assert list((tmp_path / "out").iterdir()) == []


@END
def test_signal_during_open_keeps_existing_file(address, asked, tmp_path, number):
    (tmp_path / "image").write_text("old")
    with running(*opening(address, tmp_path / "image", "--force")) as process:
        assert asked.wait(120), process.stderr.read()
        process.send_signal(number)
        assert process.wait(60) == ENDS[number]
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    assert (tmp_path / "image").read_text() == "old"


@END
def test_signal_during_copy_leaves_whole_parts_only(address, asked, tmp_path, number):
    with running("copy", address, tmp_path / "there") as process:
        assert asked.wait(120), process.stderr.read()
        process.send_signal(number)
        assert process.wait(60) == ENDS[number]
    assert {path.name for path in tmp_path.glob("there/*")} <= {"small.img.part.0"}
    for path in tmp_path.glob("there/*"):
        assert path.read_bytes() == (VECTORS / BUNDLE).with_name(path.name).read_bytes()


def test_ignored_signal_stays_ignored(address, asked, tmp_path):
    """As with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running(*opening(address, tmp_path / "image")) as process:
            assert asked.wait(120), process.stderr.read()
            os.kill(process.pid, signal.SIGHUP)
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(60) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)
    assert list(tmp_path.iterdir()) == []
