"""The migrations create the tables of `database.py`, in the order of their file names."""

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import thrave.database
from thrave.database import NewerDatabaseError, metadata, migrate, migrations, open_engine

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


def definitions(engine):
    """Return the SQL of each table and index by name, with single spaces."""
    query = sa.text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name <> 'thrave_version'")
    with engine.connect() as connection:
        return {name: " ".join(sql.split()) for name, sql in connection.execute(query)}


@pytest.mark.filterwarnings("ignore:.*expression-based index")  # SQLite cannot show it
def test_migrations_end_with_the_tables_of_this_release(engine):
    migrate(engine)
    with engine.connect() as connection:
        options = {"version_table": "thrave_version", "compare_type": True}
        differences = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    assert differences == []


def test_migrations_create_the_same_tables_and_indexes_as_the_metadata(engine, tmp_path):
    """Also what Alembic does not compare: server defaults, conditions of indexes, an index on an expression."""
    migrate(engine)
    direct = open_engine(f"sqlite:///{tmp_path}/direct.db")
    metadata.create_all(direct)
    assert definitions(engine) == definitions(direct)
    direct.dispose()


def test_migrations_by_file_name_are_those_of_alembic(engine):
    scripts = ScriptDirectory(str(MIGRATIONS))
    known = [script.revision for script in scripts.walk_revisions()]
    with engine.connect() as connection:
        assert migrations(connection) == (None, known)
    migrate_to(engine, known[-1])
    with engine.connect() as connection:
        assert migrations(connection) == (known[-1], known)


def test_migrate_again_changes_nothing(engine):
    migrate(engine)
    migrate(engine)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM thrave_version")).all() != []


def test_migrate_refuses_tables_of_a_newer_release(engine):
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE thrave_version SET version_num = '9999'"))
    before = definitions(engine)
    with pytest.raises(NewerDatabaseError, match="migration 9999"):
        migrate(engine)
    assert definitions(engine) == before
