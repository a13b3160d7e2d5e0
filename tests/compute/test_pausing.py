"""Merging is waited for as long as it makes progress, and no longer."""

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
from thrave.compute.timeouts import ProgressPause, report_progress


def test_work_that_moves_is_waited_for_without_an_end():
    pause = ProgressPause("i-00000000", lambda _seconds: None, 10.0)
    for _ in range(1000):
        pause(5.0)
        report_progress(pause)


def test_work_that_does_not_move_is_given_up():
    waited = []
    pause = ProgressPause("i-00000000", waited.append, 10.0)
    with pytest.raises(HypervisorError, match="no progress for 10 seconds"):
        [pause(0.2) for _ in range(1000)]
    assert 40 <= len(waited) <= 51


@pytest.mark.parametrize(
    ("copied", "gets_on"),
    [
        ([(0, 100), (10, 100), (20, 100)], True),
        ([(0, 100), (10, 110), (20, 120)], False),  # the guest writes as fast as the job copies
        ([(5, 100), (5, 100), (5, 100)], False),
    ],
)
def test_a_block_commit_gets_on_when_less_is_left_than_ever(copied, gets_on):
    pause = ProgressPause("i-00000000", lambda _seconds: None, 10.0)
    jobs = [{"cur": cur, "end": end} for cur, end in copied]
    frozen = Overlay(VolumeFile(path=Path("/vm/c.raw")), Path("/vm/c.overlay"))
    merging = OverlayMerge(None, "i-00000000", frozen, pause)
    merging._report_job_progress(SimpleNamespace(blockJobInfo=lambda *_: jobs.pop(0)), SimpleNamespace(target="vda"))
    for _ in range(2):
        pause(4.0)
        merging._report_job_progress(
            SimpleNamespace(blockJobInfo=lambda *_: jobs.pop(0)), SimpleNamespace(target="vda")
        )
    if gets_on:
        pause(4.0)
    else:
        with pytest.raises(HypervisorError, match="no progress"):
            pause(4.0)


@pytest.mark.parametrize("does", ["exec sleep 1000", "exec cat /dev/zero >/dev/null"])
def test_qemu_img_is_killed_when_it_reads_and_writes_nothing(tmp_path, monkeypatch, does):
    program = tmp_path / "qemu-img"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    calls = []

    def enough(_seconds):
        calls.append(1)
        if len(calls) > 20:
            raise StopIteration

    # Nothing but its own reading and writing tells the one from the other.
    pause = ProgressPause("i-00000000", enough, 1.0)
    if "sleep" in does:
        with pytest.raises(HypervisorError, match="no progress"):
            overlay_files.commit("i-00000000", tmp_path / "overlay", pause)
    else:
        with pytest.raises(StopIteration):
            overlay_files.commit("i-00000000", tmp_path / "overlay", pause)


def test_a_merge_says_how_long_it_waited_for_the_hypervisor(monkeypatch):
    def gone(_merging):
        raise HypervisorUnavailable("i-00000000", "no connection")

    monkeypatch.setattr(OverlayMerge, "step", gone)
    monkeypatch.setattr(overlays, "monotonic", lambda: now[0])
    now, frozen = [0.0], Overlay(VolumeFile(path=Path("/vm/root")), Path("/vm/root.overlay"))

    def pause(_seconds):
        now[0] += 1.0

    with pytest.raises(HypervisorUnavailable) as given_up:
        overlays.LibvirtOverlays(MagicMock()).merge("i-00000000", frozen, pause)
    assert given_up.value.waited == now[0] > overlays.MERGE_RETRY_TIMEOUT
