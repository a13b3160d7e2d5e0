"""The database: its tables, how it is opened, migrations, and messages for its errors.

All tables of Thrave are here, as SQLAlchemy Core tables. DBOS has tables of its own in the same database; these modules
never read them. No secret is stored in plain text: columns named `encrypted…` have what `vault.py` encrypted with a key
that is not in the database.

    DatabaseUnusableError
    ├── NewerDatabaseError       a later release created the tables
    └── DatabaseReplacedError    the file was deleted or replaced while it was open
"""

import os
import sqlite3
from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles

from thrave.concurrency import monotonic, random_below, utc_now, wall_time

metadata = sa.MetaData()

VERSION_TABLE = "thrave_version"
"""Table in which Alembic records the last migration."""
_MIGRATIONS = Path(__file__).parent / "migrations"  # file names begin with the revision and an underscore

_MAX_IDLE = 20_000  # milliseconds that a transaction may be idle
_MIGRATION_LOCK = 0x7468726176650000  # number of an advisory lock that no other program uses: "thrave"


# SQLite's names of conditions, and what an operator can do; the first that matches is used.
_SQLITE_CONDITIONS = (
    ("SQLITE_BUSY", "is locked by another program. Stop that program, or try again later."),
    ("SQLITE_LOCKED", "is locked by another program. Stop that program, or try again later."),
    ("SQLITE_NOTADB", "is not a SQLite database. Restore it from a backup."),
    ("SQLITE_CORRUPT", "is damaged. Restore it from a backup."),
    ("SQLITE_FULL", "cannot be written: the disk is full. Free space."),
    ("SQLITE_READONLY", "cannot be written. Check the owner and mode of the file and of its directory."),
    ("SQLITE_PERM", "cannot be opened. Check the owner and mode of the file and of its directory."),
    ("SQLITE_CANTOPEN", "cannot be opened. Check the owner and mode of the file and of its directory."),
    ("SQLITE_IOERR", "cannot be read or written: the disk reports an error. Check the disk and the system log."),
)
# The same for SQLSTATE classes and codes of PostgreSQL. Source: PostgreSQL's documentation, appendix A.
_POSTGRESQL_CONDITIONS = (
    ("28", "refuses the user or the password. Check the setting database_url and ~/.pgpass."),
    ("3D", "has no such database. Create it, or check the setting database_url."),
    ("53300", "has no free connection. Raise its max_connections, or stop other clients."),
    ("53", "has too few resources (memory or disk)."),
    ("57", "is shutting down or starting. Try again later."),
    ("42501", "does not allow this user to do it. Grant the user of database_url access to its tables."),
    ("25006", "is read-only. Connect to the primary server."),
)


class DatabaseUnusableError(Exception):
    """The database cannot be used. The message has its name and what to do."""


class NewerDatabaseError(DatabaseUnusableError):
    """A later release of Thrave has changed the tables."""


class DatabaseReplacedError(DatabaseUnusableError):
    """The database file was deleted, or another file has its name, since it was opened."""


