"""The `thrave` command, run as from a shell but in the tests' own process, which is quicker."""

import json
import sys

import pytest

from thrave.cli.main import main


@pytest.fixture
def thrave(monkeypatch, capsys):
    """Runs `thrave …`; gives the status, stdout and stderr."""

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
    """Runs `thrave … --output json`, which must succeed; gives what it printed."""

    def run(*words):
        status, stdout, stderr = thrave(*words, "--output", "json")
        assert status == 0, stderr
        return json.loads(stdout)

    return run


@pytest.fixture
def disk(tmp_path):
    """A file that an instance can have as its root volume."""
    path = tmp_path / "win.raw"
    path.write_bytes(bytes(4096))
    return path
