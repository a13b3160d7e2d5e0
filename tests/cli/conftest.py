"""Runs the `thrave` command in the process of the tests, which is faster than a process for each command."""

import json
import sys

import pytest

from support.json_fields import find_command, find_differences, find_error_differences
from thrave.cli.main import main


@pytest.fixture
def thrave(monkeypatch, capsys):
    """Runs `thrave …`; returns exit code, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["thrave", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


@pytest.fixture
def thrave_json(thrave):
    """Runs `thrave … --output json`, which must print exactly the documented fields; returns the document."""

    def run(*words):
        status, stdout, stderr = thrave(*words, "--output", "json")
        assert status == 0, stderr
        document = json.loads(stdout)
        assert find_differences(find_command(words), document) == []
        return document

    return run


@pytest.fixture
def thrave_error(thrave):
    """Runs `thrave … --output json`, which must fail with the documented fields; returns the object `error`."""

    def run(*words):
        status, _, stderr = thrave(*words, "--output", "json")
        document = json.loads(stderr.splitlines()[-1])
        assert find_error_differences(document) == []
        assert document["error"]["exitCode"] == status != 0
        return document["error"]

    return run


@pytest.fixture
def disk(tmp_path):
    """A file that an instance can have as its root volume."""
    path = tmp_path / "win.raw"
    path.write_bytes(bytes(4096))
    return path
