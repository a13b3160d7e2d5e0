"""A database with this release's tables, and a vault."""

import pytest

from thrave.database import migrate, open_engine
from thrave.vault import Vault


@pytest.fixture
def engine(tmp_path):
    engine = open_engine(f"sqlite:///{tmp_path}/thrave.db")
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def vault(tmp_path):
    return Vault.open_or_create(tmp_path / "vault.key")
