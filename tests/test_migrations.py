"""Databases of earlier releases, brought to this one's shape with what is in them."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import thrave.database
from thrave.database import metadata, migrate, migrations, open_engine
from thrave.identity.accounts import Accounts
from thrave.identity.users import Users
from thrave.vault import Vault

MIGRATIONS = Path(thrave.database.__file__).parent / "migrations"


@pytest.fixture
def engine(tmp_path):
    engine = open_engine(f"sqlite:///{tmp_path}/thrave.db")
    yield engine
    engine.dispose()


def migrate_to(engine, revision):
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def insert(engine, table, **row):
    names = ", ".join(row)
    places = ", ".join(f":{name}" for name in row)
    with engine.begin() as connection:
        connection.execute(sa.text(f"INSERT INTO {table} ({names}) VALUES ({places})"), row)


@pytest.mark.filterwarnings("ignore:.*expression-based index")  # SQLite cannot show it
def test_the_migrations_end_in_the_tables_of_this_release(engine):
    migrate(engine)
    with engine.connect() as connection:
        options = {"version_table": "thrave_version", "compare_type": True}
        differences = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    assert differences == []


def test_an_account_with_its_keys_from_before_there_were_users_goes_on_working(engine, tmp_path):
    vault = Vault.open_or_create(tmp_path / "vault.key")
    migrate_to(engine, "0001")
    then = datetime(2026, 11, 23, 8, 26, 46, tzinfo=UTC)
    insert(engine, "account", account_id="123456789012", name="acme", create_date=then.isoformat(" ")[:19])
    for key_id in ("AKIAIOSFODNN7EXAMPLE", "AKIAI44QH8DHBEXAMPLE"):
        sealed = vault.seal(b"secret", context=f"access key {key_id} of account 123456789012")
        row = {"account_id": "123456789012", "sealed_secret": sealed, "status": "Active"}
        insert(engine, "access_key", access_key_id=key_id, create_date=then.isoformat(" ")[:19], **row)
    migrate(engine)
    accounts, users = Accounts(engine, vault), Users(engine)
    first, second = accounts.list_keys("123456789012")
    assert {first.access_key_id, second.access_key_id} == {"AKIAIOSFODNN7EXAMPLE", "AKIAI44QH8DHBEXAMPLE"}
    assert (first.secret_access_key, first.user, first.create_date) == ("secret", None, then)
    key = accounts.create_key("123456789012", users.create("123456789012", "bob"))
    assert accounts.find_key(key.access_key_id).user.user_name == "bob"


def test_the_migrations_that_the_names_of_the_files_give_are_those_that_alembic_finds(engine):
    scripts = ScriptDirectory(str(MIGRATIONS))
    known = [script.revision for script in scripts.walk_revisions()]
    with engine.connect() as connection:
        assert migrations(connection) == (None, known)
    migrate_to(engine, "0002")
    with engine.connect() as connection:
        assert migrations(connection) == ("0002", known)


def test_what_was_asked_of_instances_and_borrowed_by_tasks_is_kept(engine):
    migrate_to(engine, "0006")
    then = "2026-11-23 08:26:46"
    insert(engine, "host", host="a", state="active", lease="x", version="1", tasks_at_once=1, start_time=then,
           heartbeat_time=then)  # fmt: skip
    for action in ("start", "stop"):
        insert(engine, "power_request", host="a", instance_id="i-asked", action=action, request_time=then)
    insert(engine, "power_request", host="a", instance_id="i-both", action="reboot", request_time=then)
    task = {"account_id": "1", "owner_id": "1", "host": "a", "start_time": then, "update_time": then, "bucket": "b",
            "access_key_id": "A", "was_running": True, "attempts": 1}  # fmt: skip
    for number, (instance_id, state, more) in enumerate([
        ("i-both", "waiting-for-shutdown", {}), ("i-off", "bundling", {}), ("i-freed", "storing", {"frozen": "{}"}),
        ("i-ended", "complete", {}), ("i-left", "failed", {"look_after_until": then}),
    ]):  # fmt: skip
        insert(engine, "bundle_task", bundle_id=f"bun-{number}", instance_id=instance_id, state=state,
               prefix=f"p{number}", **task, **more)  # fmt: skip
    migrate(engine)
    with engine.connect() as connection:
        columns = "instance_id, wanted, request, borrowed_by"
        rows = connection.execute(sa.text(f"SELECT {columns} FROM instance_power ORDER BY instance_id")).all()
    assert [tuple(row) for row in rows] == [
        ("i-asked", "stopped", "stop", None),
        ("i-both", "running", "reboot", "bun-0"),
        ("i-freed", "running", None, None),
        ("i-left", "running", None, None),
        ("i-off", "running", None, "bun-1"),
    ]


def test_migrating_again_changes_nothing(engine):
    migrate(engine)
    migrate(engine)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM thrave_version")).all() != []


def old_task(engine, bundle_id, state, minute, **more):
    time = f"2026-11-23 08:{minute:02}:00.000000"
    row = {"account_id": "1" * 12, "owner_id": "1" * 12, "instance_id": bundle_id, "host": "localhost"}
    place = {"bucket": "bucket", "prefix": bundle_id, "access_key_id": "AKIA"}
    insert(
        engine, "bundle_task",
        bundle_id=bundle_id, state=state, start_time=time, update_time=time, **row, **place, **more,
    )  # fmt: skip


def old_objects(engine, bundle_id, *keys, size=1):
    for key in keys:
        insert(engine, "bundle_part", bundle_id=bundle_id, key=key, size=size)


def test_objects_of_several_tasks_get_one_owner(database, tmp_path):
    engine = open_engine(database.get("database_url", f"sqlite:///{tmp_path}/thrave.db"))
    migrate_to(engine, "0008")
    old_task(engine, "first", "failed", 1)
    old_task(engine, "unfinished", "bundling", 2)
    old_task(engine, "newest", "failed", 3)
    earlier = '{"manifest": "", "keys": ["replaced", "lost", "unfinished"], "isReplaced": true}'
    old_task(engine, "replacing", "complete", 4, earlier=earlier)
    old_objects(engine, "first", "manifest", "first", "both", "replaced")
    old_objects(engine, "unfinished", "manifest", "unfinished")
    old_objects(engine, "newest", "manifest", "both", size=None)
    old_objects(engine, "replacing", "new")
    migrate(engine)
    query = sa.text("SELECT bucket, key, bundle_id, state, run IS NULL FROM bundle_part ORDER BY key")
    with engine.connect() as connection:
        found = [tuple(row) for row in connection.execute(query)]
    assert found == [
        ("bucket", "both", "newest", "unwanted", 0),
        ("bucket", "first", "first", "unwanted", 1),
        ("bucket", "lost", "replacing", "unwanted", 1),
        ("bucket", "manifest", "unfinished", "sent", 1),
        ("bucket", "new", "replacing", "sent", 1),
        ("bucket", "replaced", "replacing", "unwanted", 1),
        ("bucket", "unfinished", "unfinished", "sent", 1),
    ]
    engine.dispose()
