"""`thrave account`: accounts, certificates and access keys."""

import io
import json
import sys

import pytest

from thrave.identity.certificates import load_certificate, load_private_key, new_certificate

FAILED, USAGE, NOT_FOUND, REFUSED = 1, 2, 3, 4


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """Sets the data directory of every command of this module."""
    monkeypatch.setenv("THRAVE_DATA_DIR", str(tmp_path / "data"))


def test_account_create_prints_secret_once(thrave, thrave_json):
    created = thrave_json("account", "create", "alice")
    assert set(created) == {"accountId", "name", "accessKeyId", "secretAccessKey"}
    status, stdout, _ = thrave("account", "list", "--output", "json")
    assert status == 0
    assert created["secretAccessKey"] not in stdout
    (listed,) = json.loads(stdout)["accounts"]
    assert (listed["accountId"], listed["name"]) == (created["accountId"], "alice")
    assert [key["accessKeyId"] for key in listed["accessKeys"]] == [created["accessKeyId"]]


def test_account_create_prints_same_values_as_text(thrave):
    _, stdout, _ = thrave("account", "create", "alice")
    assert [line.split(":")[0] for line in stdout.splitlines()[:4]] == [
        "Account", "Name", "Access key", "Secret access key",
    ]  # fmt: skip
    _, stdout, _ = thrave("account", "list")
    assert stdout.splitlines()[0].split("  ")[0] == "ACCOUNT"
    assert "alice" in stdout


def test_account_create_writes_certificate_and_key_and_stores_certificate_only(thrave_json, tmp_path):
    created = thrave_json("account", "create", "alice", "--new-certificate", tmp_path / "keys")
    certificate, private_key = sorted((tmp_path / "keys").iterdir())
    assert [created["certificateFile"], created["privateKeyFile"]] == [str(certificate), str(private_key)]
    assert (certificate.name[:5], private_key.name[:3]) == ("cert-", "pk-")
    assert private_key.stat().st_mode & 0o777 == 0o600
    key = load_private_key(private_key.read_bytes())
    assert load_certificate(certificate.read_bytes()).public_key() == key.public_key()
    (listed,) = thrave_json("account", "list")["accounts"]
    assert listed["certificate"] == certificate.read_text()
    kept = b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert private_key.read_bytes().splitlines()[1] not in kept


def test_account_create_removes_certificate_files_after_failure(thrave, tmp_path):
    thrave("account", "create", "alice")
    status, _, stderr = thrave("account", "create", "alice", "--new-certificate", tmp_path / "keys")
    assert (status, "already exists" in stderr) == (REFUSED, True)
    assert [*(tmp_path / "keys").iterdir()] == []


def test_account_create_accepts_given_certificate(thrave_json, tmp_path):
    pem = new_certificate("alice")[0]
    (tmp_path / "cert.pem").write_text(pem)
    thrave_json("account", "create", "alice", "--certificate", tmp_path / "cert.pem")
    assert thrave_json("account", "list")["accounts"][0]["certificate"] == pem


def test_account_create_refuses_invalid_certificate_in_one_line(thrave, tmp_path):
    (tmp_path / "cert.pem").write_bytes(b"\xff\x00 nothing of the kind")
    status, stdout, stderr = thrave("account", "create", "alice", "--certificate", tmp_path / "cert.pem")
    assert (status, stdout) == (1, "")
    assert stderr.startswith("thrave: The certificate is not an X.509 certificate")
    assert stderr.count("\n") == 1


def test_key_create_allows_two_keys_and_delete_removes_one(thrave, thrave_json):
    created = thrave_json("account", "create", "alice")
    second = thrave_json("account", "key", "create", created["accountId"])
    assert second["secretAccessKey"] != created["secretAccessKey"]
    assert thrave("account", "key", "create", created["accountId"])[0] == REFUSED
    assert thrave_json("account", "key", "delete", "--yes", created["accessKeyId"]) == {
        "accessKeyId": created["accessKeyId"]
    }
    assert thrave("account", "key", "delete", "--yes", created["accessKeyId"])[0] == NOT_FOUND
    (listed,) = thrave_json("account", "list")["accounts"]
    assert [key["accessKeyId"] for key in listed["accessKeys"]] == [second["accessKeyId"]]


def test_key_import_requires_private_file(thrave, thrave_json, tmp_path):
    created = thrave_json("account", "create", "alice")
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = AKIAOFTHESTORE\naws_secret_access_key = secret%of/the+store\n")
    words = ("account", "key", "import", created["accountId"], "--credentials", file)
    file.chmod(0o644)
    status, _, stderr = thrave(*words)
    assert status == FAILED
    assert "chmod 600" in stderr
    file.chmod(0o600)
    assert thrave_json(*words) == {"accountId": created["accountId"], "accessKeyId": "AKIAOFTHESTORE"}
    file.write_text("aws_secret_access_key = secret%of/the+store\n")
    status, _, stderr = thrave(*words)
    assert status == FAILED
    assert "secret%of" not in stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["create"], USAGE),
        (["create", "a b"], 1),
        (["create", "alice", "--certificate", "none.pem"], NOT_FOUND),
        (["create", "alice", "--certificate", __file__, "--new-certificate", "keys"], USAGE),
        (["key", "create", "123456789012"], NOT_FOUND),
        (["key", "delete", "--yes", "AKIAIOSFODNN7EXAMPLE"], NOT_FOUND),
    ],
)
def test_account_commands_have_exit_code_without_traceback(thrave, words, status):
    thrave("account", "create", "bob")
    got, stdout, stderr = thrave("account", *words)
    assert (got, stdout) == (status, "")
    assert "Traceback" not in stderr


