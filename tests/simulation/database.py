"""The database of a simulated fleet: real SQLite in memory, with one transaction at a time and faults between them.

Every run begins with a copy of one prepared database. A transaction is atomic, as in a database with serializable
isolation: no other thread runs while one is open. The faults are those of a database that fails as a whole: it does not
respond, or a commit fails, or a commit succeeds and its response is lost.
"""

import sqlite3
from collections import deque

import sqlalchemy as sa

from thrave.database import _prepare_sqlite, metadata

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
        if self._user is None:
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
            self.after_commit()
            self.faults("committed")


def unavailable(text="unable to open database file"):
    """The error of a database that does not respond, as SQLAlchemy raises it."""
    return sa.exc.OperationalError("SELECT 1", None, sqlite3.OperationalError(text))


def lost_commit():
    """The error of the driver when the response to a commit is lost."""
    return sqlite3.OperationalError("disk I/O error")
