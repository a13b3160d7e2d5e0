"""Errors of the database, its clock, and the cost of looking up keys."""

import sqlite3
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

import thrave.database
from thrave.concurrency import utc_now
from thrave.database import account, is_unavailable, migrate, open_engine, with_connection_options
from thrave.identity.accounts import Accounts
from thrave.tasks.engine import TaskQueue
from thrave.vault import Vault

# They show a time, or compare times that one machine has set. `database.now` is for what several machines compare.
WITH_THIS_MACHINES_CLOCK = {
    "buckets",  # expiration of an upload policy, Retry-After
    "cli",
    "compute",  # launch times of instances
    "concurrency.py",
    "database.py",
    "doctor",
    "ec2",
    "identity",
    "moto",  # one process, with the clock of the test
    "testing",
    "task_objects.py",  # expiration of an upload policy
}


def test_times_that_machines_compare_use_the_clock_of_the_database():
    root = Path(thrave.database.__file__).parent
    users = {path.relative_to(root) for path in root.rglob("*.py") if "utc_now" in path.read_text()}
    assert {path for path in users if not {path.parts[0], path.name} & WITH_THIS_MACHINES_CLOCK} == set()


def test_error_of_a_statement_hides_its_parameters(engine):
    row = {"account_id": "1" * 12, "name": "alice", "certificate": "a-secret", "create_date": utc_now()}
    with engine.begin() as connection:
        connection.execute(sa.insert(account).values(**row))
    with pytest.raises(sa.exc.IntegrityError) as refusal, engine.begin() as connection:
        connection.execute(sa.insert(account).values(**row))
    assert "a-secret" not in f"{refusal.value} {refusal.value!r}"


class CountingVault(Vault):
    decrypted = 0

    def decrypt(self, token, *, context):
        self.decrypted += 1
        return super().decrypt(token, context=context)


def test_find_key_decrypts_once_for_existing_and_missing_keys(engine):
    vault = CountingVault(bytes(32))
    accounts = Accounts(engine, vault)
    _, key = accounts.create("alice")
    assert accounts.find_key(key.access_key_id) == key
    assert vault.decrypted == 1
    assert accounts.find_key("AKIANOBODY") is None
    assert vault.decrypted == 2


class SqliteBefore342(sqlite3.Connection):
    """A connection on which `unixepoch('subsec')` is NULL, as in SQLite before 3.42."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.create_function("unixepoch", 1, lambda modifier: None)


@pytest.mark.parametrize("factory", [sqlite3.Connection, SqliteBefore342])
def test_sqlite_engine_has_unixepoch_with_fractions(factory):
    # An engine that is not ours: the task engine creates its own.
    engine = sa.create_engine("sqlite://", connect_args={"factory": factory})
    before = time.time() - 1  # SQLite cuts milliseconds off
    with engine.begin() as connection:
        connection.execute(
            sa.text("CREATE TABLE t (a INTEGER, at INTEGER NOT NULL DEFAULT (unixepoch('subsec') * 1000))")
        )
        connection.execute(sa.text("INSERT INTO t (a) VALUES (1)"))
        stored = connection.execute(sa.text("SELECT at FROM t")).scalar_one()
        selected = connection.execute(sa.text("SELECT unixepoch('subsec')")).scalar_one()
    engine.dispose()
    assert before * 1000 <= stored <= selected * 1000
    assert selected <= time.time()


def failing(engine, statement):
    with pytest.raises(sa.exc.DBAPIError) as failure, engine.begin() as connection:
        connection.execute(sa.text(statement))
    return failure.value


def test_is_unavailable_accepts_locked_database(engine, tmp_path):
    quick = sa.create_engine(f"sqlite:///{tmp_path / 'thrave.db'}", connect_args={"timeout": 0})
    with engine.begin() as connection:
        connection.execute(sa.insert(account).values(account_id="1" * 12, name="a", create_date=utc_now()))
        assert is_unavailable(failing(quick, "DELETE FROM account"))
    quick.dispose()


def test_is_unavailable_accepts_full_or_damaged_database(tmp_path):
    small = sa.create_engine(f"sqlite:///{tmp_path / 'small.db'}")
    with small.begin() as connection:
        connection.execute(sa.text("CREATE TABLE t (a BLOB)"))
    sa.event.listen(small, "begin", lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 2"))
    assert is_unavailable(failing(small, "INSERT INTO t VALUES (zeroblob(1000000))"))
    small.dispose()
    (tmp_path / "damaged.db").write_bytes(b"no database" * 1000)
    assert is_unavailable(failing(sa.create_engine(f"sqlite:///{tmp_path / 'damaged.db'}"), "SELECT * FROM t"))
    assert is_unavailable(failing(sa.create_engine(f"sqlite:///{tmp_path}/no/such/folder/x.db"), "SELECT 1"))


def test_is_unavailable_rejects_wrong_statement(engine):
    assert not is_unavailable(failing(engine, "SELECT * FROM no_such_table"))
    assert not is_unavailable(failing(engine, "INSERT INTO account (name) VALUES (NULL)"))
    assert not is_unavailable(ValueError())


def test_postgresql_database_without_an_encoding_keeps_text(postgres):
    url = postgres.new_database("ENCODING SQL_ASCII LOCALE 'C' TEMPLATE template0")
    engine = open_engine(url)
    migrate(engine)
    row = {"account_id": "1" * 12, "name": "Zoë", "create_date": utc_now()}
    with engine.begin() as connection:
        connection.execute(sa.insert(account).values(**row))
        assert connection.scalars(sa.select(account.c.name)).all() == ["Zoë"]
    engine.dispose()
    TaskQueue(url).close()  # creates the engine's tables


def test_with_connection_options_limits_the_wait_for_a_dead_server():
    url = sa.make_url(with_connection_options("postgresql://thrave:secret@db.example/thrave?connect_timeout=3"))
    assert (url.password, url.query["connect_timeout"]) == ("secret", "3")
    assert {"tcp_user_timeout", "keepalives_idle", "keepalives_interval", "keepalives_count"} <= url.query.keys()
    assert with_connection_options("sqlite:////var/lib/thrave/thrave.db") == "sqlite:////var/lib/thrave/thrave.db"
