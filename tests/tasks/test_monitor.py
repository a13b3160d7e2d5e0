"""The task monitor: what it records, and why it stops the work of a step."""

import threading
import time

import pytest
import sqlalchemy as sa

from support.eventually import eventually, one_of
from thrave.compute.errors import (
    HoldLostError,
    HypervisorError,
    HypervisorUnavailable,
    InstanceNotFound,
    RootVolumeInUse,
)
from thrave.concurrency import Call, NoThreadError
from thrave.tasks.errors import TaskCancelled, TaskFailure
from thrave.tasks.lease import LeaseExpiredError, LeaseTimer, RightLostError
from thrave.tasks.monitor import INTERVAL, TaskMonitor


def until_stopped(monitor):
    stopped = threading.Event()
    monitor.watch(stopped.set)
    assert stopped.wait(60)


def test_monitor_records_progress_that_never_falls(bench):
    share = [0.0]
    with bench.monitor() as monitor:
        monitor.watch(lambda: None, lambda: share[0])
        for share[0] in (0.25, 0.5):
            eventually(lambda: bench.records.get(bench.bundle_id).progress, until=one_of(100 * share[0]))
        share[0] = 0.1
        time.sleep(3 * INTERVAL)
        assert bench.records.get(bench.bundle_id).progress == 50


def test_monitor_stops_cancelled_task_after_database_outage(bench):
    def away(*_):
        raise sa.exc.OperationalError("select", {}, OSError("gone"))

    def work():
        with bench.monitor() as monitor:
            sa.event.listen(bench.engine, "before_cursor_execute", away)
            time.sleep(0.6)
            sa.event.remove(bench.engine, "before_cursor_execute", away)
            bench.records.cancel(bench.bundle_id)
            until_stopped(monitor)

    with pytest.raises(TaskCancelled):
        work()


def test_watch_raises_if_task_was_cancelled_before(bench):
    def work():
        with bench.monitor() as monitor:
            bench.records.cancel(bench.bundle_id)
            until_stopped(monitor)
            monitor.watch(lambda: None)

    with pytest.raises(TaskCancelled):
        work()


def guarded_until_stopped(bench, *answers):
    """Monitor with a check that raises these errors in turn, then none; return the number of its calls."""
    asked = []

    def check():
        asked.append(answers[len(asked)])
        if asked[-1] is not None:
            raise asked[-1]

    with bench.monitor() as monitor:
        monitor.add_check(check)
        until_stopped(monitor)
    return asked


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (RootVolumeInUse("i-00000000", "it is running"), "Server.VolumeError"),
        (InstanceNotFound("i-00000000"), "Client.InstanceTerminated"),
        (TaskFailure("Client.InstanceTerminated", "gone"), "Client.InstanceTerminated"),
    ],
)
def test_monitor_stops_when_volume_check_fails(bench, found, code):
    with pytest.raises(TaskFailure) as failure:
        guarded_until_stopped(bench, None, found)
    assert failure.value.code == code


def test_monitor_ignores_short_hypervisor_outage(bench):
    away, moved = HypervisorError("i-00000000", "away"), RootVolumeInUse("i-00000000", "it is running")
    with pytest.raises(TaskFailure, match="it is running"):
        guarded_until_stopped(bench, away, moved)


@pytest.mark.parametrize("found", [ValueError("unexpected"), SystemExit(1)])
def test_monitor_stops_after_unexpected_error_of_check(bench, found):
    with pytest.raises(TaskFailure, match=r"Server\.InternalError"):
        guarded_until_stopped(bench, found)


@pytest.mark.parametrize(
    "trouble",
    [None, OSError(24, "Too many open files"), HypervisorUnavailable("i-00000000", "no connection", waited=120.0)],
)
def test_monitor_stops_with_hold_lost_after_guard_timeout(bench, monkeypatch, trouble):
    monkeypatch.setattr("thrave.tasks.monitor.CHECK_TIMEOUT", 2 * INTERVAL)
    monkeypatch.setattr("thrave.tasks.monitor.CHECK_INTERVAL", 0.0)
    hangs = threading.Event()

    def check():
        if trouble is None:
            hangs.wait(60)
        else:
            raise trouble

    def work():
        with bench.monitor() as monitor:
            monitor.add_check(check)
            until_stopped(monitor)

    with pytest.raises(HoldLostError, match="could not be checked") as stopped:
        work()
    hangs.set()
    assert stopped.value.waited >= 2 * INTERVAL, "the wait is not counted as progress"


def test_lost_hold_is_not_a_task_failure(bench):
    with pytest.raises(HoldLostError):
        guarded_until_stopped(bench, HoldLostError("i-00000000", "the connection was lost"))


