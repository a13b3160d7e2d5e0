"""`thrave account user`: users, policies and access keys."""

import io
import json
import sys

import pytest

NOT_FOUND, REFUSED, USAGE, FAILED = 3, 4, 2, 1
READ_ONLY = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "ec2:Describe*", "Resource": "*"}]}


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """Sets the data directory of every command of this module."""
    monkeypatch.setenv("THRAVE_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def acme(thrave_json):
    """The id of an account."""
    return thrave_json("account", "create", "acme")["accountId"]


@pytest.fixture
def policy_file(tmp_path):
    """A file with a policy."""
    path = tmp_path / "read-only.json"
    path.write_text(json.dumps(READ_ONLY, indent=2))
    return path


@pytest.fixture
def users(thrave_json, acme):
    """Lists the users of the account."""
    return lambda: thrave_json("account", "user", "list", acme)["users"]


def test_user_create_list_and_delete(thrave_json, acme, users):
    created = thrave_json("account", "user", "create", acme, "bob")
    assert created["arn"] == f"arn:aws:iam::{acme}:user/bob"
    (listed,) = users()
    assert (listed["userId"], listed["policies"], listed["accessKeys"]) == (created["userId"], [], [])
    thrave_json("account", "user", "delete", "--yes", acme, "bob")
    assert users() == []


def test_policy_put_list_show_and_delete(thrave, thrave_json, acme, users, policy_file):
    thrave_json("account", "user", "create", acme, "bob")
    thrave_json("account", "user", "policy", "put", acme, "bob", "read-only", policy_file)
    assert users()[0]["policies"] == ["read-only"]
    assert thrave_json("account", "user", "policy", "list", acme, "bob")["policyNames"] == ["read-only"]
    assert thrave_json("account", "user", "policy", "show", acme, "bob", "read-only")["policyDocument"] == READ_ONLY
    assert thrave("account", "user", "policy", "show", acme, "bob", "read-only")[1] == policy_file.read_text() + "\n"
    thrave_json("account", "user", "policy", "delete", "--yes", acme, "bob", "read-only")
    assert users()[0]["policies"] == []


def test_policy_put_reads_stdin_and_byte_order_mark(thrave_json, acme, monkeypatch):
    thrave_json("account", "user", "create", acme, "bob")
    document = b"\xef\xbb\xbf" + json.dumps(READ_ONLY).replace(",", ",\r\n").encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(document)))
    thrave_json("account", "user", "policy", "put", acme, "bob", "read-only", "-")
    assert thrave_json("account", "user", "policy", "show", acme, "bob", "read-only")["policyDocument"] == READ_ONLY


def test_policy_put_warns_about_unknown_action(thrave, acme, policy_file):
    thrave("account", "user", "create", acme, "bob")
    actions = [
        "ec2:TerminateInstance",
        "EC2:terminateinstances",
        "ec2:Bundle?nstance",
        "ec2:Bundel*",
        "s3:Anything",
        "*",
    ]
    policy_file.write_text(json.dumps({"Statement": {"Effect": "Deny", "Action": actions, "Resource": "*"}}))
    status, _, stderr = thrave("account", "user", "policy", "put", acme, "bob", "read-only", policy_file)
    assert (status, stderr.count("\n")) == (0, 2)
    assert 'EC2 has no action "ec2:TerminateInstance"' in stderr
    assert 'EC2 has no action "ec2:Bundel*"' in stderr


