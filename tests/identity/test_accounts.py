"""Accounts and their access keys, on a real database."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from thrave.database import access_key as access_key_table
from thrave.identity.accounts import Accounts
from thrave.identity.certificates import new_certificate
from thrave.identity.errors import (
    EntityAlreadyExists,
    IdentityError,
    LimitExceeded,
    MalformedCertificate,
    NoSuchEntity,
    ValidationError,
)
from thrave.vault import DecryptError


def test_create_gives_12_digit_account_id_and_key_in_aws_format(accounts):
    account, key = accounts.create("alice")
    assert re.fullmatch(r"[1-9][0-9]{11}", account.account_id)
    assert re.fullmatch(r"AKIA[A-Z2-7]{16}", key.access_key_id)
    assert re.fullmatch(r"[A-Za-z0-9+/]{40}", key.secret_access_key)
    assert key.account_id == account.account_id
    assert key.status == "Active"
    assert account.certificate is None


def test_find_returns_created_account_after_restart(accounts, engine, vault):
    account, key = accounts.create("alice", certificate=new_certificate("alice")[0])
    again = Accounts(engine, vault)
    assert again.get(account.account_id) == account
    assert again.list() == [account]
    assert again.find_key(key.access_key_id) == key
    assert again.list_keys(account.account_id) == [key]


def test_list_sorts_accounts_by_name(accounts):
    for name in ("carol", "alice", "bob"):
        accounts.create(name)
    assert [account.name for account in accounts.list()] == ["alice", "bob", "carol"]


def test_create_rejects_name_in_use(accounts):
    accounts.create("alice")
    with pytest.raises(EntityAlreadyExists, match="alice"):
        accounts.create("alice")
    assert len(accounts.list()) == 1


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a/b", "a\n", "ä", "a\0b", "$(touch x)"])
def test_create_rejects_name_that_iam_rejects(accounts, name):
    with pytest.raises(ValidationError):
        accounts.create(name)
    assert accounts.list() == []


@pytest.mark.parametrize("certificate", ["", "hello", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_create_rejects_invalid_certificate(accounts, certificate):
    with pytest.raises(MalformedCertificate):
        accounts.create("alice", certificate=certificate)
    assert accounts.list() == []


def test_create_stores_certificate_without_private_key(accounts, engine):
    certificate, private_key = new_certificate("alice")
    account, _ = accounts.create("alice", certificate=private_key + certificate)
    assert accounts.get(account.account_id).certificate == certificate


def test_create_key_allows_two_keys_per_account(accounts):
    account, first = accounts.create("alice")
    second = accounts.create_key(account.account_id)
    with pytest.raises(LimitExceeded, match="2"):
        accounts.create_key(account.account_id)
    assert accounts.list_keys(account.account_id) == [first, second]
    accounts.delete_key(first.access_key_id)
    third = accounts.create_key(account.account_id)
    assert accounts.list_keys(account.account_id) == [second, third]


def test_import_key_stores_key_once_with_its_secret(accounts):
    account, _ = accounts.create("alice")
    key = accounts.import_key(account.account_id, "AKIAOFTHESTORE", "secret/of/the+store")
    assert accounts.find_key("AKIAOFTHESTORE") == key
    assert (key.account_id, key.secret_access_key, key.status) == (account.account_id, "secret/of/the+store", "Active")
    other, _ = accounts.create("bob")
    with pytest.raises(EntityAlreadyExists, match="AKIAOFTHESTORE"):
        accounts.import_key(other.account_id, "AKIAOFTHESTORE", "another secret".replace(" ", "-"))
    with pytest.raises(LimitExceeded):
        accounts.import_key(account.account_id, "AKIAANOTHER", "secret/of/the+store")
    with pytest.raises(NoSuchEntity):
        accounts.import_key("999999999999", "AKIAANOTHER", "secret/of/the+store")


@pytest.mark.parametrize(
    ("key_id", "secret"), [("", "a" * 40), ("A" * 33, "a" * 40), ("A B", "a" * 40), ("AKIA", ""), ("AKIA", "ä" * 40)]
)
def test_import_key_rejects_invalid_key(accounts, key_id, secret):
    account, _ = accounts.create("alice")
    with pytest.raises(ValidationError):
        accounts.import_key(account.account_id, key_id, secret)


def test_create_key_in_parallel_leaves_two_keys(accounts):
    account, _ = accounts.create("alice")

    def create(_):
        try:
            return accounts.create_key(account.account_id)
        except LimitExceeded:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert len([key for key in pool.map(create, range(8)) if key]) == 1
    assert len(accounts.list_keys(account.account_id)) == 2


def test_delete_key_removes_key(accounts):
    _, key = accounts.create("alice")
    accounts.delete_key(key.access_key_id)
    assert accounts.find_key(key.access_key_id) is None
    with pytest.raises(NoSuchEntity, match=key.access_key_id):
        accounts.delete_key(key.access_key_id)


@pytest.mark.parametrize("account_id", ["", "123456789012", "' OR 1=1 --"])
def test_missing_account_raises_error(accounts, account_id):
    with pytest.raises(NoSuchEntity):
        accounts.get(account_id)
    with pytest.raises(NoSuchEntity):
        accounts.create_key(account_id)
    assert accounts.list_keys(account_id) == []


def test_database_has_no_plain_text_secret(accounts, engine, tmp_path):
    _, key = accounts.create("alice")
    engine.dispose()
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("thrave.db*"))
    assert key.access_key_id.encode() in stored
    assert key.secret_access_key.encode() not in stored


def test_encrypted_secret_cannot_be_decrypted_in_another_row(accounts, engine):
    _, thiefs = accounts.create("thief")
    _, victims = accounts.create("victim")
    by_id = access_key_table.c.access_key_id
    with engine.begin() as connection:
        sealed = connection.execute(
            sa.select(access_key_table.c.encrypted_secret).where(by_id == thiefs.access_key_id)
        ).scalar_one()
        connection.execute(
            sa.update(access_key_table).where(by_id == victims.access_key_id).values(encrypted_secret=sealed)
        )
    with pytest.raises(DecryptError):
        accounts.find_key(victims.access_key_id)


def test_repr_and_errors_show_no_secret(accounts):
    _, key = accounts.create("alice")
    assert key.secret_access_key not in repr(key)
    with pytest.raises(IdentityError) as caught:
        accounts.create("alice")
    assert key.secret_access_key not in str(caught.value)
