"""`thrave host` on SQLite and PostgreSQL."""

import json
from datetime import timedelta

import pytest

from thrave.components import open_components
from thrave.concurrency import utc_now
from thrave.config import load_settings
from thrave.database import host as host_table
from thrave.tasks.models import BundleRequest, BundleTaskState

USAGE, NOT_FOUND, REFUSED = 2, 3, 4


@pytest.fixture
def settings(database, tmp_path, monkeypatch):
    """Sets the settings of every command of this module in the environment."""
    monkeypatch.setenv("THRAVE_DATA_DIR", str(tmp_path / "data"))
    for name, value in database.items():
        monkeypatch.setenv(f"THRAVE_{name.upper()}", value)
    return load_settings(None)


@pytest.fixture
def components(settings):
    components = open_components(settings)
    yield components
    components.queues.close()
    components.database.dispose()


@pytest.fixture
def silence(components):
    """Returns a function that sets the age of a host's last heartbeat, in seconds."""

    def silence(name, seconds):
        mine = host_table.update().where(host_table.c.host == name)
        with components.database.begin() as connection:
            connection.execute(mine.values(heartbeat_time=utc_now() - timedelta(seconds=seconds)))

    return silence


@pytest.fixture
def task(components):
    """Returns a function that adds a task to a host."""

    def add(bundle_id, name, *, begun=False):
        request = BundleRequest(
            account_id="1" * 12, owner_id="1" * 12, instance_id=f"i-{bundle_id}", bucket="bucket", prefix=bundle_id,
            access_key_id="AKIA", upload_policy="policy", upload_policy_signature="signature",
        )  # fmt: skip
        with components.database.begin() as connection:
            components.records().add(connection, bundle_id, name, request)
            components.queues.enqueue(connection, bundle_id, name)
        if begun:
            components.records().start_run(bundle_id)
            components.records().change_state(bundle_id, BundleTaskState.WAITING_FOR_SHUTDOWN)

    return add


@pytest.fixture
def two(components, task, silence):
    """Two hosts: kvm-1 with two tasks and a heartbeat two minutes ago, kvm-2 with a heartbeat now."""
    components.hosts.acquire_lease("kvm-1", worker_concurrency=2)
    components.hosts.acquire_lease("kvm-2", worker_concurrency=3)
    task("bun-1", "kvm-1", begun=True)
    task("bun-2", "kvm-1")
    silence("kvm-1", 120)


def test_host_list_shows_tasks_and_heartbeats(two, thrave, thrave_json):
    first, second = thrave_json("host", "list")["hosts"]
    assert [first[name] for name in ("host", "state", "lost", "tasksBegun", "tasksWaiting", "workerConcurrency")] == [
        "kvm-1", "active", True, 1, 1, 2
    ]  # fmt: skip
    assert (second["host"], second["lost"], second["tasksBegun"]) == ("kvm-2", False, 0)
    header, first, second = thrave("host", "list")[1].splitlines()
    assert header.split("  ")[0] == "HOST"
    assert first.startswith("kvm-1  active, lost  2 min ago ")
    assert second.startswith("kvm-2  active ")


def test_host_show_lists_unfinished_tasks(two, components, task, thrave, thrave_json):
    task("bun-3", "kvm-1")
    components.records().cancel("bun-3")
    assert {task["bundleId"] for task in thrave_json("host", "show", "kvm-1")["tasks"]} == {"bun-1", "bun-2"}
    text = thrave("host", "show", "kvm-1")[1]
    assert "1 running, 1 waiting; at most 2 at once" in text
    assert "bun-1  waiting-for-shutdown" in text
    assert "TASK" not in thrave("host", "show", "kvm-2")[1]


def test_host_adopt_moves_tasks_of_lost_host(two, thrave_json):
    assert thrave_json("host", "adopt", "kvm-1", "--by", "kvm-2") == {
        "host": "kvm-2", "lost": "kvm-1", "bundleIds": ["bun-1", "bun-2"]
    }  # fmt: skip
    first, second = thrave_json("host", "list")["hosts"]
    assert (first["state"], first["lost"], first["tasksBegun"], second["tasksBegun"]) == ("fenced", False, 0, 1)
    history = thrave_json("task", "show", "bun-1")["history"]
    assert history[-1]["message"] == "Host kvm-2 continues the task of host kvm-1."


