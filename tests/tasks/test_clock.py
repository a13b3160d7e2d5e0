"""A clock that jumps by an hour while a task is under way, to and fro: nothing that waits may trust it."""

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
    """What makes a process's wall clock wrong, and what sets it wrong by so many hours."""
    library, hours = tmp_path / "wrong_clock.so", tmp_path / "wrong_by"
    compiler = require("gcc", package="gcc")
    require_file(Path("/usr/include/fcntl.h"), package="libc6-dev")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Werror", SOURCE, "-o", library], check=True)

    def jump(by):
        changed = tmp_path / "changed"
        changed.write_text(str(by * 3600))
        changed.replace(hours)

    jump(0)
    return {"LD_PRELOAD": str(library), "WRONG_CLOCK": str(hours)}, jump


def test_the_clock_of_this_test_is_wrong(clock):
    environment, jump = clock
    jump(-1)
    code = "import datetime, time; print(time.time(), datetime.datetime.now().timestamp(), time.monotonic())"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds = [float(word) for word in said.stdout.split()]
    right = [time.time(), time.time(), time.monotonic()]
    assert [round((wrong - now) / 3600) for wrong, now in zip(seconds, right, strict=True)] == [-1, -1, 0]


@pytest.mark.slow
def test_a_task_completes_while_the_clock_jumps(tmp_path, clock):
    environment, jump = clock
    scene = KilledService(tmp_path, server=ThraveServer, environment=environment, shutdown_timeout=60)
    scene.machine.deafen()
    scene.die_at("shutdown sent, after")
    jump(1)
    assert scene.live("part stored, after, 2")
    scene.machine.hear()
    scene.await_death("part stored, after, 2")
    jump(-1)
    assert scene.live("side file stored, before")
    jump(1)
    scene.await_death("side file stored, before")
    assert scene.come_to_an_end().state is BundleTaskState.COMPLETE
    scene.check_complete()
    scene.check_nothing_is_left()


def test_what_is_stored_is_removed_although_the_upload_policy_expires_meanwhile(tmp_path, clock):
    environment, jump = clock
    scene = KilledService(tmp_path, server=ThraveServer, environment=environment)
    scene.die_at("part stored, after, 2")
    assert scene.objects()
    jump(48)
    task = scene.come_to_an_end()
    assert (task.error_code, task.error_message) == (
        "Client.S3Error",
        "AccessDenied(403)- Invalid according to Policy: Policy expired.",
    )
    scene.await_empty_bucket()
    scene.check_nothing_is_left()
