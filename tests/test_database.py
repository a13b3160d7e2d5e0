"""What the database's errors may say, and what finding nothing costs."""

import pytest
import sqlalchemy as sa

from thrave.database import account, migrate, open_engine, utc_now
from thrave.identity.accounts import Accounts
from thrave.vault import Vault


@pytest.fixture
def engine(tmp_path):
    engine = open_engine(f"sqlite:///{tmp_path / 'thrave.db'}")
    migrate(engine)
    yield engine
    engine.dispose()


def test_an_error_does_not_repeat_what_was_to_be_stored(engine):
    row = {"account_id": "1" * 12, "name": "alice", "certificate": "a-secret", "create_date": utc_now()}
    with engine.begin() as connection:
        connection.execute(sa.insert(account).values(**row))
    with pytest.raises(sa.exc.IntegrityError) as refusal, engine.begin() as connection:
        connection.execute(sa.insert(account).values(**row))
    assert "a-secret" not in f"{refusal.value} {refusal.value!r}"


class CountingVault(Vault):
    unsealed = 0

    def unseal(self, token, *, context):
        self.unsealed += 1
        return super().unseal(token, context=context)


def test_looking_for_a_key_costs_an_unsealing_whether_there_is_one_or_not(engine):
    vault = CountingVault(bytes(32))
    accounts = Accounts(engine, vault)
    _, key = accounts.create("alice")
    assert accounts.find_key(key.access_key_id) == key
    assert vault.unsealed == 1
    assert accounts.find_key("AKIANOBODY") is None
    assert vault.unsealed == 2
