"""The table of failpoints; a process kills itself at the failpoint of its setting, and at the Nth execution."""

import ast
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import thrave.tasks
from thrave.tasks.failpoints import FAILPOINTS, FailpointName, failpoint, set_failpoint

SOURCES = sorted(Path(thrave.tasks.__file__).parent.glob("*.py"))
CODE = """
import sys
from thrave.tasks.failpoints import failpoint, set_failpoint
set_failpoint(sys.argv[1])
for number in range(3):
    print(number, "before", flush=True)
    with failpoint("part-stored"):
        print(number, "within", flush=True)
    print(number, "after", flush=True)
"""


def run_process(setting):
    """Return the exit status and the last line of output of a process with this setting."""
    done = subprocess.run([sys.executable, "-c", CODE, setting], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("setting", "last_line"),
    [
        ("part-stored, before", "0 before"),
        ("part-stored, after", "0 within"),
        ("part-stored, before, 2", "1 before"),
        ("part-stored, after, 3", "2 within"),
    ],
)
def test_failpoint_kills_the_process_at_the_set_execution(setting, last_line):
    assert run_process(setting) == (-signal.SIGKILL, last_line)


@pytest.mark.parametrize("setting", ["part-stored, after, 4", "part-recorded, before"])
def test_failpoint_that_is_not_reached_has_no_effect(setting):
    assert run_process(setting) == (0, "2 after")


@pytest.mark.parametrize(
    "setting",
    ["", "part-stored", "part-stored,after", "part-lost, after", "part-stored, within", "part-stored, after, 0"],
)
def test_set_failpoint_rejects_invalid_setting(setting):
    with pytest.raises(ValueError, match="Write `NAME, before` or `NAME, after`"):
        set_failpoint(setting)


def test_failpoint_without_setting_has_no_effect():
    with failpoint("task-recorded"):
        pass
    with pytest.raises(ZeroDivisionError), failpoint("task-recorded"):
        raise ZeroDivisionError


def failpoints_in(source):
    """Return the names of the failpoints that the `with` statements of this source enter."""
    entered = [
        item.context_expr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.With) for item in node.items
    ]
    return {
        call.args[0].value
        for call in entered
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "failpoint"
    }


def test_failpoints_table_has_the_names_in_the_code():
    names = set().union(*(failpoints_in(path.read_text()) for path in SOURCES))
    assert names == {*FAILPOINTS} == {*get_args(FailpointName)}
