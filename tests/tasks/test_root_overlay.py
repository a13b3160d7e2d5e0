"""A merge that does not end fails or is cancelled, and the overlay stays recorded."""

import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.service.upload_bench import UploadBench, directory
from thrave.compute.base import Overlay
from thrave.compute.errors import HypervisorError
from thrave.compute.instance import VolumeFile
from thrave.compute.progress_timeout import report_progress
from thrave.compute.timeouts import check_command
from thrave.tasks.errors import TaskCancelled
from thrave.tasks.instance_power import RootOverlay
from thrave.tasks.lease import LeaseExpiredError, LeaseTimer

OVERLAY = Overlay(VolumeFile(path=Path("/vm/c.raw")), Path("/vm/c.overlay"))


@pytest.fixture
def bench(tmp_path):
    with closing(UploadBench(tmp_path, directory(tmp_path))) as bench:
        bench.records.record_overlay(bench.bundle_id, OVERLAY)
        yield bench


def root_overlay(bench, merge):
    instances = SimpleNamespace(overlays=SimpleNamespace(merge=merge))
    return RootOverlay(instances, bench.records, bench.records.get(bench.bundle_id), stall_timeout=600)


def test_merge_without_progress_fails_and_stays_recorded(bench):
    def merge(_instance_id, _overlay, pause):
        for _ in range(5):
            pause(599)
            report_progress(pause)
        while True:
            pause(1)

    waited = []
    with pytest.raises(HypervisorError, match="no progress for 600 seconds"):
        root_overlay(bench, merge).merge(waited.append)
    assert len(waited) <= 5 + 600
    assert bench.records.overlay(bench.bundle_id) == OVERLAY


def test_merge_is_stopped_by_cancellation(bench):
    started = threading.Event()

    def merge(_instance_id, _overlay, pause):
        started.set()
        while True:
            pause(0.01)
            report_progress(pause)

    def work():
        with bench.monitor() as monitor:
            root_overlay(bench, merge).merge(monitor.pause)

    canceller = threading.Thread(target=lambda: started.wait(60) and bench.records.cancel(bench.bundle_id))
    canceller.start()
    with pytest.raises(TaskCancelled):
        work()
    canceller.join()
    assert bench.records.overlay(bench.bundle_id) == OVERLAY


def test_merge_is_abandoned_if_hypervisor_hangs(bench, monkeypatch):
    monkeypatch.setattr("thrave.tasks.instance_power.ABANDON_AFTER", 0.1)
    hangs = threading.Event()
    with pytest.raises(HypervisorError, match="is not merged after 0 seconds"):
        root_overlay(bench, lambda *_: hangs.wait(60)).merge_with_timeout(0.1)
    hangs.set()


@pytest.mark.parametrize("act", ["attach", "merge", "merge_within"])
def test_each_overlay_command_checks_the_lease(bench, act):
    given = []

    def command(instance_id, _overlay, _pause=None):
        check_command(instance_id)
        given.append(instance_id)

    instances = SimpleNamespace(overlays=SimpleNamespace(merge=command, attach=command))
    task, now = bench.records.get(bench.bundle_id), [0.0]
    lease = LeaseTimer(10.0, clock=lambda: now[0])
    lease.renew(0.0)
    root_overlay = RootOverlay(instances, bench.records, task, check=lease.check)
    does = {
        "attach": root_overlay.create,
        "merge": lambda: root_overlay.merge(lambda _seconds: None),
        "merge_within": lambda: root_overlay.merge_with_timeout(60),
    }[act]
    now[0] = 9.5
    with pytest.raises(LeaseExpiredError):
        does()
    assert given == []
    assert bench.records.overlay(bench.bundle_id) == OVERLAY
    lease.renew(9.0)
    does()
    assert given == [task.instance_id]