def test_account_list_does_not_create_missing_data_directory(thrave, tmp_path):
    status, _, stderr = thrave("account", "list", "--data-dir", tmp_path / "mistyped")
    assert (status, "No data directory" in stderr) == (USAGE, True)
    assert not (tmp_path / "mistyped").exists()


@pytest.mark.parametrize("words", [[], ["create"], ["list"], ["key", "create"], ["key", "delete"]])
def test_account_help_has_example(thrave, words):
    _, stdout, _ = thrave("account", *words, "--help")
    assert any(line.startswith("    thrave account ") for line in stdout.splitlines())


def test_account_show_lists_keys_and_users_without_secrets(thrave, thrave_json):
    created = thrave_json("account", "create", "alice")
    thrave_json("account", "user", "create", "alice", "bob")
    for word in ("alice", created["accountId"], created["accountId"][:6]):
        shown = thrave_json("account", "show", word)
        assert (shown["accountId"], shown["name"], shown["userNames"]) == (created["accountId"], "alice", ["bob"])
    _, stdout, _ = thrave("account", "show", "alice")
    assert created["accessKeyId"] in stdout
    assert created["secretAccessKey"] not in stdout


def test_account_rename_keeps_id_and_refuses_name_in_use(thrave, thrave_json):
    created = thrave_json("account", "create", "alice")
    thrave_json("account", "create", "carol")
    assert thrave_json("account", "rename", "alice", "bob") == {"accountId": created["accountId"], "name": "bob"}
    assert thrave("account", "show", "alice")[0] == NOT_FOUND
    assert thrave("account", "rename", "bob", "carol")[0] == REFUSED
    assert thrave("account", "rename", "bob", "a b")[0] == FAILED
    assert thrave_json("account", "show", "bob")["accountId"] == created["accountId"]


def test_account_delete_removes_keys_and_users(thrave, thrave_json):
    created = thrave_json("account", "create", "alice")
    thrave_json("account", "user", "create", "alice", "bob")
    key = thrave_json("account", "user", "key", "create", "alice", "bob")["accessKeyId"]
    deleted = thrave_json("account", "delete", "--yes", "alice")
    assert deleted == {"accountId": created["accountId"], "name": "alice"}
    assert thrave_json("account", "list")["accounts"] == []
    for word in (key, created["accessKeyId"]):
        assert thrave("account", "key", "delete", "--yes", word)[0] == NOT_FOUND
    assert thrave("account", "delete", "--yes", "alice")[0] == NOT_FOUND


def test_account_delete_is_refused_while_it_has_an_instance(thrave, thrave_json, disk):
    thrave_json("account", "create", "alice")
    words = ("--account", "alice", "--platform", "windows", "--root-volume", disk)
    instance_id = thrave_json("instance", "add", *words)["instanceId"]
    status, _, stderr = thrave("account", "delete", "--yes", "alice")
    assert (status, instance_id in stderr) == (REFUSED, True)
    thrave_json("instance", "remove", "--yes", instance_id)
    thrave_json("account", "delete", "--yes", "alice")


class Terminal(io.StringIO):
    """Stdin of a person who answers a question."""

    def isatty(self):
        """A terminal."""
        return True


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("n\n", REFUSED), ("\n", REFUSED), ("", 130)])
def test_account_delete_asks_on_a_terminal(thrave, thrave_json, monkeypatch, answer, status):
    thrave_json("account", "create", "alice")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    ended, _, stderr = thrave("account", "delete", "alice")
    assert (ended, "Delete the account" in stderr) == (status, True)
    assert len(thrave_json("account", "list")["accounts"]) == (status != 0)


def test_ambiguous_start_of_id_is_refused(thrave, thrave_json, monkeypatch):
    ids = iter(["123456789012", "123456000000"])
    monkeypatch.setattr("thrave.identity.accounts.new_account_id", lambda: next(ids))
    for name in ("alice", "bob"):
        thrave_json("account", "create", name)
    status, _, stderr = thrave("account", "show", "123456")
    assert (status, "123456000000, 123456789012" in stderr) == (USAGE, True)
    assert thrave_json("account", "show", "1234567")["name"] == "alice"
    assert thrave("account", "show", "12345")[0] == NOT_FOUND
    assert thrave("account", "show", "")[0] == NOT_FOUND
