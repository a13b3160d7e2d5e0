"""`thrave serve`: output, exit codes."""

import json
import subprocess
import sys
import urllib.error
import urllib.request

import pytest


def served(tmp_path, *options):
    command = [
        sys.executable,
        "-m",
        "thrave",
        "serve",
        "--data-dir",
        str(tmp_path / "data"),
        "--listen-port",
        "0",
        *options,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize(
    ("options", "url_in"),
    [
        ((), lambda said: said.split("listening on ")[1].strip()),
        (("--output", "json"), lambda said: json.loads(said)["listening"]),
    ],
    ids=["text", "json"],
)
def test_serve_prints_url_and_exits_on_sigterm(tmp_path, options, url_in):
    with served(tmp_path, *options) as server:
        said = server.stdout.readline()
        while options and not said.endswith("}\n"):
            said += server.stdout.readline()
        with pytest.raises(urllib.error.HTTPError) as answer:
            urllib.request.urlopen(url_in(said))
        answer.value.close()
        assert answer.value.code == 400
        server.terminate()
        assert server.wait() == 0


@pytest.mark.parametrize(
    ("options", "status"),
    [(("--listen-port", "70000"), 2), (("--config", "/no/such/file"), 3), (("--listen-address", "0.0.0.0"), 4)],
)
def test_serve_failure_has_exit_code(tmp_path, options, status):
    with served(tmp_path, *options) as server:
        assert server.wait() == status
        assert server.stdout.read() == ""