class UtcDateTime(sa.TypeDecorator[datetime]):
    """A point in time, aware, in UTC, to the microsecond. SQLite does not store the zone."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002 (SQLAlchemy's signature)
        """Store as naive UTC."""
        return value and value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002 (SQLAlchemy's signature)
        """Read as aware UTC."""
        return value and value.replace(tzinfo=UTC)


class now(sa.sql.functions.FunctionElement[datetime]):  # noqa: N801 (used like a function, as sa.func.now)
    """SQL expression: the time of the database's clock when the statement began, plus seconds (a number or a column).

    Times that several processes compare are set and compared with it, since the clocks of their machines may differ. On
    SQLite it is the clock of this machine, on which all processes that open the file run.
    """

    type = UtcDateTime()
    inherit_cache = True
    name = "now"

    def __init__(self, seconds: "float | sa.ColumnElement[float]" = 0.0) -> None:
        super().__init__(sa.literal(seconds, sa.Float) if isinstance(seconds, int | float) else seconds)


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **options: Any) -> str:  # noqa: ANN401 (SQLAlchemy has no type for it)
    seconds = compiler.process(element.clauses, **options)
    # Not the transaction's time: the transaction may have waited for a lock. The function is stable: an index is used.
    return f"(timezone('UTC', statement_timestamp()) + make_interval(secs => CAST({seconds} AS double precision)))"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **options: Any) -> str:  # noqa: ANN401 (SQLAlchemy has no type for it)
    return f"thrave_now({compiler.process(element.clauses, **options)})"


account = sa.Table(
    "account", metadata,
    sa.Column("account_id", sa.String(12), primary_key=True),
    sa.Column("name", sa.String(128), nullable=False, unique=True),
    sa.Column("certificate", sa.Text),  # PEM; bundles are encrypted for it
    sa.Column("create_date", UtcDateTime, nullable=False),
)  # fmt: skip

iam_user = sa.Table(
    "iam_user", metadata,
    sa.Column("user_id", sa.String(32), primary_key=True),
    sa.Column("account_id", sa.ForeignKey("account.account_id"), nullable=False),
    sa.Column("user_name", sa.String(64), nullable=False),
    sa.Column("policy_version", sa.Integer, nullable=False),  # counts every change of the user's policies
    sa.Column("create_date", UtcDateTime, nullable=False),
)  # fmt: skip

# User names of an account are unique without regard to case, as in IAM.
sa.Index("iam_user_by_name", iam_user.c.account_id, sa.func.lower(iam_user.c.user_name), unique=True)

user_policy = sa.Table(
    "user_policy", metadata,
    sa.Column("user_id", sa.ForeignKey("iam_user.user_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("policy_name", sa.String(128), primary_key=True),
    sa.Column("document", sa.Text, nullable=False),  # JSON text as received
)  # fmt: skip

access_key = sa.Table(
    "access_key", metadata,
    sa.Column("access_key_id", sa.String(32), primary_key=True),
    sa.Column("account_id", sa.ForeignKey("account.account_id"), nullable=False, index=True),
    sa.Column("user_id", sa.ForeignKey("iam_user.user_id", ondelete="CASCADE"), index=True),  # null: the account's
    sa.Column("encrypted_secret", sa.LargeBinary, nullable=False),
    sa.Column("status", sa.String(8), nullable=False),  # Active | Inactive, as IAM's
    sa.Column("create_date", UtcDateTime, nullable=False),
)  # fmt: skip

bundle_task = sa.Table(
    "bundle_task", metadata,
    sa.Column("bundle_id", sa.String(32), primary_key=True),
    sa.Column("account_id", sa.String(12), nullable=False),  # the caller's
    sa.Column("owner_id", sa.String(12), nullable=False),  # the bucket owner's, whose key signed the upload policy
    sa.Column("instance_id", sa.String(32), nullable=False),
    sa.Column("host", sa.String(253), nullable=False),  # host that has the disk
    sa.Column("state", sa.String(24), nullable=False),
    # The next step (tasks/models.py). After the transaction that sets error_code it is a step of the undo.
    sa.Column("next_step", sa.String(16), nullable=False, server_default="stop"),
    sa.Column("progress", sa.Integer),  # percent within bundling or storing
    sa.Column("start_time", UtcDateTime, nullable=False, default=now()),
    sa.Column("update_time", UtcDateTime, nullable=False, default=now()),
    sa.Column("bucket", sa.String(255), nullable=False),
    sa.Column("prefix", sa.String(1024), nullable=False),
    sa.Column("access_key_id", sa.String(32), nullable=False),
    # Whether the request created the bucket; null when nothing remains to be done about that.
    sa.Column("created_bucket", sa.Boolean),
    sa.Column("encrypted_policy", sa.LargeBinary),  # upload policy and signature; erased when the task ends
    sa.Column("encrypted_bundle_key", sa.LargeBinary),  # the bundle's key and IV; erased when the task ends
    sa.Column("part_series", sa.String(12)),  # digits in the names of its parts; null before sealing
    sa.Column("checkpoint", sa.JSON(none_as_null=True)),  # where sealing resumes after a crash
    sa.Column("documents", sa.JSON(none_as_null=True)),  # manifest and side file, when every part is stored
    sa.Column("earlier", sa.JSON(none_as_null=True)),  # the replaced bundle: a manifest, and keys
    # Whether the manifest may have been sent; then the task cannot be cancelled.
    sa.Column("manifest_sent", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("overlay", sa.JSON(none_as_null=True)),  # root volume and overlay, until the overlay is merged
    sa.Column("power_recovery_until", UtcDateTime),  # the guest may still power off until then
    # Whether the instance is to run after the task, if its owner requests nothing else; null until it is recorded.
    sa.Column("run_after_task", sa.Boolean),
    sa.Column("error_code", sa.String(64)),  # set before the undo, so also while the task has not ended
    sa.Column("error_message", sa.Text),
    sa.Column("warning", sa.Text),  # for the owner; the task continued
    sa.Column("volume_size", sa.BigInteger),  # bytes of the root volume; null until it has been opened
    sa.Column("off_since", UtcDateTime),  # since when the instance is off for the task; null: it is not
    # Seconds for which the instance was off for the task, without the time since `off_since`; null: it never was.
    sa.Column("downtime", sa.Float),
    # Number of runs. It is the number of the last run, and only that run may write.
    sa.Column("runs", sa.Integer, nullable=False, server_default="0"),
    sa.Index("bundle_task_by_account", "account_id", "start_time"),
    sa.Index("bundle_task_by_start_time", "start_time", "bundle_id"),
    sa.Index("bundle_task_by_update_time", "update_time"),
)  # fmt: skip

# The task has not ended. The states are literals in the SQL: with parameters no database would use the index below for
# a query with this condition.
task_in_progress = bundle_task.c.state.not_in([sa.literal_column("'complete'"), sa.literal_column("'failed'")])

# One task at a time per instance: the database refuses the second task of any process.
sa.Index(
    "bundle_task_in_progress", bundle_task.c.instance_id, unique=True,
    sqlite_where=task_in_progress, postgresql_where=task_in_progress,
)  # fmt: skip

# One task at a time per bucket and prefix, of all accounts: two would write the same manifest.
sa.Index(
    "bundle_task_place_in_progress", bundle_task.c.bucket, bundle_task.c.prefix, unique=True,
    sqlite_where=task_in_progress, postgresql_where=task_in_progress,
)  # fmt: skip
sa.Index("bundle_task_by_place", bundle_task.c.bucket, bundle_task.c.prefix)  # for choosing part names

_replaces = sa.and_(bundle_task.c.earlier.is_not(None), bundle_task.c.state == sa.literal_column("'complete'"))
sa.Index(
    "bundle_task_replaces", bundle_task.c.host, sqlite_where=_replaces, postgresql_where=_replaces,
)  # fmt: skip

sa.Index(
    "bundle_task_created_bucket", bundle_task.c.host,
    sqlite_where=bundle_task.c.created_bucket.is_not(None), postgresql_where=bundle_task.c.created_bucket.is_not(None),
)  # fmt: skip

# A host runs this query every second. Its cost must not grow with the number of ended tasks.
sa.Index(
    "bundle_task_in_progress_on_host", bundle_task.c.host,
    sqlite_where=task_in_progress, postgresql_where=task_in_progress,
)  # fmt: skip
sa.Index(  # for the quota check before each new task
    "bundle_task_in_progress_of_account", bundle_task.c.account_id,
    sqlite_where=task_in_progress, postgresql_where=task_in_progress,
)  # fmt: skip
_failed = bundle_task.c.state == sa.literal_column("'failed'")
sa.Index("bundle_task_failed", bundle_task.c.update_time, sqlite_where=_failed, postgresql_where=_failed)
_power_recovery = bundle_task.c.power_recovery_until.is_not(None)
sa.Index(
    "bundle_task_power_recovery", bundle_task.c.host, bundle_task.c.instance_id,
    sqlite_where=_power_recovery, postgresql_where=_power_recovery,
)  # fmt: skip

_overlay = bundle_task.c.overlay.is_not(None)
sa.Index(
    "bundle_task_overlay", bundle_task.c.host, bundle_task.c.instance_id,
    sqlite_where=_overlay, postgresql_where=_overlay,
)  # fmt: skip

bundle_task_event = sa.Table(
    "bundle_task_event", metadata,
    sa.Column("event_id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("bundle_id", sa.ForeignKey("bundle_task.bundle_id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("time", UtcDateTime, nullable=False, default=now()),
    sa.Column("state", sa.String(24), nullable=False),  # the state that the task had then
    sa.Column("message", sa.Text),  # null: the task entered the state; else what happened
)  # fmt: skip

# Every object that a task may have written or must delete. A key has one owner (`tasks/claims.py`).
bundle_part = sa.Table(
    "bundle_part", metadata,
    sa.Column("bucket", sa.String(255), primary_key=True),
    sa.Column("key", sa.String(1024), primary_key=True),  # recorded before the upload, so that cleanup finds all
    # No cascade: a task's record cannot be deleted while it owns a key.
    sa.Column("bundle_id", sa.ForeignKey("bundle_task.bundle_id"), nullable=False, index=True),
    sa.Column("state", sa.String(8), nullable=False),  # sent | unwanted | gone
    # The process, or the attempt to delete, that sent the last request; null: no request is open.
    sa.Column("sender", sa.String(16)),
    sa.Column("settle_time", UtcDateTime),  # until then a request of an earlier sender may arrive; the database's clock
    sa.Column("size", sa.BigInteger),  # bytes; null until it is stored
    sa.Column("etag", sa.String(64)),  # MD5 in hex; null if the store's ETag is not an MD5
    sa.Column("part", sa.JSON(none_as_null=True)),  # its entry in the manifest; null if it is not a part
)  # fmt: skip
to_be_deleted = bundle_part.c.state.in_([sa.literal_column("'unwanted'"), sa.literal_column("'gone'")])
sa.Index(
    "bundle_part_to_be_deleted", bundle_part.c.bundle_id,
    sqlite_where=to_be_deleted, postgresql_where=to_be_deleted,
)  # fmt: skip

host = sa.Table(
    "host", metadata,
    sa.Column("host", sa.String(253), primary_key=True),
    sa.Column("state", sa.String(8), nullable=False),  # active | draining | drained | fenced
    sa.Column("lease", sa.String(32), nullable=False),  # the agent that may write: the last that started
    sa.Column("version", sa.String(32), nullable=False),  # Thrave's
    sa.Column("worker_concurrency", sa.Integer, nullable=False),
    sa.Column("start_time", UtcDateTime, nullable=False),
    sa.Column("heartbeat_time", UtcDateTime, nullable=False),
    # Settings of its agent, in seconds: a command of an operator may have other settings.
    sa.Column("heartbeat_interval", sa.Float, nullable=False, server_default="5"),
    sa.Column("heartbeat_timeout", sa.Float, nullable=False, server_default="60"),
    sa.Column("adopted_by", sa.String(253)),  # the host that has its tasks; null again after its agent started
)  # fmt: skip

# Instances as reported by the agents; the API of a fleet reads this table.
instance = sa.Table(
    "instance", metadata,
    sa.Column("instance_id", sa.String(32), primary_key=True),
    sa.Column("host", sa.ForeignKey("host.host", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("account_id", sa.String(12), nullable=False, index=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("document", sa.JSON, nullable=False),  # the instance as reported by its host
    sa.Column("report_time", UtcDateTime, nullable=False),
)  # fmt: skip

# The power state that the owner of an instance wants, and the pending request; see compute/power_records.py. One row
# for each instance of any host.
instance_power = sa.Table(
    "instance_power", metadata,
    sa.Column("instance_id", sa.String(32), primary_key=True),
    sa.Column("wanted", sa.String(16)),  # running | stopped | terminated; null: unknown
    sa.Column("request", sa.String(16)),  # pending: start | stop | reboot | terminate; null: none
    sa.Column("version", sa.Integer, nullable=False),  # number of requests so far
    # Whether the guest was asked to power off and was not observed off since.
    sa.Column("asked", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("requested_by", sa.String(128)),  # the account of the last request
    sa.Column("request_time", UtcDateTime),  # by the database's clock
    sa.Column("borrowed_by", sa.String(32)),  # the bundle task that keeps the instance off
)  # fmt: skip
sa.Index(
    "instance_power_to_do", instance_power.c.instance_id,
    sqlite_where=instance_power.c.request.is_not(None), postgresql_where=instance_power.c.request.is_not(None),
)  # fmt: skip
sa.Index(
    "instance_power_borrowed", instance_power.c.borrowed_by,
    sqlite_where=instance_power.c.borrowed_by.is_not(None), postgresql_where=instance_power.c.borrowed_by.is_not(None),
)  # fmt: skip

# With it a process checks that it has the same vault key and service identity as the other processes.
vault_check = sa.Table(
    "vault_check", metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),  # 1: there is one row
    sa.Column("encrypted", sa.LargeBinary, nullable=False),  # a known text
    sa.Column("identity", sa.String(64), nullable=False),  # ServiceIdentity.fingerprint
)  # fmt: skip


STATEMENT_TIMEOUT = 60.0  # seconds for one statement, unless a process passes another value
_CONNECT_TIMEOUT = 10.0  # seconds
_SERVER_KEEPALIVES = {"tcp_keepalives_idle": 10, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}  # seconds
_GRACE = 2.0  # seconds that a server may exceed a statement timeout before it counts as unavailable


def open_engine(
    url: str,
    *,
    timeout: float = STATEMENT_TIMEOUT,
    on_replaced: Callable[[DatabaseReplacedError], None] | None = None,
    pooled: bool = True,
) -> sa.Engine:
    """Open the database at a URL (`sqlite:////var/lib/thrave/thrave.db`, `postgresql://thrave@db.example/thrave`).

    SQLite uses WAL mode, so that readers never wait for the writer, with a timeout of 30 s for the write lock.
    Its file is compared with the one that was opened first, before each connection, transaction and commit.
    Connections to a server are tested before they are used again. The server ends the transaction of a host that
    crashed or hangs. Every wait for a server has a timeout: for a connection, for a free one of the pool, for a
    statement, and for a server that does not respond at all.

    Args:
        url: As above.
        timeout: Seconds for one statement on a server.
        on_replaced: Called when the file was deleted or replaced, before DatabaseReplacedError is raised. A service
            passes a function that ends the process. A replacement of the file's *content* is detected only with it.
        pooled: Whether connections to a server are kept for later; if not, closing one ends its session at once.
    """
    parsed = sa.make_url(url)
    # Parameters are hidden in errors: they include encrypted secrets and upload policies.
    if parsed.get_backend_name() == "sqlite":
        engine = sa.create_engine(parsed, hide_parameters=True)
        sa.event.listen(engine, "connect", _prepare_sqlite)
        _watch_file(engine, on_replaced)
        return engine
    connect_timeout = min(timeout, _CONNECT_TIMEOUT)
    pool: dict[str, Any] = (
        {"pool_pre_ping": True, "pool_timeout": connect_timeout} if pooled else {"poolclass": sa.NullPool}
    )
    engine = sa.create_engine(
        parsed.set(drivername="postgresql+psycopg"),
        **pool,
        hide_parameters=True,
        connect_args=_connection_options(parsed, connect_timeout),
    )
    sa.event.listen(engine, "do_connect", partial(_connect_postgresql, timeout))
    return engine


def with_connection_options(url: str) -> str:
    """Return a URL with our connection options, for a library that opens the database itself."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return url
    added = {name: str(value) for name, value in _connection_options(parsed, _CONNECT_TIMEOUT).items()}
    return parsed.update_query_dict(added).render_as_string(hide_password=False)


