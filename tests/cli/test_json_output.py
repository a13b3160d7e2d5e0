"""The documented fields of `--output json`. The fixture `thrave_json` compares every document that it returns."""

import click
import pytest

from support.json_fields import COMMANDS, find_differences
from thrave.cli.main import thrave as command_group


def find_json_commands(command, name=""):
    """Yield the name of each command that has the option `--output`."""
    context = click.Context(command)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            yield from find_json_commands(command.get_command(context, child), f"{name} {child}".strip())
    elif any("--output" in parameter.opts for parameter in command.params):
        yield name


def test_documentation_has_each_command_with_json_output():
    assert sorted(COMMANDS) == sorted(find_json_commands(command_group))


def test_error_has_documented_fields(thrave_error, tmp_path):
    error = thrave_error("show", tmp_path / "none.manifest.xml")
    assert (error["code"], error["exitCode"], error["remedy"]) == ("NOT_FOUND", 3, "Check the path.")
    assert error["message"] == f"{tmp_path / 'none.manifest.xml'} does not exist"
    assert thrave_error("account", "crate")["code"] == "USAGE"
    assert thrave_error("serve", "--prot", "1")["remedy"] == "See `thrave serve --help`."


TASK_ID = {"host": "a", "lost": "b"}


@pytest.mark.parametrize(
    ("document", "differences"),
    [
        ({**TASK_ID, "bundleIds": []}, []),
        ({**TASK_ID, "bundleIds": ["bun-1"]}, []),
        ({**TASK_ID, "bundleIds": None}, []),
        (TASK_ID, ["bundleIds[]: missing"]),
        ({**TASK_ID, "bundleIds": [], "new": None}, ["new: not documented"]),
        ({**TASK_ID, "bundleIds": [{"id": 1}]}, ["bundleIds[].id: not documented", "bundleIds[]: missing"]),
    ],
)
def test_find_differences_compares_fields(document, differences):
    assert find_differences("host adopt", document) == differences


def test_account_commands_print_documented_fields(thrave_json, tmp_path):
    data = ("--data-dir", tmp_path / "data")
    account = thrave_json("account", "create", "alice", "--new-certificate", tmp_path, *data)["accountId"]
    key = thrave_json("account", "key", "create", account, *data)["accessKeyId"]
    thrave_json("account", "key", "delete", "--yes", key, *data)
    credentials = tmp_path / "credentials"
    credentials.write_text(
        "[default]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = secret-secret\n"
    )
    credentials.chmod(0o600)
    thrave_json("account", "key", "import", account, "--credentials", credentials, *data)
    thrave_json("account", "list", *data)


def test_host_files_commands_print_documented_fields(thrave_json, tmp_path):
    thrave_json("host-files", "install", "--root", tmp_path, "--program", "/opt/thrave/bin/thrave")
    thrave_json("host-files", "remove", "--root", tmp_path)


def test_user_commands_print_documented_fields(thrave_json, tmp_path):
    data = ("--data-dir", tmp_path / "data")
    account = thrave_json("account", "create", "alice", *data)["accountId"]
    policy = tmp_path / "policy.json"
    policy.write_text('{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}')
    thrave_json("account", "user", "create", account, "bob", *data)
    thrave_json("account", "user", "policy", "put", account, "bob", "all", policy, *data)
    thrave_json("account", "user", "policy", "list", account, "bob", *data)
    thrave_json("account", "user", "policy", "show", account, "bob", "all", *data)
    key = thrave_json("account", "user", "key", "create", account, "bob", *data)["accessKeyId"]
    thrave_json("account", "user", "list", account, *data)
    thrave_json("account", "user", "key", "delete", "--yes", key, *data)
    thrave_json("account", "user", "policy", "delete", "--yes", account, "bob", "all", *data)
    thrave_json("account", "user", "delete", "--yes", account, "bob", *data)


def test_instance_commands_print_documented_fields(thrave_json, tmp_path, disk):
    data = ("--data-dir", tmp_path / "data")
    account = thrave_json("account", "create", "alice", *data)["accountId"]
    words = (
        "--account",
        account,
        "--platform",
        "windows",
        "--root-volume",
        disk,
        "--tag",
        "Name=web",
        "--volume",
        disk,
    )
    instance = thrave_json("instance", "add", *words, "--stop-command", "true", "--start-command", "true", *data)
    for command in ("stop", "start", "show"):
        thrave_json("instance", command, instance["instanceId"], *data)
    thrave_json("instance", "list", *data)
    thrave_json("instance", "remove", "--yes", instance["instanceId"], *data)


def test_commands_without_objects_print_documented_fields(thrave_json, tmp_path):
    data = ("--data-dir", tmp_path / "data")
    thrave_json("account", "create", "alice", *data)
    for words in (["task", "list"], ["task", "watch"], ["host", "list"], ["instance", "list"]):
        thrave_json(*words, *data)
    thrave_json("demo-disk", tmp_path / "disk.raw")
