"""A minute of the fuzzer, so that every change is met by it; `scripts/fuzz.py` by hand takes as long as it is given."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.fuzz_targets import TARGETS

FUZZ = Path(__file__).parents[1] / "scripts" / "fuzz.py"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_some_seconds_of_anything_bring_out_nothing_but_our_errors(target):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: it has wheels for Linux on x86-64 alone")
    # The fuzzer counts coverage itself; two who do would get in each other's way.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    # A program counts the memory of whoever started it as its own peak: here that is `timeout`, not pytest.
    command = ["timeout", "120", sys.executable, str(FUZZ), "--seconds", "6", target]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_fuzzer_begins_with_is_taken(target):
    for each in TARGETS[target].corpus:
        TARGETS[target].take(each)
