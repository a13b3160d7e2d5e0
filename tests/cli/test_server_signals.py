"""Signals end a service at every step of its start, and the next start succeeds."""

import os
import signal

import pytest

from support.service.forked_server import ForkedServer, run_thrave
from thrave.components import open_components
from thrave.config import DataDirectory, Settings
from thrave.testing import ThraveServer

TIMEOUT = 120  # seconds

# Replaces one function: before or after its call, the process sends a signal to itself and continues.
HARNESS = """
import importlib, os, signal, sys
module, _, path = os.environ.pop("STEP").partition(":")
*parents, name = path.split(".")
number, after = getattr(signal, os.environ.pop("SIGNAL")), os.environ.pop("WHEN") == "after"
holder = importlib.import_module(module)
for parent in parents:
    holder = getattr(holder, parent)
found = holder.__dict__[name]
function = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
def signalled(*arguments, **named):
    if after:
        result = function(*arguments, **named)
    print("signal", flush=True)
    os.kill(os.getpid(), number)
    return result if after else function(*arguments, **named)
setattr(holder, name, classmethod(signalled) if isinstance(found, classmethod) else signalled)
"""

COMMON = [
    "thrave.config:load_settings",
    "thrave.logs:configure_logs",
    "thrave.components:restrict_access",
    "thrave.components:migrate",
    "thrave.vault:Vault.open_or_create",
    "thrave.identity.certificates:ServiceIdentity.open",
]
LISTENING = ["thrave.http_server:_listen", "thrave.server:create_app", "thrave.http_server:HttpServer.serve"]
AGENT = [
    "thrave.tasks.hosts:HostRegistry.acquire_lease",
    "thrave.tasks.engine:TaskWorker.launch",
    "thrave.agent:Agent._start_housekeeping",
]
STEPS = {
    "serve": [
        *COMMON,
        *LISTENING,
        *AGENT,
        "thrave.server:lock_data_directory",
        "thrave.tasks.engine:TaskQueue.__init__",
    ],
    "api": [*COMMON, *LISTENING],
    "agent": [*COMMON, *AGENT],
}


def start(command, data, environment):
    options = ["--host-id", "kvm-1"] if command == "agent" else ["--listen-port", "0"]
    words = [command, "--data-dir", data, *options]
    return run_thrave(words, {**os.environ, **environment}, before=HARNESS)


@pytest.mark.parametrize(
    ("step", "when"),
    [
        *((step, "before") for step in STEPS["serve"]),
        *(
            pytest.param(step, "after", marks=pytest.mark.sweep)
            for step in STEPS["serve"]
            if step != "thrave.http_server:HttpServer.serve"
        ),
    ],
)
def test_sigterm_ends_serve_at_each_step_of_start(tmp_path, step, when):
    ended = start("serve", tmp_path / "data", {"STEP": step, "SIGNAL": "SIGTERM", "WHEN": when})
    assert (ended.returncode, "signal" in ended.stdout, "listening" in ended.stdout) == (0, True, False), ended.stderr
    assert "Traceback" not in ended.stderr
    with ForkedServer.running(tmp_path / "data"):
        pass


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
@pytest.mark.parametrize("step", ["thrave.components:migrate", "thrave.tasks.engine:TaskWorker.launch"])
def test_sigint_and_sighup_end_serve_during_start(tmp_path, name, step):
    ended = start("serve", tmp_path / "data", {"STEP": step, "SIGNAL": name, "WHEN": "before"})
    assert (ended.returncode, "listening" in ended.stdout) == (0, False), ended.stderr


@pytest.mark.postgres
@pytest.mark.parametrize("command", ["api", "agent"])
def test_sigterm_ends_fleet_processes_at_each_step_of_start(tmp_path, postgres, command):
    url = postgres.new_database()
    components = open_components(Settings(data_dir=tmp_path / "begun", database_url=url))
    components.database.dispose()
    for step in STEPS[command]:
        data = tmp_path / "begun"
        environment = {"STEP": step, "SIGNAL": "SIGTERM", "WHEN": "before", "THRAVE_DATABASE_URL": url}
        if step == "thrave.vault:Vault.open_or_create":
            data, environment["THRAVE_DATABASE_URL"] = tmp_path / "new", postgres.new_database()
        ended = start(command, data, environment)
        assert (ended.returncode, ended.stdout) == (0, "signal\n"), (step, ended.stderr)


def test_sighup_ends_running_service(tmp_path):
    server = ThraveServer(DataDirectory(tmp_path / "data"))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, and the service inherits that
    try:
        server.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    server.stop(signal.SIGHUP)
    assert server.process.returncode == 0
