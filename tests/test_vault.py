"""The vault keeps secrets apart from the database, and one context's from another's."""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrave.vault import DecryptError, Vault, VaultError, VaultKeyError

KEY = bytes(range(32))


@pytest.fixture
def key_file(tmp_path):
    return tmp_path / "vault.key"


@given(st.binary(max_size=200), st.text(max_size=50))
def test_decrypt_returns_secret_in_same_context(secret, context):
    vault = Vault(KEY)
    assert vault.decrypt(vault.encrypt(secret, context=context), context=context) == secret


def test_an_encrypted_secret_does_not_show_the_secret_and_is_another_each_time():
    vault = Vault(KEY)
    first, second = (vault.encrypt(b"wJalrXUtnFEMI", context="a") for _ in range(2))
    assert b"wJalrXUtnFEMI" not in first
    assert first != second


def test_decrypt_refuses_other_context():
    vault = Vault(KEY)
    token = vault.encrypt(b"secret", context="access key of account 1")
    with pytest.raises(DecryptError, match="access key of account 2"):
        vault.decrypt(token, context="access key of account 2")


def test_another_vaults_secret_does_not_open():
    with pytest.raises(DecryptError):
        Vault(os.urandom(32)).decrypt(Vault(KEY).encrypt(b"secret", context="a"), context="a")


@pytest.mark.parametrize("position", [0, 1, 12, 13, 20, -1])
def test_a_changed_token_does_not_open(position):
    token = bytearray(Vault(KEY).encrypt(b"secret", context="a"))
    token[position] ^= 1
    with pytest.raises(DecryptError):
        Vault(KEY).decrypt(bytes(token), context="a")


@given(st.binary(max_size=64))
def test_arbitrary_tokens_are_refused_with_our_error_only(token):
    with pytest.raises(DecryptError):
        Vault(KEY).decrypt(token, context="a")


def test_the_key_file_is_made_once_with_32_bytes_for_the_owner_alone(key_file):
    token = Vault.open_or_create(key_file).encrypt(b"secret", context="a")
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert key_file.stat().st_size == 32
    assert [*key_file.parent.iterdir()] == [key_file], "nothing is left beside it"
    assert Vault.open_or_create(key_file).decrypt(token, context="a") == b"secret"


def _encrypt_in_another_process(key_file: Path) -> bytes:
    return Vault.open_or_create(key_file).encrypt(b"secret", context="a")


def test_processes_that_make_the_key_at_the_same_time_share_one_key(key_file):
    with ProcessPoolExecutor(4) as pool:
        tokens = [*pool.map(_encrypt_in_another_process, [key_file] * 8)]
    vault = Vault.open_or_create(key_file)
    assert {vault.decrypt(token, context="a") for token in tokens} == {b"secret"}


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_file_that_is_no_vault_key_is_refused_and_left_alone(key_file, content):
    key_file.write_bytes(content)
    key_file.chmod(0o600)
    with pytest.raises(VaultKeyError, match=r"vault\.key is not a vault's key file"):
        Vault.open_or_create(key_file)
    assert key_file.read_bytes() == content


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_file_that_others_may_read_is_refused(key_file, mode):
    Vault.open_or_create(key_file)
    key_file.chmod(mode)
    with pytest.raises(VaultKeyError, match="chmod 600"):
        Vault.open_or_create(key_file)


def test_a_folder_that_is_not_there_is_said_clearly(tmp_path):
    with pytest.raises(VaultError, match="cannot be used"):
        Vault.open_or_create(tmp_path / "none" / "vault.key")
