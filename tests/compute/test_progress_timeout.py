"""An operation such as a merge ends after a time without progress, and not before."""

import stat
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from thrave.compute.base import Overlay
from thrave.compute.errors import HypervisorError, HypervisorUnavailable
from thrave.compute.instance import VolumeFile
from thrave.compute.libvirt import overlay_files, overlays
from thrave.compute.libvirt.overlay_merge import OverlayMerge
from thrave.compute.progress_timeout import ProgressPause, report_progress


def test_progress_pause_never_ends_operation_with_progress():
    pause = ProgressPause("i-00000000", lambda _seconds: None, 10.0)
    for _ in range(1000):
        pause(5.0)
        report_progress(pause)


def test_progress_pause_raises_without_progress():
    waited = []
    pause = ProgressPause("i-00000000", waited.append, 10.0)
    with pytest.raises(HypervisorError, match="no progress for 10 seconds"):
        [pause(0.2) for _ in range(1000)]
    assert 40 <= len(waited) <= 51


@pytest.mark.parametrize(
    ("copied", "is_progress"),
    [
        ([(0, 100), (10, 100), (20, 100)], True),
        ([(0, 100), (10, 110), (20, 120)], False),  # the guest writes as fast as the job copies
        ([(5, 100), (5, 100), (5, 100)], False),
    ],
)
def test_block_commit_makes_progress_if_fewer_bytes_remain(copied, is_progress):
    pause = ProgressPause("i-00000000", lambda _seconds: None, 10.0)
    jobs = [{"cur": cur, "end": end} for cur, end in copied]
    overlay = Overlay(VolumeFile(path=Path("/vm/c.raw")), Path("/vm/c.overlay"))
    merge = OverlayMerge(None, "i-00000000", overlay, pause)
    merge._report_job_progress(SimpleNamespace(blockJobInfo=lambda *_: jobs.pop(0)), SimpleNamespace(target="vda"))
    for _ in range(2):
        pause(4.0)
        merge._report_job_progress(SimpleNamespace(blockJobInfo=lambda *_: jobs.pop(0)), SimpleNamespace(target="vda"))
    if is_progress:
        pause(4.0)
    else:
        with pytest.raises(HypervisorError, match="no progress"):
            pause(4.0)


@pytest.mark.parametrize("action", ["exec sleep 1000", "exec cat /dev/zero >/dev/null"])
def test_qemu_img_is_killed_if_it_reads_and_writes_nothing(tmp_path, monkeypatch, action):
    program = tmp_path / "qemu-img"
    program.write_text(f"#!/bin/sh\n{action}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    calls = []

    def stop_after_20_calls(_seconds):
        calls.append(1)
        if len(calls) > 20:
            raise StopIteration

    # Only their I/O counters differ.
    pause = ProgressPause("i-00000000", stop_after_20_calls, 1.0)
    if "sleep" in action:
        with pytest.raises(HypervisorError, match="no progress"):
            overlay_files.commit("i-00000000", tmp_path / "overlay", pause)
    else:
        with pytest.raises(StopIteration):
            overlay_files.commit("i-00000000", tmp_path / "overlay", pause)


def test_merge_error_has_time_waited_for_hypervisor(monkeypatch):
    def fail(_merge):
        raise HypervisorUnavailable("i-00000000", "no connection")

    monkeypatch.setattr(OverlayMerge, "step", fail)
    monkeypatch.setattr(overlays, "monotonic", lambda: now[0])
    now, overlay = [0.0], Overlay(VolumeFile(path=Path("/vm/root")), Path("/vm/root.overlay"))

    def pause(_seconds):
        now[0] += 1.0

    with pytest.raises(HypervisorUnavailable) as caught:
        overlays.LibvirtOverlays(MagicMock()).merge("i-00000000", overlay, pause)
    assert caught.value.waited == now[0] > overlays.MERGE_RETRY_TIMEOUT
