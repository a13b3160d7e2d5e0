"""The events of tasks and of the service in the log."""

import ast
import json
import re
from collections import deque
from importlib.metadata import version
from pathlib import Path

import pytest
import structlog

import thrave
from support.disks.raw_disk import make_disk
from support.eventually import eventually
from support.service.bundle_tasks import await_task
from support.service.forked_server import ForkedServer
from thrave.log_events import CONTEXT_FIELDS, EVENTS, log_event
from thrave.tasks.errors import ERROR_CODES

MIB = 1 << 20
SOURCE = Path(thrave.__file__).parent


def logged_events():
    """Yield the name, fields and place of each call of log_event in the source."""
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "log_event(" in text else ():
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "log_event":
                fields = {keyword.arg for keyword in node.keywords} - {None}
                yield ast.literal_eval(node.args[0]), fields, f"{path.name}:{node.lineno}"


def test_each_event_is_in_the_table_with_its_fields():
    unknown = [
        (place, fields - {*EVENTS[name].fields})
        for name, fields, place in logged_events()
        if not fields <= {*EVENTS[name].fields}
    ]
    assert unknown == []


def test_each_row_of_the_table_is_logged():
    assert {name for name, _, _ in logged_events()} == {*EVENTS}


def test_log_event_writes_nothing_without_a_log(capsys):
    structlog.reset_defaults()  # another test in this process may have captured the log
    log_event("task cancelled", bundle_id="bun-1")
    assert capsys.readouterr() == ("", "")


class LoggedServer(ForkedServer):
    """A server whose log lines are kept."""

    def __post_init__(self):
        self._log = deque()

    def lines(self):
        """Return the log lines so far."""
        return [json.loads(line) for line in [*self._log] if line.startswith("{")]

    def text(self):
        return "".join([*self._log])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with LoggedServer.running(tmp_path_factory.mktemp("log") / "data", log_format="json") as server:
        yield server


@pytest.fixture(scope="module")
def alice(server):
    return server.account("alice")


@pytest.fixture
def task_lines(server, alice, tmp_path):
    """Run a task to its end; return the caller's key and the log lines about the task."""
    account, key = alice
    ec2 = server.client(key)

    def run(size=MIB, *, cancel=False, **details):
        instance = server.instance(account.account_id, make_disk(tmp_path / "root.raw", size), **details)
        storage = server.storage(key, "alices-bucket", f"image-{instance.instance_id}")
        bundle_id = ec2.bundle_instance(InstanceId=instance.instance_id, Storage=storage)["BundleTask"]["BundleId"]
        if cancel:
            ec2.cancel_bundle_task(BundleId=bundle_id)
        await_task(ec2, bundle_id)

        def lines():
            return [line for line in server.lines() if line.get("bundle_id") == bundle_id]

        last = {"task completed", "task failed"}
        eventually(lines, "the end is logged", until=lambda found: {line["event"] for line in found} & last)
        return key, lines()

    yield run
    ec2.close()


def test_log_has_each_event_of_a_complete_task(server, task_lines, machine):
    key, lines = task_lines(**machine.commands)
    by_event = {line["event"]: line for line in lines}
    assert [line["event"] for line in lines if line["event"] in EVENTS and "state" not in line] == [
        "task accepted", "task run started", "instance off", "instance returned", "task completed",
    ]  # fmt: skip
    assert [line["state"] for line in lines if line["event"] == "task state changed"] == [
        "waiting-for-shutdown", "bundling", "storing", "complete",
    ]  # fmt: skip
    accepted = by_event["task accepted"]
    assert (accepted["access_key_id"], accepted["remote"]) == (key.access_key_id, "127.0.0.1")
    assert re.fullmatch("[0-9a-f-]{36}", accepted["request_id"])
    completed = by_event["task completed"]
    assert (completed["volume_bytes"], completed["downtime"]) == (MIB, by_event["instance returned"]["downtime"])
    assert completed["stored_bytes"] > 0
    assert {line["account_id"] for line in lines} == {key.account_id}
    assert {line["instance_id"] for line in lines} == {accepted["instance_id"]}
    for line in lines:
        if line["event"] in EVENTS:
            known = {*EVENTS[line["event"]].fields, *CONTEXT_FIELDS, "event", "level", "timestamp"}
            assert {*line} <= known, line
    assert key.secret_access_key not in server.text()


def test_log_says_who_cancelled_a_task_and_what_to_do(task_lines, machine):
    machine.ignore_power_button()
    key, lines = task_lines(cancel=True, **machine.commands)
    by_event = {line["event"]: line for line in lines}
    cancelled, failed = by_event["task cancelled"], by_event["task failed"]
    assert (cancelled["access_key_id"], cancelled["remote"]) == (key.access_key_id, "127.0.0.1")
    assert cancelled["request_id"] != by_event["task accepted"]["request_id"]
    assert (failed["level"], failed["code"]) == ("warning", "Client.Cancelled")
    assert failed["remedy"] == ERROR_CODES["Client.Cancelled"].remedy


def test_log_of_a_start_names_version_data_and_address(server):
    (started,) = [line for line in server.lines() if line["event"] == "service started"]
    assert started["address"] == server.url
    assert started["data_dir"] == str(server.data.root)
    assert started["version"] == version("thrave")
    assert (started["process"], started["store"], started["hypervisor"]) == ("serve", "directory", "directory")
