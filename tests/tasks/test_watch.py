"""The watch over a step's work: what it carries to the record, and for what it stops the work."""

import threading
import time
from contextlib import closing

import pytest
import sqlalchemy as sa

from support.storing import Bench, directory
from thrave.compute.errors import HypervisorError, InstanceNotFound, RootVolumeInUse
from thrave.tasks.failures import Cancelled, TaskFailure
from thrave.tasks.watch import INTERVAL


@pytest.fixture
def bench(tmp_path):
    with closing(Bench(tmp_path, directory(tmp_path))) as bench:
        yield bench


def until_stopped(watch):
    stopped = threading.Event()
    watch.over(stopped.set)
    assert stopped.wait(60)


def test_progress_is_carried_to_the_record_and_never_falls(bench):
    share = [0.0]
    with bench.watch() as watch:
        watch.over(lambda: None, lambda: share[0])
        for share[0] in (0.25, 0.5):
            given_up = time.monotonic() + 60
            while bench.records.get(bench.bundle_id).progress != 100 * share[0]:
                assert time.monotonic() < given_up
                time.sleep(0.05)
        share[0] = 0.1
        time.sleep(3 * INTERVAL)
        assert bench.records.get(bench.bundle_id).progress == 50


def test_a_cancelled_task_stops_its_work_also_after_the_database_was_away(bench):
    def away(*_):
        raise sa.exc.OperationalError("select", {}, OSError("gone"))

    def work():
        with bench.watch() as watch:
            sa.event.listen(bench.engine, "before_cursor_execute", away)
            time.sleep(0.6)
            sa.event.remove(bench.engine, "before_cursor_execute", away)
            bench.records.cancel(bench.bundle_id)
            until_stopped(watch)

    with pytest.raises(Cancelled):
        work()


def test_work_that_is_begun_after_the_cancellation_was_seen_is_not_begun(bench):
    def work():
        with bench.watch() as watch:
            bench.records.cancel(bench.bundle_id)
            until_stopped(watch)
            watch.over(lambda: None)

    with pytest.raises(Cancelled):
        work()


def guarded_until_stopped(bench, *answers):
    """Look with a guard that raises these in turn, then nothing; give how often it was asked."""
    asked = []

    def check():
        asked.append(answers[len(asked)])
        if asked[-1] is not None:
            raise asked[-1]

    with bench.watch() as watch:
        watch.guard(check)
        until_stopped(watch)
    return asked


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (RootVolumeInUse("i-00000000", "it is running"), "Server.VolumeError"),
        (InstanceNotFound("i-00000000"), "Client.InstanceTerminated"),
        (TaskFailure("Client.InstanceTerminated", "gone"), "Client.InstanceTerminated"),
    ],
)
def test_work_is_stopped_as_soon_as_the_volume_is_seen_to_move(bench, found, code):
    with pytest.raises(TaskFailure) as failure:
        guarded_until_stopped(bench, None, found)
    assert failure.value.code == code


def test_a_hypervisor_that_does_not_answer_for_a_while_stops_nothing(bench):
    away, moved = HypervisorError("i-00000000", "away"), RootVolumeInUse("i-00000000", "it is running")
    with pytest.raises(TaskFailure, match="it is running"):
        guarded_until_stopped(bench, away, moved)


def test_what_the_guard_finds_while_the_record_is_looked_at_is_not_forgotten(bench):
    stopped = threading.Event()

    def moved():
        raise RootVolumeInUse("i-00000000", "it is running")

    def work():
        with bench.watch() as watch:
            watch.over(stopped.set, lambda: float(stopped.wait(60)))  # which has the look last until then
            watch.guard(moved)
            assert stopped.wait(60)

    with pytest.raises(TaskFailure, match="it is running"):
        work()


def test_waiting_on_purpose_is_no_stall_and_standing_still_is_one(bench):
    waited = threading.Event()

    def work():
        with bench.watch(stall_timeout=1.0) as watch:
            for _ in range(15):
                watch.pause(0.1)
            waited.set()
            until_stopped(watch)

    with pytest.raises(TaskFailure, match=r"Server\.NoProgress"):
        work()
    assert waited.is_set()
