"""Kill -9 before and after every durable step of a task, and at random moments: each task ends as if nothing had been.

One task is killed at each of its steps in turn, the next time right where it has come to: so that every crash is met by
what an earlier one has left. `scripts/kill_sweep.py` does each alone, and two hundred random moments. What must be
true at each death and in the end stands in tests/support/crashes/kill_sweep.py.
"""

import os
import random

import pytest
from botocore.exceptions import ClientError

from support.crashes.kill_sweep import MIB, TO_COMPLETE, TO_REPLACE, KilledService, killed_at, killed_at_random, moments
from support.required_programs import require
from thrave.tasks.failpoints import FAILPOINTS
from thrave.tasks.models import BundleTaskState

SEED = int(os.environ.get("THRAVE_SEED", "20061025"))

OF_REAL_MACHINES = ["sysprep sent", "overlay noted", "root volume frozen", "overlay merged"]  # tests/compute/libvirt
AFTER_CANCELLING = ["instance started", "objects removed", "removal recorded", "record closed"]


@pytest.mark.slow
def test_a_task_that_is_killed_at_each_step_in_turn_completes(tmp_path, database):
    killed_at(tmp_path, moments(*TO_COMPLETE), **database)


@pytest.mark.slow
def test_a_replacement_that_is_killed_at_each_step_in_turn_completes(tmp_path, database):
    killed_at(tmp_path, moments(*TO_REPLACE), replacing=True, **database)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["part stored, after, 3", "side file stored, after", "earlier bundle noted, after"])
def test_a_cancelled_replacement_leaves_exactly_the_earlier_bundle(tmp_path, moment):
    """Killed at each step of putting back, too."""
    scene = KilledService(tmp_path)
    scene.replace()
    scene.die_at(moment)
    scene.cancel_behind_its_back()
    for moment_of_putting_back in moments("objects removed", "removal recorded", "record closed"):
        scene.die_at(moment_of_putting_back)
    assert scene.come_to_an_end().error_code == "Client.Cancelled"
    scene.check_earlier()
    scene.check_nothing_is_left()


@pytest.mark.slow
def test_a_cancelled_task_that_is_killed_at_each_step_of_putting_back_leaves_nothing(tmp_path, database):
    scene = KilledService(tmp_path, **database)
    scene.die_at("part stored, after, 3")
    scene.cancel_behind_its_back()
    for moment in moments(*AFTER_CANCELLING):
        scene.die_at(moment)
    assert scene.come_to_an_end().error_code == "Client.Cancelled"
    scene.await_empty_bucket()
    scene.check_nothing_is_left()


def test_a_caller_whose_answer_never_came_hears_of_the_task_when_they_call_again(tmp_path, database):
    scene = KilledService(tmp_path, size=MIB, **database)
    scene.machine.deafen()
    scene.die_at("record, after")
    bundle_id = scene.bundle_id
    assert scene.live()
    with pytest.raises(ClientError, match=bundle_id) as refusal:
        scene.ask()
    assert refusal.value.response["Error"]["Code"] == "BundlingInProgress"
    scene.machine.hear()
    assert scene.come_to_an_end().bundle_id == bundle_id
    scene.check_complete()
    scene.check_nothing_is_left()


def test_nobody_reads_the_disk_any_more_when_the_service_has_been_killed(tmp_path):
    require("qemu-nbd", package="qemu-utils")
    scene = KilledService(tmp_path, image_format="qcow2")
    for moment in ("volume opened, after", "part stored, after, 2"):
        scene.die_at(moment)
        scene.await_nobody()
    assert scene.come_to_an_end().state is BundleTaskState.COMPLETE
    scene.check_complete()
    scene.check_nothing_is_left()


def test_a_service_killed_while_it_takes_a_cancellation_has_taken_it_or_has_not(tmp_path, database):
    scene = KilledService(tmp_path, **database)
    scene.machine.deafen()
    scene.die_at("shutdown sent, after")
    for moment, state in (("before", "waiting-for-shutdown"), ("after", "cancelling")):
        assert scene.live(f"cancellation, {moment}")
        scene.cancel()
        scene.await_death(moment)
        assert scene.task().state == state
    assert scene.come_to_an_end().error_code == "Client.Cancelled"
    scene.check_nothing_is_left()


def test_a_service_killed_while_it_cuts_the_power_cuts_it(tmp_path, database):
    scene = KilledService(tmp_path, shutdown_timeout_action="power-off", **{**database, "shutdown_timeout": 0.5})
    scene.machine.deafen()
    for moment in moments("power cut"):
        scene.die_at(moment)
    task = scene.come_to_an_end()
    assert task.state is BundleTaskState.COMPLETE
    assert "its power was cut" in task.warning
    scene.check_complete()
    scene.check_nothing_is_left()


def test_a_service_killed_while_it_forgets_a_task_has_forgotten_it_or_does_so_later(tmp_path, database):
    scene = KilledService(tmp_path, size=MIB, **database)
    scene.come_to_an_end()
    bundle = scene.objects()
    scene.server.stop()
    scene.environment["THRAVE_TASK_RETENTION_DAYS"] = "1e-9"
    scene.die_at("task purged, before")
    assert scene.task() is not None
    scene.die_at("task purged, after")
    assert scene.task() is None
    assert scene.objects() == bundle
    scene.live()
    scene.check_nothing_is_left()


def test_no_step_is_left_out():
    swept = {
        *TO_COMPLETE,
        *TO_REPLACE,
        *AFTER_CANCELLING,
        *OF_REAL_MACHINES,
        "cancellation",
        "power cut",
        "task purged",
    }
    assert swept == {*FAILPOINTS}


@pytest.mark.slow
@pytest.mark.parametrize("drawn_from", [SEED])
def test_a_task_that_is_killed_at_random_moments_ends(tmp_path, database, drawn_from):
    killed_at_random(tmp_path, random.Random(drawn_from), 4, **database)
