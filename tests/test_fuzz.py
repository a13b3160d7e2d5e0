"""Runs the fuzzer for a few seconds with every change; `scripts/fuzz.py` runs it for longer."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.fuzz_targets import TARGETS

FUZZ = Path(__file__).parents[1] / "scripts" / "fuzz.py"


@pytest.mark.sweep
@pytest.mark.parametrize("target", TARGETS)
def test_fuzzed_input_raises_only_expected_errors(target):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: it has wheels for Linux on x86-64 only")
    # The fuzzer measures coverage itself; a second measurement would disturb it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    # The peak memory of a program includes that of its parent before exec: with `timeout` it is not that of pytest.
    command = ["timeout", "120", sys.executable, str(FUZZ), "--seconds", "6", target]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize("target", TARGETS)
def test_corpus_of_the_fuzzer_is_accepted(target):
    for each in TARGETS[target].corpus:
        TARGETS[target].take(each)