def _connection_options(url: sa.URL, connect_timeout: float) -> dict[str, int | str]:
    """Return libpq's options for a new connection, except those in the URL: time limits, also for a lost network."""
    options: dict[str, int | str] = {
        "connect_timeout": int(connect_timeout),
        "tcp_user_timeout": int(connect_timeout * 1000),
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        # Else psycopg returns text of a database with the encoding SQL_ASCII as bytes.
        "client_encoding": "utf8",
    }
    return {name: value for name, value in options.items() if name not in url.query}


def open_in_memory() -> sa.Engine:
    """Open a SQLite database in memory. It has one connection, which threads use in turn, and ends with its engine."""
    engine = sa.create_engine(
        "sqlite://", poolclass=sa.QueuePool, pool_size=1, max_overflow=0, connect_args={"check_same_thread": False}
    )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _connect_postgresql(
    timeout: float, _dialect: object, _record: object, args: tuple[object, ...], options: dict[str, object]
) -> object:
    """Connect to PostgreSQL; each statement ends after `timeout` seconds, even if the server does not respond."""
    import psycopg  # noqa: PLC0415 (importing it takes longer than opening SQLite)

    class Connection(psycopg.Connection[tuple[object, ...]]):
        """A connection that is closed when the server does not respond. The server limits statements."""

        timeout: float | None = None

        def wait(self, gen: Any, *more: Any, **options: Any) -> Any:  # noqa: ANN401 (as psycopg's own)
            return super().wait(gen if self.timeout is None else self._limited(gen, self.timeout), *more, **options)

        def _limited(self, gen: Generator[Any, Any, Any], timeout: float) -> Generator[Any, Any, Any]:
            deadline = monotonic() + timeout
            try:
                wait_state = next(gen)
                while True:
                    ready = yield wait_state
                    if not ready and monotonic() > deadline:
                        self.pgconn.finish()
                        raise psycopg.OperationalError(f"the server has not responded for {timeout:.0f} seconds")
                    wait_state = gen.send(ready)
            except StopIteration as end:
                return end.value

    connection = Connection.connect(*args, **options)  # type: ignore[arg-type]  # SQLAlchemy's arguments
    connection.timeout = timeout + _GRACE
    connection.execute(f"SET idle_in_transaction_session_timeout = {_MAX_IDLE}")
    connection.execute(f"SET statement_timeout = {int(timeout * 1000)}")
    for name, value in _SERVER_KEEPALIVES.items():  # or the server keeps the locks of a host that lost power
        connection.execute(f"SET {name} = {value}")
    connection.commit()
    return connection


