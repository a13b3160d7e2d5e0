"""The database of a simulated fleet: real SQLite in memory, with one transaction at a time and faults between them.

Every run begins with a copy of one prepared database. A transaction is atomic, as in a database with serializable
isolation: no other thread runs while one is open. The faults are those of a database that fails as a whole: it does not
respond, or a commit fails, or a commit succeeds and its response is lost.
"""

import sqlite3
from collections import deque
from contextlib import contextmanager

import sqlalchemy as sa

from thrave.database import _prepare_sqlite, metadata
from thrave.tasks.created_buckets import BucketBusyError

SCHEMA = """
CREATE TABLE workflow (id TEXT PRIMARY KEY, bundle_id TEXT, host TEXT, state TEXT);
"""


class _KeptConnection(sqlite3.Connection):
    """A connection that SQLAlchemy cannot close: it would close one in which a thread of a killed process was."""

    def close(self):
        self.rollback()


class SimulatedDatabase:
    """One database for all runs in this process; `reset` gives it the prepared content.

    Attributes:
        engine: What the product uses.
        faults: Called before each transaction and before and after each commit with the moment's name; may raise.
        commits: Number of commits that have changed something.
    """

    def __init__(self):
        self._raw = _KeptConnection(":memory:", check_same_thread=False)
        self.engine = sa.create_engine("sqlite://", creator=lambda: self._raw, poolclass=sa.QueuePool, pool_size=1)
        sa.event.listen(self.engine, "connect", _prepare_sqlite)
        metadata.create_all(self.engine)
        self._scheduler = None
        self._user = None
        self._waiters = deque()
        self.faults = lambda moment: None
        self.after_commit = lambda: None
        self.commits = 0
        self._raw.executescript(SCHEMA)
        self._connect = self.engine.connect
        self.engine.connect = self._open
        self._commit = self.engine.dialect.do_commit
        self.engine.dialect.do_commit = self._do_commit
        sa.event.listen(self.engine, "checkin", self._closed)

    def save(self):
        """Keep the present content: every run begins with it."""
        self._saved = self._raw.serialize()

    def reset(self, scheduler):
        """Begin a run on the saved content."""
        self._scheduler = scheduler
        self._user = None
        self._waiters = deque()
        self._raw.rollback()
        self._raw.deserialize(self._saved)

    def rows(self, statement, *values):
        """Read or write outside of the simulation: without a switch and without a fault."""
        found = self._raw.execute(statement, values).fetchall()
        if self._user is None and self._raw.in_transaction:
            self.commits += 1
            self._raw.commit()
        return found

    def _open(self):
        scheduler = self._scheduler
        if scheduler is None or scheduler.current is None:
            return self._connect()
        if self._user is scheduler.current:
            # With a pool of connections this is a deadlock once every thread waits for its second one.
            raise RuntimeError(f"{scheduler.current.name} opens a connection while it has one")
        scheduler.switch_point()
        while self._user is not None:
            scheduler.wait_in(self._waiters)
        self.faults("begin")
        self._user = scheduler.current
        return self._connect()

    def _closed(self, *_):
        self._user = None
        if self._waiters:
            self._scheduler.make_ready(self._waiters.popleft())

    def _do_commit(self, connection):
        scheduler = self._scheduler
        if scheduler is None or scheduler.current is None:
            self._commit(connection)
            return
        scheduler.check_alive()
        writes = self._raw.in_transaction
        if writes:
            self.faults("commit")
        self._commit(connection)
        if writes:
            self.commits += 1
            self.after_commit()
            self.faults("committed")


class AdvisoryLock:
    """A lock of PostgreSQL for all processes, in place of `created_buckets._SharedLock`; a dead process has none."""

    def __init__(self, scheduler):
        self._scheduler = scheduler
        self._holders = {}  # whether it is exclusive, by holder

    @contextmanager
    def held(self, *, exclusive, timeout):
        """Hold the lock. Raises BucketBusyError if it is not available within `timeout` seconds."""
        until = self._scheduler.now + timeout
        while self._holders and (exclusive or any(self._holders.values())):
            if self._scheduler.now >= until:
                raise BucketBusyError
            self._scheduler.sleep(1.0)
        process, holder = self._scheduler.current.process, object()
        self._holders[holder] = exclusive

        def release():
            self._holders.pop(holder, None)

        process.at_exit.append(release)
        try:
            yield
        finally:
            release()
            process.at_exit.remove(release)


def unavailable(text="unable to open database file"):
    """The error of a database that does not respond, as SQLAlchemy raises it."""
    return sa.exc.OperationalError("SELECT 1", None, sqlite3.OperationalError(text))


def lost_commit():
    """The error of the driver when the response to a commit is lost."""
    return sqlite3.OperationalError("disk I/O error")
