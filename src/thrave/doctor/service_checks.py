"""Checks of what the service remembers: its database, its vault, its own identity. They only read."""

import platform
import sqlite3
from datetime import datetime

import sqlalchemy as sa

from thrave.components import PROOF_CONTEXT
from thrave.database import migrations, utc_now, vault_check
from thrave.doctor.check_context import CheckContext, CheckFailed, CheckSkipped
from thrave.identity.certificates import ServiceIdentity

CLOCKS_APART = 5.0
"""Seconds. No decision between hosts depends on it; log lines, launch times and signatures have a machine's clock."""

OLDEST_SQLITE = (3, 35)
"""The first SQLite that has RETURNING and DROP COLUMN."""


def versions(subject: CheckContext) -> str:
    """Compare Python's and SQLite's versions with what Thrave and its task engine need."""
    python = f"Python {platform.python_version()}"
    if subject.database.dialect.name != "sqlite":
        return python
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise CheckFailed(f"SQLite {sqlite3.sqlite_version} is older than {'.'.join(map(str, OLDEST_SQLITE))}")
    with subject.database.connect() as connection:
        if connection.execute(sa.text("SELECT unixepoch('subsec')")).scalar() is None:
            raise CheckFailed(f"unixepoch('subsec') is NULL in SQLite {sqlite3.sqlite_version}")
    return f"{python}, SQLite {sqlite3.sqlite_version}"


def database(subject: CheckContext) -> str:
    """Ask for the database's version."""
    with subject.database.connect() as connection:
        if subject.database.dialect.name == "sqlite":
            return f"SQLite {connection.execute(sa.text('SELECT sqlite_version()')).scalar()}"
        return f"PostgreSQL {connection.execute(sa.text('SHOW server_version')).scalar()}"


def tables(subject: CheckContext) -> str:
    """Compare the migrations that were made with ours."""
    with subject.database.connect() as connection:
        made, known = migrations(connection)
    if made not in known:
        raise CheckFailed(f"the tables are of migration {made}, which this release does not know")
    return f"migration {made}" if made == known[0] else f"migration {made}; the start makes {known[0]}"


def write_ahead(subject: CheckContext) -> str:
    """Ask SQLite how it writes."""
    if subject.database.dialect.name != "sqlite":
        raise CheckSkipped("it is no SQLite")
    with subject.database.connect() as connection:
        mode = connection.execute(sa.text("PRAGMA journal_mode")).scalar()
    if mode != "wal":
        raise CheckFailed(f"the journal mode is {mode}")
    return "WAL"


def database_clock(subject: CheckContext) -> str:
    """Compare a database server's clock with ours."""
    if subject.database.dialect.name == "sqlite":
        raise CheckSkipped("it is this machine's")
    with subject.database.connect() as connection:
        theirs = connection.execute(sa.text("SELECT clock_timestamp()")).scalar_one()
    assert isinstance(theirs, datetime)
    ahead = (theirs - utc_now()).total_seconds()
    if abs(ahead) > CLOCKS_APART:
        raise CheckFailed(f"{ahead:+.1f} s from ours")
    return f"{ahead:+.1f} s"


def vault_key(subject: CheckContext) -> str:
    """Open the vault."""
    subject.vault.seal(b"", context="doctor")
    return f"{subject.settings.directory.vault_key}, this user's alone"


def proof(subject: CheckContext) -> str:
    """Unseal what the database's first process sealed."""
    with subject.database.connect() as connection:
        sealed = connection.execute(sa.select(vault_check.c.encrypted)).scalar()
    if sealed is None:
        raise CheckSkipped("nothing has been sealed yet")
    subject.vault.unseal(sealed, context=PROOF_CONTEXT)
    return "the database's"


def identity(subject: CheckContext) -> str:
    """Read the service's certificate and keys, and compare them with the fingerprint in the database."""
    folder = subject.settings.directory.service
    with subject.database.connect() as connection:
        known = connection.execute(sa.select(vault_check.c.identity)).scalar()
    if known is None:
        raise CheckSkipped("the first start makes it")
    service = ServiceIdentity.open(folder)
    if service.fingerprint != known:
        raise CheckFailed(f"{folder} has another identity than the database")
    return f"certificate until {service.certificate.not_valid_after_utc:%Y-%m-%d}"