def migrate(engine: sa.Engine) -> None:
    """Apply the missing migrations in one transaction.

    Raises:
        NewerDatabaseError: A later release created the tables.
    """
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            driver: Any = connection.connection.driver_connection
            driver.timeout = None  # a migration of a large table has no time limit
            connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
            connection.detach()  # from the pool, so that it is closed afterwards
        begin_exclusive(connection)
        applied, known = migrations(connection)
        if applied is not None and applied not in known:
            raise NewerDatabaseError(
                f"{display_name(str(engine.url))} was changed by a newer Thrave: its tables have migration {applied}, "
                f"this release has {known[0]}. Install the newer release again."
            )
        if applied != known[0]:
            _upgrade(connection)


def begin_exclusive(connection: sa.Connection) -> None:
    """Begin a transaction that changes data of all processes. Only one such transaction runs at a time."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
    else:  # Python's sqlite3 begins none before CREATE TABLE: a crash would leave half of the tables
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def display_name(url: str) -> str:
    """Return a database's name for messages: the path of the file, or the address of the server, without password."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return str(parsed.database)
    return f"PostgreSQL at {parsed.host or 'localhost'}:{parsed.port or 5432}"


def explain(error: sa.exc.DBAPIError, url: str) -> DatabaseUnusableError:
    """Return an error that says why the database at a URL failed and what to do, without the failed statement."""
    name, cause = display_name(url), error.orig
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorname", "SQLITE_ERROR")
        for condition, message in _SQLITE_CONDITIONS:
            if code.startswith(condition):
                return DatabaseUnusableError(f"the database {name} {message}")
        return DatabaseUnusableError(f"the database {name} cannot be used: SQLite reports {code}")
    state = getattr(cause, "sqlstate", None)
    if state is None:
        return DatabaseUnusableError(f"{name} does not answer. Start it, or check the setting database_url.")
    for condition, message in _POSTGRESQL_CONDITIONS:
        if state.startswith(condition):
            return DatabaseUnusableError(f"{name} {message}")
    return DatabaseUnusableError(f"{name} reports an error (SQLSTATE {state})")


