"""Measurements of the benchmark of a fleet: costs of calls, an idle agent, and the execution plans of queries."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from fleet_setup import Setup, describe_instance, host_name, instance_id

from thrave.compute.description_files import InstanceDescription, format_description

LARGE = 5000
"""Tables from this number of rows on must not be scanned sequentially."""

_TRANSACTIONS = sa.text("SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()")
_CONNECTIONS = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
_WARM_UP = 5.0  # seconds, until an agent is idle


@dataclass(frozen=True)
class Figure:
    """Costs of one kind of call at some number of rows.

    The CPU time of the database depends least on other load of the machine. It is that of all processes of PostgreSQL,
    including autovacuum.
    """

    calls: int
    p50_ms: float
    p99_ms: float
    database_ms: float
    """CPU milliseconds of PostgreSQL for each call."""
    per_second: float
    """Calls a second."""


class Database:
    """The processes of PostgreSQL."""

    def __init__(self, backend: int) -> None:
        """Find the server by the process `backend` of one of its connections."""
        server = psutil.Process(backend).parent()
        assert server is not None
        self._server = server
        self._used: dict[int, float] = {}

    def cpu_seconds(self) -> float:
        """CPU time of all processes until now; for an ended process that of the last reading."""
        for process in [self._server, *self._server.children()]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self._used[process.pid] = times.user + times.system
        return sum(self._used.values())


class Clock:
    """Wall time, and CPU time of the database, of some blocks."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.wall = 0.0
        self.cpu = 0.0

    @contextmanager
    def running(self) -> Iterator["Clock"]:
        """Add the block."""
        cpu, wall = self._database.cpu_seconds(), time.perf_counter()
        yield self
        self.wall += time.perf_counter() - wall
        self.cpu += self._database.cpu_seconds() - cpu

    def figure(self, seconds: Sequence[float]) -> Figure:
        """Return the costs of these calls, which were the only ones in the blocks."""
        ordered = sorted(seconds)
        return Figure(
            calls=len(ordered),
            p50_ms=1e3 * ordered[len(ordered) // 2],
            p99_ms=1e3 * ordered[int(len(ordered) * 0.99)],
            database_ms=1e3 * self.cpu / len(ordered),
            per_second=len(ordered) / self.wall,
        )


def measure(database: Database, calls: Iterable[Callable[[], object]]) -> Figure:
    """Make calls one after the other, and measure them."""
    clock, seconds = Clock(database), []
    with clock.running():
        for call in calls:
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return clock.figure(seconds)


@dataclass(frozen=True)
class Idle:
    """Costs of one idle agent."""

    transactions: float
    """A second."""
    database_ms: float
    """CPU milliseconds of PostgreSQL a second."""
    connections: int


def measure_idle_agent(setup: Setup, database: Database, engine: sa.Engine, folder: Path) -> Idle:
    """Run the real agent of the first host, and measure it for some seconds.

    It has the instances of a host of the fleet, in description files. A fleet costs this times its hosts.
    """
    seconds = setup.scale.seconds
    connections, _ = _read_counters(engine)
    with _running_agent(setup, folder):
        time.sleep(min(_WARM_UP, seconds))
        during, before = _read_counters(engine)
        cpu = database.cpu_seconds()
        time.sleep(seconds)
        _, after = _read_counters(engine)
        used = database.cpu_seconds() - cpu
    return Idle((after - before) / seconds, 1e3 * used / seconds, during - connections)


@contextmanager
def _running_agent(setup: Setup, folder: Path) -> Iterator[None]:
    folder.mkdir()
    for number in range(
        0, setup.scale.instances, setup.scale.hosts
    ):  # not by `DirectoryDriver.add`: the disks do not exist
        (folder / f"{instance_id(number)}.json").write_bytes(
            format_description(InstanceDescription(**vars(describe_instance(setup, number))))
        )
    settings = {"database_url": setup.url, "instance_dir": folder, "data_dir": setup.data}
    agent = subprocess.Popen(
        [sys.executable, "-m", "thrave", "agent", "--host-id", host_name(0)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **{f"THRAVE_{name.upper()}": str(value) for name, value in settings.items()}},
    )
    try:
        assert agent.stdout is not None
        agent.stdout.readline()
        yield
    finally:
        agent.kill()
        agent.communicate()


def _read_counters(engine: sa.Engine) -> tuple[int, int]:
    """Connections, and transactions until now."""
    with engine.connect() as connection:
        return connection.execute(_CONNECTIONS).scalar_one(), connection.execute(_TRANSACTIONS).scalar_one()


@dataclass(frozen=True)
class Plan:
    """How PostgreSQL executes one query."""

    what: str
    query: str
    nodes: Sequence[str]
    """Each with its index or table, from the top."""
    scans: Sequence[str]
    """Large tables with a sequential scan, whose cost grows with the table: a fault."""


class QueryRecorder:
    """Records queries, each once with its first parameters."""

    def __init__(self) -> None:
        self.queries: dict[str, tuple[str, Any]] = {}
        self.what = ""

    @contextmanager
    def during(self, what: str, *engines: sa.Engine) -> Iterator[None]:
        """Record the queries of the block through these engines."""
        self.what = what
        for engine in engines:
            sa.event.listen(engine, "before_cursor_execute", self._record)
        yield
        for engine in engines:
            sa.event.remove(engine, "before_cursor_execute", self._record)

    def plans(self, connection: sa.Connection) -> list[Plan]:
        """Explain each query."""
        return [_plan(connection, what, query, parameters) for query, (what, parameters) in self.queries.items()]

    def _record(self, *event: Any) -> None:  # noqa: ANN401 (arguments of SQLAlchemy's event)
        _connection, _cursor, query, parameters, _context, is_many = event
        if query.lstrip().startswith(("SELECT", "UPDATE", "DELETE", "INSERT", "WITH")):
            self.queries.setdefault(query, (self.what, parameters[0] if is_many else parameters))


def _plan(connection: sa.Connection, what: str, query: str, parameters: Any) -> Plan:  # noqa: ANN401 (a type of the driver)
    explained = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {query}", parameters).scalar_one()
    nodes = [*_nodes(explained[0]["Plan"])]
    scanned = {node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"}
    large = connection.execute(
        sa.text("SELECT relname FROM pg_class WHERE relname = ANY(:names) AND reltuples > :large ORDER BY relname"),
        {"names": [*scanned], "large": LARGE},
    )
    return Plan(what, " ".join(query.split()), [_format_node(node) for node in nodes], [*large.scalars()])


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


def _format_node(node: dict[str, Any]) -> str:
    of = node.get("Index Name") or node.get("Relation Name")
    return f"{node['Node Type']} {of}" if of else str(node["Node Type"])
