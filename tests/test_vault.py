"""The vault: encryption bound to a key and a context, and its key file."""

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


def test_encrypt_hides_the_secret_and_returns_a_new_token_each_time():
    vault = Vault(KEY)
    first, second = (vault.encrypt(b"wJalrXUtnFEMI", context="a") for _ in range(2))
    assert b"wJalrXUtnFEMI" not in first
    assert first != second


def test_decrypt_refuses_other_context():
    vault = Vault(KEY)
    token = vault.encrypt(b"secret", context="access key of account 1")
    with pytest.raises(DecryptError, match="access key of account 2"):
        vault.decrypt(token, context="access key of account 2")


def test_decrypt_refuses_token_of_another_vault():
    with pytest.raises(DecryptError):
        Vault(os.urandom(32)).decrypt(Vault(KEY).encrypt(b"secret", context="a"), context="a")


@pytest.mark.parametrize("position", [0, 1, 12, 13, 20, -1])
def test_decrypt_refuses_changed_token(position):
    token = bytearray(Vault(KEY).encrypt(b"secret", context="a"))
    token[position] ^= 1
    with pytest.raises(DecryptError):
        Vault(KEY).decrypt(bytes(token), context="a")


@given(st.binary(max_size=64))
def test_decrypt_of_arbitrary_tokens_raises_only_decrypt_error(token):
    with pytest.raises(DecryptError):
        Vault(KEY).decrypt(token, context="a")


def test_open_or_create_creates_a_private_key_file_once(key_file):
    token = Vault.open_or_create(key_file).encrypt(b"secret", context="a")
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert key_file.stat().st_size == 32
    assert [*key_file.parent.iterdir()] == [key_file], "no other file remains"
    assert Vault.open_or_create(key_file).decrypt(token, context="a") == b"secret"


def _encrypt_in_another_process(key_file: Path) -> bytes:
    return Vault.open_or_create(key_file).encrypt(b"secret", context="a")


def test_open_or_create_in_parallel_creates_one_key(key_file):
    with ProcessPoolExecutor(4) as pool:
        tokens = [*pool.map(_encrypt_in_another_process, [key_file] * 8)]
    vault = Vault.open_or_create(key_file)
    assert {vault.decrypt(token, context="a") for token in tokens} == {b"secret"}


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_open_or_create_refuses_other_file_and_keeps_it(key_file, content):
    key_file.write_bytes(content)
    key_file.chmod(0o600)
    with pytest.raises(VaultKeyError, match=r"vault\.key is not a vault's key file"):
        Vault.open_or_create(key_file)
    assert key_file.read_bytes() == content


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_open_refuses_key_file_readable_by_others(key_file, mode):
    Vault.open_or_create(key_file)
    key_file.chmod(mode)
    with pytest.raises(VaultKeyError, match="chmod 600"):
        Vault.open_or_create(key_file)


def test_open_or_create_reports_missing_folder(tmp_path):
    with pytest.raises(VaultError, match="cannot be used"):
        Vault.open_or_create(tmp_path / "none" / "vault.key")
