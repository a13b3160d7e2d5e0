"""Checks of the database, the vault and the service's identity. They only read."""

import platform
import sqlite3
from datetime import datetime

import sqlalchemy as sa

from thrave.components import VAULT_CHECK_CONTEXT
from thrave.concurrency import utc_now
from thrave.database import migrations, vault_check
from thrave.doctor.check_context import CheckContext, CheckFailed, CheckSkipped
from thrave.identity.certificates import ServiceIdentity

MAX_CLOCK_DIFFERENCE = 5.0
"""Seconds. No decision between hosts depends on it; log lines, launch times and signatures use a machine's clock."""

OLDEST_SQLITE = (3, 35)
"""The first SQLite that has RETURNING and DROP COLUMN."""


def check_versions(context: CheckContext) -> str:
    """Compare Python's and SQLite's versions with what Thrave and its task engine need."""
    python = f"Python {platform.python_version()}"
    if context.database.dialect.name != "sqlite":
        return python
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise CheckFailed(f"SQLite {sqlite3.sqlite_version} is older than {'.'.join(map(str, OLDEST_SQLITE))}")
    with context.database.connect() as connection:
        if connection.execute(sa.text("SELECT unixepoch('subsec')")).scalar() is None:
            raise CheckFailed(f"unixepoch('subsec') is NULL in SQLite {sqlite3.sqlite_version}")
    return f"{python}, SQLite {sqlite3.sqlite_version}"


def check_database(context: CheckContext) -> str:
    """Connect and read the database's version."""
    with context.database.connect() as connection:
        if context.database.dialect.name == "sqlite":
            return f"SQLite {connection.execute(sa.text('SELECT sqlite_version()')).scalar()}"
        return f"PostgreSQL {connection.execute(sa.text('SHOW server_version')).scalar()}"


def check_tables(context: CheckContext) -> str:
    """Compare the applied migration with those of this release."""
    with context.database.connect() as connection:
        applied, known = migrations(connection)
    if applied not in known:
        raise CheckFailed(f"the tables have migration {applied}, which this release does not know")
    return f"migration {applied}" if applied == known[0] else f"migration {applied}; the next start applies {known[0]}"


def check_write_ahead_log(context: CheckContext) -> str:
    """Read SQLite's journal mode."""
    if context.database.dialect.name != "sqlite":
        raise CheckSkipped("the database is not SQLite")
    with context.database.connect() as connection:
        mode = connection.execute(sa.text("PRAGMA journal_mode")).scalar()
    if mode != "wal":
        raise CheckFailed(f"the journal mode is {mode}")
    return "WAL"


def check_database_clock(context: CheckContext) -> str:
    """Compare a database server's clock with this machine's."""
    if context.database.dialect.name == "sqlite":
        raise CheckSkipped("SQLite uses this machine's clock")
    with context.database.connect() as connection:
        server_time = connection.execute(sa.text("SELECT clock_timestamp()")).scalar_one()
    assert isinstance(server_time, datetime)
    ahead = (server_time - utc_now()).total_seconds()
    if abs(ahead) > MAX_CLOCK_DIFFERENCE:
        raise CheckFailed(f"{ahead:+.1f} s from this machine's clock")
    return f"{ahead:+.1f} s"


def check_vault_key(context: CheckContext) -> str:
    """Read the vault key and encrypt with it."""
    context.vault.encrypt(b"", context="doctor")
    return f"{context.settings.directory.vault_key}, readable by this user only"


def check_vault(context: CheckContext) -> str:
    """Decrypt the check value that the first process stored in the database."""
    with context.database.connect() as connection:
        sealed = connection.execute(sa.select(vault_check.c.encrypted)).scalar()
    if sealed is None:
        raise CheckSkipped("the database has no check value yet")
    context.vault.decrypt(sealed, context=VAULT_CHECK_CONTEXT)
    return "the key belongs to the database"


def check_identity(context: CheckContext) -> str:
    """Read the service's certificate and keys, and compare them with the fingerprint in the database."""
    folder = context.settings.directory.service
    with context.database.connect() as connection:
        known = connection.execute(sa.select(vault_check.c.identity)).scalar()
    if known is None:
        raise CheckSkipped("the first start creates it")
    service = ServiceIdentity.open(folder)
    if service.fingerprint != known:
        raise CheckFailed(f"{folder} has another identity than the database")
    return f"certificate until {service.certificate.not_valid_after_utc:%Y-%m-%d}"
