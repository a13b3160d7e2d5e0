"""The database: its tables, how it is opened and migrated.

Every table of ours stands here, as SQLAlchemy Core tables, so that a reader sees at once what Thrave remembers. The
durable engine keeps its own tables beside them and these modules never read those. No secret is stored in the
clear: columns named `encrypted…` hold what `vault.py` encrypted with a key that is not in the database.

    DatabaseUnusableError
    ├── NewerDatabaseError       a later release made the tables
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
"""Where Alembic notes the last migration."""
_MIGRATIONS = Path(__file__).parent / "migrations"  # each file's name begins with its revision and an underscore

_STANDSTILL = 20_000  # milliseconds
_MIGRATION_LOCK = 0x7468726176650000  # a number that nobody else locks: "thrave"


# SQLite's names of conditions that an operator can act on; the first that fits decides.
_SQLITE_CONDITIONS = (
    ("SQLITE_BUSY", "is locked by another program. Stop that program, or try again later."),
    ("SQLITE_LOCKED", "is locked by another program. Stop that program, or try again later."),
    ("SQLITE_NOTADB", "is not a SQLite database. Restore it from a backup."),
    ("SQLITE_CORRUPT", "is damaged. Restore it from a backup."),
    ("SQLITE_FULL", "cannot be written: the disk is full. Make room."),
    ("SQLITE_READONLY", "cannot be written. Check the owner and mode of the file and of its directory."),
    ("SQLITE_PERM", "cannot be opened. Check the owner and mode of the file and of its directory."),
    ("SQLITE_CANTOPEN", "cannot be opened. Check the owner and mode of the file and of its directory."),
    ("SQLITE_IOERR", "cannot be read or written: the disk reports an error. Check the disk and the system log."),
)
# SQLSTATE classes and codes of PostgreSQL, as the above. Source: PostgreSQL's documentation, appendix A.
_POSTGRESQL_CONDITIONS = (
    ("28", "refuses the user or the password. Check the setting database_url and ~/.pgpass."),
    ("3D", "has no such database. Create it, or check the setting database_url."),
    ("53300", "has no free connection. Raise its max_connections, or stop other clients."),
    ("53", "has too few resources (memory or disk)."),
    ("57", "is shutting down or starting. Try again later."),
    ("42501", "refuses this user the right. Grant the user of database_url its tables."),
    ("25006", "is read-only. Connect to the primary server."),
)


class DatabaseUnusableError(Exception):
    """The database cannot be used; the message names it and says what to do."""


class NewerDatabaseError(DatabaseUnusableError):
    """A later release of Thrave has changed the tables."""


class DatabaseReplacedError(DatabaseUnusableError):
    """The database's file was deleted, or another file has its name, since it was opened."""


