"""Kill -9 before and after every failpoint of a task, and at random moments; each task must end as without kills.

One task is killed at each failpoint in turn, so each crash meets the state that the crash before has left.
`scripts/kill_sweep.py` runs one task for each failpoint, and 200 random kills. The conditions after each kill and at
the end are in tests/support/crashes/kill_sweep.py.
"""

import os
import random

import pytest
from botocore.exceptions import ClientError

from support.crashes.kill_sweep import (
    MIB,
    NEW_BUNDLE_FAILPOINTS,
    REPLACEMENT_FAILPOINTS,
    KilledService,
    failpoints_of,
    run_with_kills,
    run_with_random_kills,
)
from support.required_programs import require
from thrave.tasks.failpoints import FAILPOINTS
from thrave.tasks.models import BundleTaskState

SEED = int(os.environ.get("THRAVE_SEED", "20061025"))

LIBVIRT_FAILPOINTS = [
    "sysprep-requested",
    "overlay-recorded",
    "overlay-created",
    "overlay-merged",
]  # tests/compute/libvirt
UNDO_FAILPOINTS = ["instance-started", "objects-deleted", "deletion-recorded", "task-ended"]


@pytest.mark.sweep
def test_workflow_completes_after_kill_at_each_failpoint(tmp_path, database):
    run_with_kills(tmp_path, failpoints_of(*NEW_BUNDLE_FAILPOINTS), **database)


@pytest.mark.sweep
def test_workflow_replaces_bundle_after_kill_at_each_failpoint(tmp_path, database):
    run_with_kills(tmp_path, failpoints_of(*REPLACEMENT_FAILPOINTS), replacing=True, **database)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "failpoint", ["part-stored, after, 3", "side-file-stored, after", "earlier-bundle-recorded, after"]
)
def test_cancelled_replacement_restores_earlier_bundle_after_kills(tmp_path, failpoint):
    """The service is also killed at each failpoint of the undo."""
    scene = KilledService(tmp_path)
    scene.prepare_replacement()
    scene.run_until_killed(failpoint)
    scene.cancel_while_stopped()
    for undo_failpoint in failpoints_of("objects-deleted", "deletion-recorded", "task-ended"):
        scene.run_until_killed(undo_failpoint)
    assert scene.run_to_end().error_code == "Client.Cancelled"
    scene.check_earlier_bundle()
    scene.check_no_traces()


@pytest.mark.sweep
def test_cancelled_task_leaves_no_object_after_kill_at_each_undo_failpoint(tmp_path, database):
    scene = KilledService(tmp_path, **database)
    scene.run_until_killed("part-stored, after, 3")
    scene.cancel_while_stopped()
    for failpoint in failpoints_of(*UNDO_FAILPOINTS):
        scene.run_until_killed(failpoint)
    assert scene.run_to_end().error_code == "Client.Cancelled"
    scene.wait_for_empty_bucket()
    scene.check_no_traces()


def test_bundle_instance_after_lost_response_names_recorded_task(tmp_path, database):
    scene = KilledService(tmp_path, size=MIB, **database)
    scene.machine.ignore_power_button()
    scene.run_until_killed("task-recorded, after")
    bundle_id = scene.bundle_id
    assert scene.start()
    with pytest.raises(ClientError, match=bundle_id) as refusal:
        scene.bundle()
    assert refusal.value.response["Error"]["Code"] == "BundlingInProgress"
    scene.machine.obey_power_button()
    assert scene.run_to_end().bundle_id == bundle_id
    scene.check_complete()
    scene.check_no_traces()


def test_killed_service_leaves_no_process_that_reads_the_disk(tmp_path):
    require("qemu-nbd", package="qemu-utils")
    scene = KilledService(tmp_path, image_format="qcow2")
    for failpoint in ("volume-size-recorded, after", "part-stored, after, 2"):
        scene.run_until_killed(failpoint)
        scene.wait_for_no_process()
    assert scene.run_to_end().state is BundleTaskState.COMPLETE
    scene.check_complete()
    scene.check_no_traces()


def test_cancellation_is_recorded_completely_or_not_at_all(tmp_path, database):
    scene = KilledService(tmp_path, **database)
    scene.machine.ignore_power_button()
    scene.run_until_killed("shutdown-requested, after")
    for when, state in (("before", "waiting-for-shutdown"), ("after", "cancelling")):
        assert scene.start(f"cancellation-recorded, {when}")
        scene.cancel()
        scene.wait_for_kill(when)
        assert scene.task().state == state
    assert scene.run_to_end().error_code == "Client.Cancelled"
    scene.check_no_traces()


def test_power_is_cut_after_kill_at_each_failpoint_of_the_cut(tmp_path, database):
    scene = KilledService(tmp_path, shutdown_timeout_action="power-off", **{**database, "shutdown_timeout": 0.5})
    scene.machine.ignore_power_button()
    for failpoint in failpoints_of("power-cut"):
        scene.run_until_killed(failpoint)
    task = scene.run_to_end()
    assert task.state is BundleTaskState.COMPLETE
    assert "its power was cut" in task.warning
    scene.check_complete()
    scene.check_no_traces()


def test_retention_deletes_task_after_kill(tmp_path, database):
    scene = KilledService(tmp_path, size=MIB, **database)
    scene.run_to_end()
    bundle = scene.objects()
    scene.server.stop()
    scene.environment["THRAVE_TASK_RETENTION_DAYS"] = "1e-9"
    scene.run_until_killed("task-deleted, before")
    assert scene.task() is not None
    scene.run_until_killed("task-deleted, after")
    assert scene.task() is None
    assert scene.objects() == bundle
    scene.start()
    scene.check_no_traces()


def test_kill_sweep_covers_every_failpoint():
    swept = {
        *NEW_BUNDLE_FAILPOINTS,
        *REPLACEMENT_FAILPOINTS,
        *UNDO_FAILPOINTS,
        *LIBVIRT_FAILPOINTS,
        "cancellation-recorded",
        "power-cut",
        "task-deleted",
    }
    assert swept == {*FAILPOINTS}


@pytest.mark.sweep
@pytest.mark.parametrize("seed", [SEED])
def test_workflow_completes_after_random_kills(tmp_path, database, seed):
    run_with_random_kills(tmp_path, random.Random(seed), 4, **database)
