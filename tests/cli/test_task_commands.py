"""`thrave task` next to a running server."""

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress

import pytest

from support.disks.raw_disk import make_disk
from support.eventually import eventually
from support.service.forked_server import ForkedServer
from thrave.components import open_components
from thrave.compute.instance import InstanceState
from thrave.config import load_settings
from thrave.tasks.errors import TaskFailure
from thrave.tasks.models import BundleRequest

FAILED, USAGE, NOT_FOUND, REFUSED, TASK_FAILED, TASK_CANCELLED = 1, 2, 3, 4, 20, 21
MIB = 1 << 20
NO_SUCH_TASK = "bun-0123456789abcdef0"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ForkedServer.running(tmp_path_factory.mktemp("server") / "thrave", worker_concurrency=2) as server:
        yield server


@pytest.fixture(scope="module")
def alice(server):
    return server.account("alice")


@pytest.fixture(autouse=True)
def data(server, monkeypatch):
    """Sets the data directory of every command of this module."""
    monkeypatch.setenv("THRAVE_DATA_DIR", str(server.data.root))


@pytest.fixture
def bundled(server, alice, tmp_path):
    """Returns a function that bundles a new instance with a disk of a size in MiB, and returns task and instance id."""
    account, key = alice

    def bundle(size, bucket="alices-bucket"):
        instance = server.instance(account.account_id, make_disk(tmp_path / f"{size}.raw", size * MIB))
        storage = server.storage(key, bucket, instance.instance_id)
        task = server.client(key).bundle_instance(InstanceId=instance.instance_id, Storage=storage)
        return task["BundleTask"]["BundleId"], instance.instance_id

    return bundle


@pytest.fixture
def show(thrave_json):
    return lambda bundle_id: thrave_json("task", "show", bundle_id)


@pytest.fixture
def complete(bundled, thrave):
    bundle_id, _ = bundled(30)
    assert thrave("task", "watch", bundle_id)[0] == 0
    return bundle_id


@pytest.fixture
def failed(server, alice, tmp_path):
    """A task whose root volume no longer exists when the instance is stopped."""
    account, key = alice
    disk = make_disk(tmp_path / "gone.raw", MIB)
    instance = server.instance(account.account_id, disk, stop_command=("rm", "-f", str(disk)))
    task = server.client(key).bundle_instance(
        InstanceId=instance.instance_id, Storage=server.storage(key, "alices-bucket", instance.instance_id)
    )
    return task["BundleTask"]["BundleId"]


def test_task_list_shows_stored_parts_of_complete_task(thrave, thrave_json, server, complete):
    (task,) = [task for task in thrave_json("task", "list")["tasks"] if task["bundleId"] == complete]
    files = [*(server.data.buckets / "alices-bucket").glob(f"{task['instanceId']}*")]
    assert (task["state"], task["error"], task["orphanedObjects"], task["runs"]) == ("complete", None, 0, 1)
    assert task["storedSize"] == sum(file.stat().st_size for file in files)
    assert task["storedParts"] == len(files) - 2
    assert task["volumeSize"] == 30 * MIB
    header, *rows = thrave("task", "list")[1].splitlines()
    assert header.split() == ["TASK", "STATE", "PROGRESS", "INSTANCE", "HOST", "AGE", "STORED", "ERROR/WARNING"]
    assert any(row.startswith(f"{complete}  complete ") for row in rows)


def test_task_show_prints_duration_of_each_state(thrave, show, complete):
    story = show(complete)
    changes = [event for event in story["history"] if event["message"] is None]
    assert [event["state"] for event in changes] == [
        "pending", "waiting-for-shutdown", "bundling", "storing", "complete"
    ]  # fmt: skip
    *lasted, end = [event["seconds"] for event in changes]
    assert all(seconds >= 0 for seconds in lasted)
    assert end is None
    assert story["bytesPerSecond"] > 0
    assert (story["volumeDone"], story["runAfterTask"], story["remedy"]) == (30 * MIB, True, None)
    text = thrave("task", "show", complete)[1]
    assert "30.0 MiB of 30.0 MiB read" in text
    assert "which was running" in text


def test_task_show_prints_reason_and_remedy_of_failed_task(thrave, show, failed):
    status, _, stderr = thrave("task", "watch", failed)
    assert status == TASK_FAILED
    assert stderr.splitlines()[-1].endswith("failed Server.VolumeError")
    story = show(failed)
    assert story["error"]["code"] == "Server.VolumeError"
    assert story["remedy"].startswith("Find out who started the instance or uses its disk. Check the image file")
    status, text, _ = thrave("task", "show", failed)
    assert status == 0
    assert "What to do: Find out who started the instance" in text
    assert "The bucket contains no object of this task." in text