class UtcDateTime(sa.TypeDecorator[datetime]):
    """A point in time, aware, in UTC, to the microsecond (SQLite itself forgets the zone)."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002 (SQLAlchemy's signature)
        """Store as naive UTC."""
        return value and value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002 (SQLAlchemy's signature)
        """Read as aware UTC."""
        return value and value.replace(tzinfo=UTC)


class now(sa.sql.functions.FunctionElement[datetime]):  # noqa: N801 (used like a function, as sa.func.now)
    """The time of the database's clock when the statement began, plus some seconds (a number or a column).

    Whatever is compared between processes is set and compared by this: their machines' clocks may differ. On SQLite it
    is this machine's clock, since all processes that open the file run on this machine.
    """

    type = UtcDateTime()
    inherit_cache = True
    name = "now"

    def __init__(self, seconds: "float | sa.ColumnElement[float]" = 0.0) -> None:
        super().__init__(sa.literal(seconds, sa.Float) if isinstance(seconds, int | float) else seconds)


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **options: Any) -> str:  # noqa: ANN401 (SQLAlchemy has no type for it)
    seconds = compiler.process(element.clauses, **options)
    # Not the transaction's time: it may have waited for a lock since. A stable function, so that an index is used.
    return f"(timezone('UTC', statement_timestamp()) + make_interval(secs => CAST({seconds} AS double precision)))"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **options: Any) -> str:  # noqa: ANN401 (SQLAlchemy has no type for it)
    return f"thrave_now({compiler.process(element.clauses, **options)})"


account = sa.Table(
    "account", metadata,
    sa.Column("account_id", sa.String(12), primary_key=True),
    sa.Column("name", sa.String(128), nullable=False, unique=True),
    sa.Column("certificate", sa.Text),  # PEM; bundles are encrypted to it
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

# One account's user names are told apart without case, as IAM's.
sa.Index("iam_user_by_name", iam_user.c.account_id, sa.func.lower(iam_user.c.user_name), unique=True)

user_policy = sa.Table(
    "user_policy", metadata,
    sa.Column("user_id", sa.ForeignKey("iam_user.user_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("policy_name", sa.String(128), primary_key=True),
    sa.Column("document", sa.Text, nullable=False),  # JSON, as it was given
)  # fmt: skip

access_key = sa.Table(
    "access_key", metadata,
    sa.Column("access_key_id", sa.String(32), primary_key=True),
    sa.Column("account_id", sa.ForeignKey("account.account_id"), nullable=False, index=True),
    sa.Column("user_id", sa.ForeignKey("iam_user.user_id", ondelete="CASCADE"), index=True),  # null: the account's own
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
    sa.Column("host", sa.String(253), nullable=False),  # the one that has the disk
    sa.Column("state", sa.String(24), nullable=False),
    # What its host does next (tasks/models.py). From the transaction that sets error_code on, a step that undoes.
    sa.Column("next_step", sa.String(16), nullable=False, server_default="stop"),
    sa.Column("progress", sa.Integer),  # percent within bundling or storing
    sa.Column("start_time", UtcDateTime, nullable=False, default=now()),
    sa.Column("update_time", UtcDateTime, nullable=False, default=now()),
    sa.Column("bucket", sa.String(255), nullable=False),
    sa.Column("prefix", sa.String(1024), nullable=False),
    sa.Column("access_key_id", sa.String(32), nullable=False),
    # Whether its request created the bucket; null once nothing is to be done about that any more.
    sa.Column("created_bucket", sa.Boolean),
    sa.Column("encrypted_policy", sa.LargeBinary),  # upload policy and signature; erased when the task ends
    sa.Column("encrypted_bundle_key", sa.LargeBinary),  # the bundle's key and IV; erased when the task ends
    sa.Column("part_series", sa.String(12)),  # digits in the names of its parts; null until its sealing has begun
    sa.Column("checkpoint", sa.JSON(none_as_null=True)),  # where sealing goes on after a crash
    sa.Column("documents", sa.JSON(none_as_null=True)),  # manifest and side file, once every part is stored
    sa.Column("earlier", sa.JSON(none_as_null=True)),  # what it replaces: a manifest, and keys
    # Whether its manifest may have been sent; from then on it cannot be cancelled.
    sa.Column("manifest_sent", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("overlay", sa.JSON(none_as_null=True)),  # its root volume and the overlay, until that is merged
    sa.Column("power_recovery_until", UtcDateTime),  # until then the guest may obey a void request to power off
    sa.Column("was_running", sa.Boolean),  # the instance's power state, recorded before it is touched
    sa.Column("error_code", sa.String(64)),  # set before anything is undone, so also of a task that has not ended
    sa.Column("error_message", sa.Text),
    sa.Column("warning", sa.Text),  # for the owner; the task continued
    sa.Column("volume_size", sa.BigInteger),  # bytes of the root volume; null until it has been opened
    # How often a host took it up, and the number of its last run, which alone may write.
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Index("bundle_task_by_account", "account_id", "start_time"),
    sa.Index("bundle_task_by_start_time", "start_time", "bundle_id"),
    sa.Index("bundle_task_by_update_time", "update_time"),
)  # fmt: skip

# True of a task that has not ended. The states stand in the SQL itself, not in parameters: else no database would use
# the index below for a query that has this condition.
task_in_progress = bundle_task.c.state.not_in([sa.literal_column("'complete'"), sa.literal_column("'failed'")])

# One task at a time per instance: the database itself refuses the second, whoever sends it.
sa.Index(
    "bundle_task_in_progress", bundle_task.c.instance_id, unique=True,
    sqlite_where=task_in_progress, postgresql_where=task_in_progress,
)  # fmt: skip

# One task at a time per bucket and prefix, of all accounts: two would write the same manifest.
sa.Index(
    "bundle_task_place_in_progress", bundle_task.c.bucket, bundle_task.c.prefix, unique=True,
    sqlite_where=task_in_progress, postgresql_where=task_in_progress,
)  # fmt: skip
sa.Index("bundle_task_by_place", bundle_task.c.bucket, bundle_task.c.prefix)  # asked for the names of its parts

_replaces = sa.and_(bundle_task.c.earlier.is_not(None), bundle_task.c.state == sa.literal_column("'complete'"))
sa.Index(
    "bundle_task_replaces", bundle_task.c.host, sqlite_where=_replaces, postgresql_where=_replaces,
)  # fmt: skip

sa.Index(
    "bundle_task_created_bucket", bundle_task.c.host,
    sqlite_where=bundle_task.c.created_bucket.is_not(None), postgresql_where=bundle_task.c.created_bucket.is_not(None),
)  # fmt: skip

# What a host asks for every second must not cost more with every task that has ended.
sa.Index(
    "bundle_task_in_progress_on_host", bundle_task.c.host,
    sqlite_where=task_in_progress, postgresql_where=task_in_progress,
)  # fmt: skip
sa.Index(  # asked before each new task
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
    sa.Column("message", sa.Text),  # null: it came into that state; else what happened in it
)  # fmt: skip

# Every object that a task has begun to write, or has to delete: a key has one owner (`tasks/claims.py`).
bundle_part = sa.Table(
    "bundle_part", metadata,
    sa.Column("bucket", sa.String(255), primary_key=True),
    sa.Column("key", sa.String(1024), primary_key=True),  # recorded before it is sent, so that cleanup misses none
    # No cascade: a task's record cannot be deleted while it owns a key.
    sa.Column("bundle_id", sa.ForeignKey("bundle_task.bundle_id"), nullable=False, index=True),
    sa.Column("state", sa.String(8), nullable=False),  # sent | unwanted | gone
    sa.Column("run", sa.String(16)),  # whose request about it may be under way; null: none is
    sa.Column("settle_time", UtcDateTime),  # until then a request of an earlier run may arrive; the database's clock
    sa.Column("size", sa.BigInteger),  # bytes; null until the store has taken it
    sa.Column("etag", sa.String(64)),  # MD5 in hex; null where the store's is none
    sa.Column("part", sa.JSON(none_as_null=True)),  # what the manifest says of it; null if it is no part
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
    sa.Column("lease", sa.String(32), nullable=False),  # which of its agents may write: the last one that started
    sa.Column("version", sa.String(32), nullable=False),  # Thrave's
    sa.Column("worker_concurrency", sa.Integer, nullable=False),
    sa.Column("start_time", UtcDateTime, nullable=False),
    sa.Column("heartbeat_time", UtcDateTime, nullable=False),
    # Its agent's own settings, in seconds: an operator's command may have others.
    sa.Column("heartbeat_interval", sa.Float, nullable=False, server_default="5"),
    sa.Column("heartbeat_timeout", sa.Float, nullable=False, server_default="60"),
    sa.Column("adopted_by", sa.String(253)),  # the host that has its tasks; null again once its agent is started
)  # fmt: skip

# What the agents report of their instances; the API answers from here.
instance = sa.Table(
    "instance", metadata,
    sa.Column("instance_id", sa.String(32), primary_key=True),
    sa.Column("host", sa.ForeignKey("host.host", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("account_id", sa.String(12), nullable=False, index=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("document", sa.JSON, nullable=False),  # the instance, as its host describes it
    sa.Column("report_time", UtcDateTime, nullable=False),
)  # fmt: skip

# The power state that the owner of an instance wants, and the pending request; see compute/power_records.py. One row
# for each instance of any host.
instance_power = sa.Table(
    "instance_power", metadata,
    sa.Column("instance_id", sa.String(32), primary_key=True),
    sa.Column("wanted", sa.String(16)),  # running | stopped | terminated; null: not known yet
    sa.Column("request", sa.String(16)),  # pending: start | stop | reboot | terminate; null: none
    sa.Column("version", sa.Integer, nullable=False),  # number of requests so far
    # Whether the guest has been asked to power off and has not been seen off since.
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

# Lets a process check, before it uses them, that it has the vault key and the service identity of the others.
vault_check = sa.Table(
    "vault_check", metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),  # 1: there is one row
    sa.Column("encrypted", sa.LargeBinary, nullable=False),  # a known text
    sa.Column("identity", sa.String(64), nullable=False),  # ServiceIdentity.fingerprint
)  # fmt: skip


TIMEOUT = 60.0  # seconds for one statement, unless a process needs its answers sooner
_CONNECT_TIMEOUT = 10.0  # seconds
_SERVER_KEEPALIVES = {"tcp_keepalives_idle": 10, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}  # seconds
_GRACE = 2.0  # seconds after which a server that should have ended a statement is taken for dead


def open_engine(
    url: str,
    *,
    timeout: float = TIMEOUT,
    replaced: Callable[[DatabaseReplacedError], None] | None = None,
    pooled: bool = True,
) -> sa.Engine:
    """Open the database at a URL (`sqlite:////var/lib/thrave/thrave.db`, `postgresql://thrave@db.example/thrave`).

    SQLite is put into WAL mode, so that readers never wait for the writer, with a timeout of 30 s for the write lock.
    Its file is compared with the one that was opened first, before each connection, transaction and commit.
    Connections to a server are tried before they are used again. A server ends the transaction of a host that died, or
    stands still. No wait for a server is without an end: for a connection, for a free one of the pool, for a statement,
    and for a server that does not respond at all.

    Args:
        url: As above.
        timeout: Seconds for one statement on a server.
        replaced: Called when the file was deleted or replaced, before DatabaseReplacedError is raised. A service gives
            a function that ends the process. Only then replacement of the file's *content* is detected as well.
        pooled: Whether connections to a server are kept for later; if not, closing one ends its session at once.
    """
    given = sa.make_url(url)
    is_file = given.get_backend_name() == "sqlite"
    driven = given if is_file else given.set(drivername="postgresql+psycopg")
    # An error's text would show what was to be stored, sealed secrets and upload policies among it.
    if is_file:
        engine = sa.create_engine(driven, hide_parameters=True)
        sa.event.listen(engine, "connect", _prepare_sqlite)
        _watch_file(engine, replaced)
        return engine
    waits = min(timeout, _CONNECT_TIMEOUT)
    pool: dict[str, Any] = {"pool_pre_ping": True, "pool_timeout": waits} if pooled else {"poolclass": sa.NullPool}
    engine = sa.create_engine(
        driven,
        **pool,
        hide_parameters=True,
        connect_args={name: value for name, value in _timeouts(waits).items() if name not in given.query},
    )
    sa.event.listen(engine, "do_connect", partial(_connect_postgresql, timeout))
    return engine


def with_timeouts(url: str) -> str:
    """The same URL for a library that opens the database itself, so that it does not wait for a dead server."""
    given = sa.make_url(url)
    if given.get_backend_name() == "sqlite":
        return url
    added = {name: str(value) for name, value in _timeouts(_CONNECT_TIMEOUT).items() if name not in given.query}
    return given.update_query_dict(added).render_as_string(hide_password=False)


def _timeouts(seconds: float) -> dict[str, int]:
    """What libpq waits for at the most: a new connection, and a server to which the network is cut."""
    return {
        "connect_timeout": int(seconds),
        "tcp_user_timeout": int(seconds * 1000),
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
    }


def open_in_memory() -> sa.Engine:
    """A SQLite database that ends with its engine. It has one connection: its users take turns."""
    engine = sa.create_engine(
        "sqlite://", poolclass=sa.QueuePool, pool_size=1, max_overflow=0, connect_args={"check_same_thread": False}
    )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _connect_postgresql(
    timeout: float, _dialect: object, _record: object, args: tuple[object, ...], options: dict[str, object]
) -> object:
    """A connection to PostgreSQL whose statements end after `timeout` seconds, whatever becomes of the server."""
    import psycopg  # noqa: PLC0415 (takes longer to import than SQLite to open)

    class Connection(psycopg.Connection[tuple[object, ...]]):
        """A connection that is closed when its server does not respond; a statement's own timeout is the server's."""

        timeout: float | None = None

        def wait(self, gen: Any, *more: Any, **options: Any) -> Any:  # noqa: ANN401 (as psycopg's own)
            return super().wait(gen if self.timeout is None else self._limited(gen, self.timeout), *more, **options)

        def _limited(self, gen: Generator[Any, Any, Any], timeout: float) -> Generator[Any, Any, Any]:
            deadline = monotonic() + timeout
            try:
                waits_for = next(gen)
                while True:
                    ready = yield waits_for
                    if not ready and monotonic() > deadline:
                        self.pgconn.finish()
                        raise psycopg.OperationalError(f"the server has not responded for {timeout:.0f} seconds")
                    waits_for = gen.send(ready)
            except StopIteration as end:
                return end.value

    connection = Connection.connect(*args, **options)  # type: ignore[arg-type]  # SQLAlchemy has made them
    connection.timeout = timeout + _GRACE
    connection.execute(f"SET idle_in_transaction_session_timeout = {_STANDSTILL}")
    connection.execute(f"SET statement_timeout = {int(timeout * 1000)}")
    for name, value in _SERVER_KEEPALIVES.items():  # else the server keeps the locks of a host that lost its power
        connection.execute(f"SET {name} = {value}")
    connection.commit()
    return connection


def migrate(engine: sa.Engine) -> None:
    """Bring the tables to this release's shape, in one transaction; does nothing when they have it already.

    Raises:
        NewerDatabaseError: A later release made the tables.
    """
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            driver: Any = connection.connection.driver_connection
            driver.timeout = None  # a large table takes as long as it takes
            connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
            connection.detach()  # from the pool: it is closed in the end
        lock(connection)
        made, known = migrations(connection)
        if made is not None and made not in known:
            raise NewerDatabaseError(
                f"{place(str(engine.url))} was made by a newer Thrave: its tables have migration {made}, this release "
                f"has {known[0]}. Install the newer release again."
            )
        if made != known[0]:
            _upgrade(connection)


def lock(connection: sa.Connection) -> None:
    """Begin a transaction that changes what all processes share; another such one waits for its end."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
    else:  # Python's sqlite3 begins none before CREATE TABLE, so a crash would leave half of the tables
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def place(url: str) -> str:
    """Name the database of a URL in a message: the file's path, or the server's address, without a password."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return str(parsed.database)
    return f"PostgreSQL at {parsed.host or 'localhost'}:{parsed.port or 5432}"


def explain(error: sa.exc.DBAPIError, url: str) -> DatabaseUnusableError:
    """Say in words of ours, and with what to do, why the database at a URL failed. Has nothing of the statement."""
    name, cause = place(url), error.orig
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorname", "SQLITE_ERROR")
        for condition, words in _SQLITE_CONDITIONS:
            if code.startswith(condition):
                return DatabaseUnusableError(f"the database {name} {words}")
        return DatabaseUnusableError(f"the database {name} cannot be used: SQLite reports {code}")
    state = getattr(cause, "sqlstate", None)
    if state is None:
        return DatabaseUnusableError(f"{name} does not answer. Start it, or check the setting database_url.")
    for condition, words in _POSTGRESQL_CONDITIONS:
        if state.startswith(condition):
            return DatabaseUnusableError(f"{name} {words}")
    return DatabaseUnusableError(f"{name} reports an error (SQLSTATE {state})")


def _watch_file(engine: sa.Engine, replaced: Callable[[DatabaseReplacedError], None] | None) -> None:
    if not engine.url.database:  # in memory
        return
    file = _DatabaseFile(Path(engine.url.database), replaced)
    sa.event.listen(engine, "do_connect", lambda *_: file.check())
    sa.event.listen(engine, "connect", lambda *_: file.opened())
    sa.event.listen(engine, "begin", lambda _: file.check())
    sa.event.listen(engine, "commit", lambda _: file.check())
    if replaced is not None:
        file.mark(engine)


class _DatabaseFile:
    """The file of a SQLite database, compared with what was opened.

    Deleting or replacing the file gives its name to no file, or to another inode. Copying a backup over it keeps the
    inode: for that case a random number is written into the header's field user_version, which nothing else uses.
    """

    def __init__(self, path: Path, replaced: Callable[[DatabaseReplacedError], None] | None) -> None:
        self._path = path
        self._replaced = replaced
        self._identity: tuple[int, int] | None = None
        self._header: int | None = None  # a descriptor
        self._mark = b""
        self._has_been_seen = False

    def opened(self) -> None:
        """Remember which file the first connection has opened."""
        if self._identity is None:
            self._identity = self._current()

    def mark(self, engine: sa.Engine) -> None:
        """Write a number into the header that no other copy of the database has."""
        number = random_below(2**31)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA user_version = {number}")
        # Never closed: closing any descriptor of the file would release the locks that SQLite holds on it (POSIX).
        self._header = os.open(self._path, os.O_RDONLY)
        self._mark = number.to_bytes(4, "big")
        with engine.connect() as connection:  # from the write-ahead log into the file
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").all()
        _service_files[str(self._path)] = self

    def check(self) -> None:
        """Raise DatabaseReplacedError if the path leads to another file, or to other content."""
        if self._identity is None or (self._identity == self._current() and self._has_mark()):
            return
        error = DatabaseReplacedError(
            f"the database {self._path} was deleted or replaced while it was open; nothing was written since. Restore "
            "the right file while no Thrave process runs, then start again."
        )
        if self._replaced is not None:
            self._replaced(error)
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
            self._has_been_seen = True
            return True
        return not self._has_been_seen  # a reader may have kept the log from being written into the file


def migrations(connection: sa.Connection) -> tuple[str | None, list[str]]:
    """The last migration that the tables have had, if any, and all that this release knows, the newest first."""
    made = None
    if sa.inspect(connection).has_table(VERSION_TABLE):
        made = connection.execute(sa.select(sa.column("version_num")).select_from(sa.table(VERSION_TABLE))).scalar()
    return made, sorted((file.name.partition("_")[0] for file in _MIGRATIONS.glob("versions/*.py")), reverse=True)


_SQLITE_UNAVAILABLE = (
    "SQLITE_BUSY", "SQLITE_CANTOPEN", "SQLITE_CORRUPT", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_LOCKED", "SQLITE_NOMEM",
    "SQLITE_NOTADB", "SQLITE_PROTOCOL", "SQLITE_READONLY",
)  # fmt: skip
# SQLSTATE classes: connection exception, transaction rollback (serialization, deadlock), insufficient resources,
# operator intervention, system error; and a transaction that may only read, or that the server has ended since it was
# idle. Source: PostgreSQL's documentation, appendix A.
_STATES_UNAVAILABLE = ("08", "25006", "25P03", "40", "53", "57", "58")


def is_unavailable(error: BaseException) -> bool:
    """Say whether an error of the database may pass.

    It is down, full, locked, has no free connection, or has ended the transaction. A statement that is wrong, or data
    that a rule forbids, is an error of the program or of its caller and none of these.
    """
    if isinstance(error, sa.exc.TimeoutError):  # all connections of the pool are in use
        return True
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):  # its classes do not tell a wrong statement from a full disk
        name = getattr(error.orig, "sqlite_errorname", None)
        return (
            isinstance(error.orig, sqlite3.OperationalError) if name is None else name.startswith(_SQLITE_UNAVAILABLE)
        )
    state = getattr(error.orig, "sqlstate", None) or ""
    # psycopg gives OperationalError for most of them; a server that has become a standby is another matter to it.
    return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError) or state.startswith(_STATES_UNAVAILABLE)


def _upgrade(connection: sa.Connection) -> None:
    from alembic import command  # noqa: PLC0415 (takes as long to import as the rest of a command; most need it not)
    from alembic.config import Config  # noqa: PLC0415 (see above)

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
    """The time in the form in which SQLAlchemy stores it."""
    return f"{(utc_now() + timedelta(seconds=seconds)).replace(tzinfo=None).isoformat(' ', 'microseconds')}"


_service_files: dict[str, _DatabaseFile] = {}
"""The file that this process runs a service on, by its path."""


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
