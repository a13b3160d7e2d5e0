"""The table of crash points, and that a process dies at the one that was asked for, the time that was asked for."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import thrave.tasks
from thrave.tasks.failpoints import FAILPOINTS, Step, crash_at, failpoint

SOURCES = sorted(Path(thrave.tasks.__file__).parent.glob("*.py"))
CODE = """
import sys
from thrave.tasks.failpoints import crash_at; from thrave.tasks.failpoints import failpoint as durable
crash_at(sys.argv[1])
for number in range(3):
    print(number, "before", flush=True)
    with durable("part stored"):
        print(number, "within", flush=True)
    print(number, "after", flush=True)
"""


def died(setting):
    done = subprocess.run([sys.executable, "-c", CODE, setting], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("setting", "last_words"),
    [
        ("part stored, before", "0 before"),
        ("part stored, after", "0 within"),
        ("part stored, before, 2", "1 before"),
        ("part stored, after, 3", "2 within"),
    ],
)
def test_the_process_kills_itself_there_and_then(setting, last_words):
    assert died(setting) == (-signal.SIGKILL, last_words)


@pytest.mark.parametrize("setting", ["part stored, after, 4", "part recorded, before"])
def test_the_process_lives_if_it_never_comes_there(setting):
    assert died(setting) == (0, "2 after")


@pytest.mark.parametrize(
    "setting",
    ["", "part stored", "part stored,after", "part lost, after", "part stored, within", "part stored, after, 0"],
)
def test_what_is_no_crash_point_is_refused(setting):
    with pytest.raises(ValueError, match="is not `STEP, before` or `STEP, after`"):
        crash_at(setting)


def test_without_the_setting_a_block_is_only_a_block():
    with failpoint("record"):
        pass
    with pytest.raises(ZeroDivisionError), failpoint("record"):
        raise ZeroDivisionError


def test_every_step_of_the_table_is_somewhere_in_the_code():
    named = [name for path in SOURCES for name in re.findall(r'failpoint\("([a-z ]+)"\)', path.read_text())]
    assert {*named} == {*FAILPOINTS} == {*get_args(Step)}