def test_task_cancel_cancels_and_undoes_task(thrave, thrave_json, server, bundled, show):
    bundle_id, instance_id = bundled(400)
    eventually(lambda: show(bundle_id)["storedParts"])
    assert thrave_json("task", "cancel", bundle_id)["tasks"][0]["state"] in {"cancelling", "failed"}
    status, text, _ = thrave("task", "watch", bundle_id)
    assert status == TASK_CANCELLED
    assert "Client.Cancelled" in text
    story = show(bundle_id)
    assert "An operator cancelled the task." in [event["message"] for event in story["history"]]
    assert (story["storedSize"], story["orphanedObjects"]) == (0, 0)
    assert server.instances.state(instance_id) is InstanceState.RUNNING
    status, stdout, stderr = thrave("task", "cancel", bundle_id)
    assert (status, stdout.strip()) == (REFUSED, "")
    assert stderr == (
        f"thrave: {bundle_id}: Can't cancel bundle task when the bundle task is failed. `thrave task list "
        "--unfinished` lists the tasks that can be cancelled.\n"
    )


def test_task_cancel_continues_after_unknown_task(thrave, bundled, show):
    bundle_id, _ = bundled(400)
    status, stdout, stderr = thrave("task", "cancel", NO_SUCH_TASK, bundle_id)
    assert status == NOT_FOUND
    assert stdout.startswith(bundle_id)
    assert stderr == (
        f"thrave: {NO_SUCH_TASK}: The bundle task ID '{NO_SUCH_TASK}' does not exist. "
        "`thrave task list` lists the tasks.\n"
    )
    assert thrave("task", "watch", bundle_id)[0] == TASK_CANCELLED


def test_task_show_lists_orphaned_objects(thrave, server, bundled, show):
    bundle_id, _ = bundled(400, bucket="lost-bucket")
    eventually(lambda: show(bundle_id)["storedParts"])
    bucket, elsewhere = server.data.buckets / "lost-bucket", server.data.buckets.parent / "elsewhere"
    bucket.rename(elsewhere)
    bucket.symlink_to(elsewhere)  # the service does not follow links
    assert thrave("task", "watch", bundle_id)[0] == TASK_FAILED
    story = show(bundle_id)
    assert {part.name for part in elsewhere.glob("*.part.*")} <= set(story["orphanedKeys"])
    assert story["orphanedObjects"] == len(story["orphanedKeys"]) > 0
    text = thrave("task", "show", bundle_id)[1]
    assert f"Not removed from the bucket lost-bucket: {story['orphanedObjects']} objects of this task\n" in text
    assert "aws s3api delete-object --bucket lost-bucket --key KEY" in text
    assert f"Client.S3Error, {story['orphanedObjects']} orphaned objects" in thrave("task", "list")[1]


def test_task_watch_without_terminal_writes_lines(thrave, bundled):
    bundle_id, instance_id = bundled(200)
    status, stdout, stderr = thrave("task", "watch", "--output", "json")
    assert status == 0
    assert [task["bundleId"] for task in json.loads(stdout)["tasks"]] == [bundle_id]
    lines = stderr.splitlines()
    assert all(line.startswith(f"{bundle_id} {instance_id} ") for line in lines)
    assert len(lines) == len(set(lines))
    assert " complete " in lines[-1]


def test_task_watch_draws_bars_on_terminal(server, bundled):
    bundle_id, instance_id = bundled(200)
    status, drawn = on_a_terminal("task", "watch", bundle_id)
    assert status == 0
    assert f"{bundle_id} {instance_id}" in drawn
    assert "━" in drawn
    assert drawn.rstrip().splitlines()[-1].startswith(f"{bundle_id}  complete")