def _watch_file(engine: sa.Engine, on_replaced: Callable[[DatabaseReplacedError], None] | None) -> None:
    if not engine.url.database:  # in memory
        return
    file = _DatabaseFile(Path(engine.url.database), on_replaced)
    sa.event.listen(engine, "do_connect", lambda *_: file.check())
    sa.event.listen(engine, "connect", lambda *_: file.record_identity())
    sa.event.listen(engine, "begin", lambda _: file.check())
    sa.event.listen(engine, "commit", lambda _: file.check())
    if on_replaced is not None:
        file.write_mark(engine)


class _DatabaseFile:
    """Detects that the file of a SQLite database was deleted or replaced while it is open.

    After that the path has no file or another inode. Copying a backup over the file keeps the inode. For that case a
    random number is written into the header field user_version, which has no other use.
    """

    def __init__(self, path: Path, on_replaced: Callable[[DatabaseReplacedError], None] | None) -> None:
        self._path = path
        self._on_replaced = on_replaced
        self._identity: tuple[int, int] | None = None
        self._header: int | None = None  # a descriptor
        self._mark = b""
        self._is_mark_in_file = False

    def record_identity(self) -> None:
        """Record the identity of the file that the first connection opened."""
        if self._identity is None:
            self._identity = self._current()

    def write_mark(self, engine: sa.Engine) -> None:
        """Write a number into the header that no other copy of the database has."""
        number = random_below(2**31)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA user_version = {number}")
        # Never closed: closing any descriptor of a file releases all locks of the process on it (POSIX), SQLite's too.
        self._header = os.open(self._path, os.O_RDONLY)
        self._mark = number.to_bytes(4, "big")
        with engine.connect() as connection:  # copies the number from the write-ahead log into the file
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").all()
        _service_files[str(self._path)] = self

    def check(self) -> None:
        """Raise DatabaseReplacedError if the path now has another file, or other content."""
        if self._identity is None or (self._identity == self._current() and self._has_mark()):
            return
        error = DatabaseReplacedError(
            f"the database {self._path} was deleted or replaced while it was open; nothing was written since. Restore "
            "the right file while no Thrave process runs, then start again."
        )
        if self._on_replaced is not None:
            self._on_replaced(error)
        raise error

    def _current(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _has_mark(self) -> bool:
        if self._header is None:
            return True
        # Offset 60 of the header is user_version. Source: SQLite, "Database File Format", 1.3.
        if os.pread(self._header, len(self._mark), 60) == self._mark:
            self._is_mark_in_file = True
            return True
        return not self._is_mark_in_file  # a reader may have delayed the copy from the log into the file


def migrations(connection: sa.Connection) -> tuple[str | None, list[str]]:
    """Return the last applied migration, if any, and all migrations of this release, newest first."""
    applied = None
    if sa.inspect(connection).has_table(VERSION_TABLE):
        applied = connection.execute(sa.select(sa.column("version_num")).select_from(sa.table(VERSION_TABLE))).scalar()
    return applied, sorted((file.name.partition("_")[0] for file in _MIGRATIONS.glob("versions/*.py")), reverse=True)


_SQLITE_UNAVAILABLE = (
    "SQLITE_BUSY", "SQLITE_CANTOPEN", "SQLITE_CORRUPT", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_LOCKED", "SQLITE_NOMEM",
    "SQLITE_NOTADB", "SQLITE_PROTOCOL", "SQLITE_READONLY",
)  # fmt: skip
# SQLSTATE classes: connection exception, transaction rollback (serialization, deadlock), insufficient resources,
# operator intervention, system error; and a transaction that may only read, or that the server has ended since it was
# idle. Source: PostgreSQL's documentation, appendix A.
_STATES_UNAVAILABLE = ("08", "25006", "25P03", "40", "53", "57", "58")


def is_unavailable(error: BaseException) -> bool:
    """Whether an error of the database is transient.

    Then the database is down, full or locked, has no free connection, or has ended the transaction. A wrong statement,
    or data that a constraint forbids, is an error of the program or of its caller.
    """
    if isinstance(error, sa.exc.TimeoutError):  # all connections of the pool are in use
        return True
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    if isinstance(
        error.orig, sqlite3.Error
    ):  # its exception classes are the same for a wrong statement and a full disk
        name = getattr(error.orig, "sqlite_errorname", None)
        return (
            isinstance(error.orig, sqlite3.OperationalError) if name is None else name.startswith(_SQLITE_UNAVAILABLE)
        )
    state = getattr(error.orig, "sqlstate", None) or ""
    # psycopg raises OperationalError for most of them, but not for a server that has become a standby.
    return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError) or state.startswith(_STATES_UNAVAILABLE)