def test_host_retire_fails_unfinished_tasks(two, thrave, thrave_json):
    status, text, _ = thrave("host", "retire", "--yes", "kvm-1")
    assert (status, text.splitlines()) == (0, ["kvm-1 is retired; tasks: 2", "bun-1", "bun-2"])
    assert [host["host"] for host in thrave_json("host", "list")["hosts"]] == ["kvm-2"]
    assert thrave_json("task", "show", "bun-1")["error"]["code"] == "Server.HostLost"


def test_host_activate_ends_drain(two, thrave, thrave_json):
    for command, state in (("drain", "draining"), ("activate", "active")):
        assert thrave("host", command, "kvm-2")[1] == f"kvm-2 is {state}\n"
        assert thrave_json("host", "show", "kvm-2")["state"] == state


def test_host_commands_refuse_wrong_state(two, thrave):
    thrave("host", "adopt", "kvm-1", "--by", "kvm-2")
    for command in ("drain", "activate"):
        status, stdout, stderr = thrave("host", command, "kvm-1")
        assert (status, stdout) == (REFUSED, "")
        assert stderr.startswith("thrave: Host kvm-1 is fenced: another host has adopted its tasks.")
    assert thrave("host", "adopt", "kvm-2", "--by", "kvm-2")[0] == REFUSED


@pytest.mark.parametrize("words", [["adopt", "kvm-2", "--by", "kvm-3"], ["retire", "kvm-2", "--yes"]])
def test_host_adopt_and_retire_refuse_host_with_heartbeat(two, components, thrave, words):
    components.hosts.acquire_lease("kvm-3", worker_concurrency=1)
    status, stdout, stderr = thrave("host", *words)
    assert (status, stdout) == (REFUSED, "")
    assert stderr.startswith("thrave: Host kvm-2 sent a heartbeat ")
    assert thrave("host", *words, "--powered-off")[0] == 0


@pytest.mark.parametrize(
    "words",
    [
        ["show", "kvm-9"],
        ["drain", "kvm-9"],
        ["activate", "kvm-9"],
        ["retire", "kvm-9"],
        ["adopt", "kvm-1", "--by", "kvm-9"],
    ],
)
def test_unknown_host_has_exit_code(two, thrave, words):
    status, stdout, stderr = thrave("host", *words)
    assert (status, stdout, stderr) == (
        NOT_FOUND,
        "",
        "thrave: There is no host kvm-9. `thrave host list` lists the hosts.\n",
    )


@pytest.mark.parametrize("words", [["list", "--data-dir", "no-such-folder"], ["show"], ["adopt", "kvm-1"]])
def test_host_commands_reject_wrong_command_line(settings, thrave, words):
    status, stdout, stderr = thrave("host", *words)
    assert (status, stdout) == (USAGE, "")
    assert "Traceback" not in stderr


def test_host_list_reads_database_url_from_config_file(two, thrave, settings, monkeypatch, tmp_path):
    monkeypatch.delenv("THRAVE_DATA_DIR")
    monkeypatch.delenv("THRAVE_DATABASE_URL", raising=False)
    file = tmp_path / "thrave.toml"
    url = f"database_url = {json.dumps(settings.database)}\n" if settings.database_url else ""
    file.write_text(f"data_dir = {json.dumps(str(settings.data_dir))}\n{url}")
    status, stdout, _ = thrave("host", "list", "--config", file, "--output", "json")
    assert (status, len(json.loads(stdout)["hosts"])) == (0, 2)


@pytest.mark.parametrize("words", [[], ["list"], ["show"], ["drain"], ["activate"], ["adopt"], ["retire"]])
def test_host_help_has_example(thrave, words):
    _, stdout, _ = thrave("host", *words, "--help")
    assert any(line.startswith("    thrave host ") for line in stdout.splitlines())
