"""Tasks while the wall clock jumps by hours in both directions: no wait may depend on the wall clock."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.crashes.kill_sweep import KilledService
from support.required_programs import require, require_file
from thrave.tasks.models import BundleTaskState
from thrave.testing import ThraveServer

SOURCE = Path(__file__).parents[1] / "support" / "crashes" / "wrong_clock.c"


@pytest.fixture
def clock(tmp_path):
    """Return the environment of a process whose wall clock is wrong, and a function that sets the error in hours."""
    library, hours = tmp_path / "wrong_clock.so", tmp_path / "wrong_by"
    compiler = require("gcc", package="gcc")
    require_file(Path("/usr/include/fcntl.h"), package="libc6-dev")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Werror", SOURCE, "-o", library], check=True)

    def jump(offset):
        changed = tmp_path / "changed"
        changed.write_text(str(offset * 3600))
        changed.replace(hours)

    jump(0)
    return {"LD_PRELOAD": str(library), "WRONG_CLOCK": str(hours)}, jump


def test_preloaded_clock_is_wrong(clock):
    environment, jump = clock
    jump(-1)
    code = "import datetime, time; print(time.time(), datetime.datetime.now().timestamp(), time.monotonic())"
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds = [float(word) for word in process.stdout.split()]
    right = [time.time(), time.time(), time.monotonic()]
    assert [round((wrong - now) / 3600) for wrong, now in zip(seconds, right, strict=True)] == [-1, -1, 0]


@pytest.mark.sweep
def test_workflow_completes_while_clock_jumps(tmp_path, clock):
    environment, jump = clock
    scene = KilledService(tmp_path, server=ThraveServer, environment=environment, shutdown_timeout=60)
    scene.machine.ignore_power_button()
    scene.run_until_killed("shutdown-requested, after")
    jump(1)
    assert scene.start("part-stored, after, 2")
    scene.machine.obey_power_button()
    scene.wait_for_kill("part-stored, after, 2")
    jump(-1)
    assert scene.start("side-file-stored, before")
    jump(1)
    scene.wait_for_kill("side-file-stored, before")
    assert scene.run_to_end().state is BundleTaskState.COMPLETE
    scene.check_complete()
    scene.check_no_traces()


def test_undo_deletes_objects_after_upload_policy_expired(tmp_path, clock):
    environment, jump = clock
    scene = KilledService(tmp_path, server=ThraveServer, environment=environment)
    scene.run_until_killed("part-stored, after, 2")
    assert scene.objects()
    jump(48)
    task = scene.run_to_end()
    assert (task.error_code, task.error_message) == (
        "Client.S3Error",
        "AccessDenied(403)- Invalid according to Policy: Policy expired.",
    )
    scene.wait_for_empty_bucket()
    scene.check_no_traces()