def test_policy_put_refuses_unsupported_policy_in_one_line(thrave, thrave_json, acme, users, policy_file):
    thrave_json("account", "user", "create", acme, "bob")
    policy_file.write_text(
        policy_file.read_text().replace(
            '"Resource"', '"Condition": {"Bool": {"aws:ViaAWSService": "true"}}, "Resource"'
        )
    )
    status, stdout, stderr = thrave("account", "user", "policy", "put", acme, "bob", "read-only", policy_file)
    assert (status, stdout) == (FAILED, "")
    assert stderr.startswith(
        'thrave: Statement 1: The condition key "aws:ViaAWSService" is not known here; use ec2:Region,'
    )
    assert stderr.count("\n") == 1
    assert users()[0]["policies"] == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{", b"\x00", "{\U0001f33e".encode(), b'{"Statement": "\\ud800"}'])
def test_policy_put_refuses_invalid_json_in_one_line(thrave, thrave_json, acme, policy_file, content):
    thrave_json("account", "user", "create", acme, "bob")
    policy_file.write_bytes(content)
    status, stdout, stderr = thrave("account", "user", "policy", "put", acme, "bob", "read-only", policy_file)
    assert (status, stdout, stderr.count("\n")) == (FAILED, "", 1)


def test_user_key_create_prints_secret_once(thrave, thrave_json, acme, users):
    thrave_json("account", "user", "create", acme, "bob")
    made = thrave_json("account", "user", "key", "create", acme, "bob")
    assert set(made) == {"accountId", "userName", "accessKeyId", "secretAccessKey"}
    assert [key["accessKeyId"] for key in users()[0]["accessKeys"]] == [made["accessKeyId"]]
    (account,) = thrave_json("account", "list")["accounts"]
    assert made["accessKeyId"] not in [key["accessKeyId"] for key in account["accessKeys"]]
    for words in (["account", "user", "list", acme], ["account", "list"]):
        assert made["secretAccessKey"] not in thrave(*words, "--output", "json")[1]
    thrave_json("account", "user", "key", "create", acme, "bob")
    assert thrave("account", "user", "key", "create", acme, "bob")[0] == REFUSED
    thrave_json("account", "user", "key", "delete", "--yes", made["accessKeyId"])
    assert len(users()[0]["accessKeys"]) == 1


def test_user_commands_print_same_values_as_text(thrave, acme, policy_file):
    assert thrave("account", "user", "create", acme, "bob")[1] == f"created arn:aws:iam::{acme}:user/bob\n"
    assert (
        thrave("account", "user", "policy", "put", acme, "bob", "read-only", policy_file)[1]
        == "bob has the policy read-only\n"
    )
    assert thrave("account", "user", "policy", "list", acme, "bob")[1] == "read-only\n"
    _, stdout, _ = thrave("account", "user", "key", "create", acme, "bob")
    labels = [line.split(":")[0] for line in stdout.splitlines()[:4]]
    assert labels == ["Account", "User", "Access key", "Secret access key"]
    _, stdout, _ = thrave("account", "user", "list", acme)
    assert [line.split()[:2] for line in stdout.splitlines()] == [["USER", "POLICIES"], ["bob", "read-only"]]


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["create", "ACME", "alice"], REFUSED),
        (["create", "ACME", "ALICE"], REFUSED),
        (["create", "ACME", "a b"], FAILED),
        (["create", "123456789012", "bob"], NOT_FOUND),
        (["list", "123456789012"], NOT_FOUND),
        (["delete", "ACME", "bob"], NOT_FOUND),
        (["policy", "put", "ACME", "bob", "read-only", "READ_ONLY"], NOT_FOUND),
        (["policy", "put", "ACME", "alice", "a b", "READ_ONLY"], FAILED),
        (["policy", "put", "ACME", "alice", "read-only", "no-such-file"], USAGE),
        (["policy", "show", "ACME", "alice", "read-only"], NOT_FOUND),
        (["policy", "delete", "--yes", "ACME", "alice", "read-only"], NOT_FOUND),
        (["policy", "list", "ACME", "bob"], NOT_FOUND),
        (["key", "create", "ACME", "bob"], NOT_FOUND),
        (["key", "delete", "--yes", "AKIAIOSFODNN7EXAMPLE"], NOT_FOUND),
    ],
)
def test_user_commands_have_exit_code_without_traceback(thrave, acme, policy_file, words, status):
    thrave("account", "user", "create", acme, "alice")
    given = {"ACME": acme, "READ_ONLY": policy_file}
    got, stdout, stderr = thrave("account", "user", *(given.get(word, word) for word in words))
    assert (got, stdout) == (status, "")
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    "words",
    [
        [], ["create"], ["list"], ["delete"], ["policy"], ["policy", "put"], ["policy", "delete"], ["policy", "list"],
        ["policy", "show"], ["key"], ["key", "create"], ["key", "delete"],
    ],
)  # fmt: skip
def test_user_help_has_example(thrave, words):
    _, stdout, _ = thrave("account", "user", *words, "--help")
    assert any(line.startswith("    thrave account user ") for line in stdout.splitlines())