def on_a_terminal(*words):
    """Run a command on a new terminal; return exit code and output."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    command = subprocess.Popen(
        [sys.executable, "-m", "thrave", *words], stdin=slave, stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    drawn = b""
    with suppress(OSError):  # EIO: the command has closed the terminal
        while piece := os.read(master, 65536):
            drawn += piece
    os.close(master)
    return command.wait(), drawn.decode()


def test_task_watch_without_unfinished_task_ends(thrave):
    status, stdout, stderr = thrave("task", "watch")
    assert (status, len(stdout.splitlines()), stderr) == (0, 1, "There are no unfinished tasks to watch.\n")


def test_task_watch_returns_worst_exit_code(thrave, complete, failed):
    assert thrave("task", "watch", complete, failed)[0] == TASK_FAILED


def test_task_commands_print_no_secret(thrave, alice, server, bundled):
    bundle_id, _ = bundled(30)
    _, key = alice
    storage = server.storage(key, "alices-bucket", "other")["S3"]
    said = [
        thrave("task", *words)[1] for words in (["list", "--output", "json"], ["show", bundle_id, "--output", "json"])
    ]
    thrave("task", "watch", bundle_id)
    for secret in (key.secret_access_key, storage["UploadPolicySignature"], "ec2-bundle-read"):
        assert not any(secret in text for text in said)


@pytest.mark.parametrize("words", [["list"], ["show", "bun-1"], ["watch", "bun-1"]])
def test_task_commands_escape_control_characters(thrave, tmp_path, monkeypatch, words):
    monkeypatch.setenv("THRAVE_DATA_DIR", str(tmp_path / "data"))
    components = open_components(load_settings(None))
    request = BundleRequest(
        account_id="1" * 12, owner_id="1" * 12, instance_id="i-1", bucket="b\x1b[2J", prefix="p\x1b[2J",
        access_key_id="AKIA", upload_policy="policy", upload_policy_signature="signature",
    )  # fmt: skip
    with components.database.begin() as connection:
        components.records().add(connection, "bun-1", "localhost", request)
    components.records().add_warning("bun-1", "notice\x1b[2J")
    components.records().fail("bun-1", TaskFailure("Client.S3Error", "no\x1b]0;title\x07\nno"))
    components.database.dispose()
    _, stdout, stderr = thrave("task", *words)
    assert "bun-1" in stdout
    assert "\x1b" not in stdout + stderr


def test_task_is_found_by_start_of_id_and_keeps_its_account(thrave, thrave_json, tmp_path, monkeypatch):
    monkeypatch.setenv("THRAVE_DATA_DIR", str(tmp_path / "data"))
    components = open_components(load_settings(None))
    account, _ = components.accounts.create("dora")
    for bundle_id in ("bun-0123a", "bun-0123b"):
        request = BundleRequest(
            account_id=account.account_id, owner_id=account.account_id, instance_id=f"i-{bundle_id}", bucket="b",
            prefix=bundle_id, access_key_id="AKIA", upload_policy="policy", upload_policy_signature="signature",
        )  # fmt: skip
        with components.database.begin() as connection:
            components.records().add(connection, bundle_id, "localhost", request)
    components.database.dispose()
    assert thrave_json("task", "show", "bun-0123a")["bundleId"] == "bun-0123a"
    status, _, stderr = thrave("task", "show", "bun-0123")
    assert (status, "'bun-0123' is ambiguous: bun-0123a, bun-0123b." in stderr) == (USAGE, True)
    assert thrave("task", "show", "bun-_1")[0] == NOT_FOUND
    status, _, stderr = thrave("account", "delete", "--yes", "dora")
    assert (status, "in use by task bun-0123" in stderr) == (REFUSED, True)
    listed = thrave_json("task", "list", "--account", "dora", "--instance", "i-bun-0123a")["tasks"]
    assert [task["bundleId"] for task in listed] == ["bun-0123a"]


@pytest.mark.parametrize("words", [["show"], ["watch"], ["cancel"]])
def test_unknown_task_has_exit_code(thrave, words):
    status, stdout, stderr = thrave("task", *words, NO_SUCH_TASK)
    assert (status, stdout.strip()) == (NOT_FOUND, "")
    assert f"'{NO_SUCH_TASK}' does not exist" in stderr


@pytest.mark.parametrize(
    "words",
    [
        ["list", "--state", "done"], ["list", "--since", "yesterday"], ["list", "--limit", "0"], ["cancel"], ["show"],
        ["list", "--data-dir", "no-such-folder"],
    ],
)  # fmt: skip
def test_task_commands_reject_wrong_command_line(thrave, words):
    status, stdout, stderr = thrave("task", *words)
    assert (status, stdout) == (USAGE, "")
    assert "Traceback" not in stderr


@pytest.mark.parametrize("words", [[], ["list"], ["show"], ["watch"], ["cancel"]])
def test_task_help_has_example(thrave, words):
    _, stdout, _ = thrave("task", *words, "--help")
    assert any(line.startswith("    thrave task ") for line in stdout.splitlines())