def _upgrade(connection: sa.Connection) -> None:
    from alembic import command  # noqa: PLC0415 (importing it takes as long as the rest of a command; most commands need no migration)
    from alembic.config import Config  # noqa: PLC0415 (as above)

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _provide_unixepoch(connection: object, _record: object) -> None:
    """Define `unixepoch('subsec')` on an SQLite connection whose library lacks it: seconds since 1970, as a float.

    SQLite before 3.42 returns NULL for it, before 3.38 it has no such function. On Python 3.12 and newer, DBOS uses it
    in its statements and in the defaults of the tables that it creates. So a database can need the function whatever
    the Python that opens it.
    """
    if not isinstance(connection, sqlite3.Connection):
        return
    try:
        is_defined = connection.execute("SELECT unixepoch('subsec')").fetchone()[0] is not None
    except sqlite3.OperationalError:
        is_defined = False
    if not is_defined:
        connection.create_function("unixepoch", 1, _unixepoch)


def _unixepoch(modifier: str) -> float:
    if modifier != "subsec":
        raise ValueError(modifier)
    return int(wall_time() * 1000) / 1000  # to the millisecond, as SQLite


def _thrave_now(seconds: float) -> str:
    """Return the time in the format in which SQLAlchemy stores it."""
    return f"{(utc_now() + timedelta(seconds=seconds)).replace(tzinfo=None).isoformat(' ', 'microseconds')}"


_service_files: dict[str, _DatabaseFile] = {}
"""The database file of the service that this process runs, by its path."""


def _check_before_connecting(_dialect: object, _record: object, args: list[object], _options: object) -> None:
    if args and (file := _service_files.get(str(args[0]))):
        file.check()


def _check_before_transaction(connection: sa.Connection) -> None:
    if file := _service_files.get(connection.engine.url.database or ""):
        file.check()


# On the class: DBOS creates engines of its own, and does not let its callers configure all of them.
sa.event.listen(sa.Engine, "connect", _provide_unixepoch)
sa.event.listen(sa.Engine, "do_connect", _check_before_connecting)
sa.event.listen(sa.Engine, "begin", _check_before_transaction)


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # SQLite's own strftime has milliseconds only, and tasks are listed in the order of their start times.
    connection.create_function("thrave_now", 1, _thrave_now)
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "busy_timeout=30000", "foreign_keys=ON", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
