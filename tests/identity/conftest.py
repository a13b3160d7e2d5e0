"""A vault, and the accounts in a database."""

import pytest

from thrave.identity.accounts import Accounts
from thrave.vault import Vault


@pytest.fixture
def vault(tmp_path):
    return Vault.open_or_create(tmp_path / "vault.key")


@pytest.fixture
def accounts(engine, vault):
    return Accounts(engine, vault)