@pytest.mark.parametrize("moment", ["it raises", "it hangs"])
@pytest.mark.parametrize("stopped_by", ["the owner", "standing still"])
def test_monitor_stops_while_progress_cannot_be_recorded(bench, moment, stopped_by):
    asked, hangs = threading.Event(), threading.Event()

    def progress():
        asked.set()
        if moment == "it hangs":
            hangs.wait(60)
        return 1 / len([])

    def work():
        with bench.monitor(stall_timeout=1.0) as monitor:
            stopped = threading.Event()
            monitor.watch(stopped.set, progress)
            assert asked.wait(60)
            if stopped_by == "the owner":
                bench.records.cancel(bench.bundle_id)
            assert stopped.wait(60)

    with pytest.raises(TaskFailure, match=r"Client\.Cancelled|Server\.NoProgress"):
        work()
    hangs.set()


@pytest.mark.parametrize("error", [TypeError("unexpected"), SystemExit(1)])
def test_monitor_stops_after_permanent_database_error(bench, monkeypatch, error):
    def fail(_bundle_id):
        raise error

    def work():
        with bench.monitor() as monitor:
            monkeypatch.setattr(bench.records, "get", fail)
            until_stopped(monitor)

    with pytest.raises(TaskFailure, match=r"Server\.InternalError"):
        work()


def test_monitor_stops_work_when_its_thread_fails(bench, monkeypatch):
    def fail(_watch):
        raise SystemExit

    monkeypatch.setattr(TaskMonitor, "_monitor", fail)
    with pytest.raises(TaskFailure, match=r"Server\.InternalError"), bench.monitor() as monitor:
        until_stopped(monitor)


@pytest.mark.parametrize("lost", ["another host has it", "it has ended", "its record is gone"])
def test_monitor_stops_run_that_lost_its_task(bench, monkeypatch, lost):
    ours = [True]

    def work():
        with TaskMonitor(bench.records, bench.bundle_id, stall_timeout=60, is_ours=lambda _task: ours[0]) as monitor:
            if lost == "another host has it":
                ours[0] = False
            elif lost == "it has ended":
                bench.records.fail(bench.bundle_id, TaskFailure("Server.HostLost", "retired"))
            else:
                monkeypatch.setattr(bench.records, "get", lambda _bundle_id: None)
            until_stopped(monitor)

    with pytest.raises(RightLostError):
        work()


def test_monitor_stops_when_lease_expires(bench):
    now = [0.0]
    lease = LeaseTimer(60.0, lambda: now[0])

    def work():
        with TaskMonitor(bench.records, bench.bundle_id, stall_timeout=600, lease_timer=lease) as monitor:
            now[0] = 59.0
            until_stopped(monitor)

    with pytest.raises(LeaseExpiredError):
        work()


def test_monitor_does_not_count_suspended_time_as_stall(bench, monkeypatch):
    """As after SIGSTOP: hours pass between two ticks of the monitor."""
    clock = [0.0]
    monkeypatch.setattr("thrave.tasks.monitor.monotonic", lambda: clock[0])
    looks, looked = [], threading.Event()
    real = bench.records.get

    def get(bundle_id):
        clock[0] += 3600.0
        looks.append(bundle_id)
        if len(looks) > 3:
            looked.set()
        return real(bundle_id)

    monkeypatch.setattr(bench.records, "get", get)
    with bench.monitor(stall_timeout=600.0) as monitor:
        monitor.watch(lambda: None)
        assert looked.wait(60)
        monitor.check()


def test_wait_for_result_ends_when_work_is_stopped(bench):
    hangs = threading.Event()

    def work():
        with bench.monitor() as monitor:
            call = Call("hangs", lambda: hangs.wait(60))
            bench.records.cancel(bench.bundle_id)
            monitor.wait_for_result(call)

    with pytest.raises(TaskCancelled):
        work()
    hangs.set()


def test_check_error_during_record_check_is_kept(bench):
    stopped = threading.Event()

    def moved():
        raise RootVolumeInUse("i-00000000", "it is running")

    def work():
        with bench.monitor() as monitor:
            monitor.watch(stopped.set, lambda: float(stopped.wait(60)))  # keeps the record check busy until then
            monitor.add_check(moved)
            assert stopped.wait(60)

    with pytest.raises(TaskFailure, match="it is running"):
        work()


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_monitor_without_threads_leaves_none_running(bench, monkeypatch, threads):
    start, left = threading.Thread.start, [threads]

    def refuse_later(thread):
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse_later)
        with pytest.raises(NoThreadError):
            bench.monitor().__enter__()
    eventually(
        lambda: not [one for one in threading.enumerate() if bench.bundle_id in one.name], "the threads have ended"
    )


def test_pause_is_activity_and_no_progress_is_stall(bench, stall_clock):
    waited = threading.Event()

    def work():
        with bench.monitor(stall_timeout=1.0) as monitor:
            for _ in range(5):
                stall_clock.advance(0.4)
                monitor.pause(0.01)
            waited.set()
            stall_clock.run()
            until_stopped(monitor)

    with pytest.raises(TaskFailure, match=r"Server\.NoProgress"):
        work()
    assert waited.is_set()
