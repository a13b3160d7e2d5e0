"""What is told of a kind of call: its latency, its rate, and what it costs the database.

The database's CPU time is what a busy neighbour of the machine changes least, and says how many such calls a core of a
database server answers a second. It is all that PostgreSQL's processes use meanwhile, autovacuum's included.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Figure:
    """A kind of call, at some number of rows."""

    calls: int
    p50_ms: float
    p99_ms: float
    database_ms: float
    """CPU milliseconds of PostgreSQL for each call."""
    per_second: float
    """How many there were a second."""


class Database:
    """PostgreSQL's processes."""

    def __init__(self, backend: int) -> None:
        """Watch those of the server that has a process `backend` for one of its connections."""
        server = psutil.Process(backend).parent()
        assert server is not None
        self._server = server
        self._seen: dict[int, float] = {}

    def cpu_seconds(self) -> float:
        """What they have used so far. Of one that ended it counts what was last seen."""
        for process in [self._server, *self._server.children()]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self._seen[process.pid] = times.user + times.system
        return sum(self._seen.values())


class Clock:
    """What happens within a block."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.wall = 0.0
        self.cpu = 0.0

    @contextmanager
    def running(self) -> Iterator["Clock"]:
        """Count the block in."""
        cpu, wall = self._database.cpu_seconds(), time.perf_counter()
        yield self
        self.wall += time.perf_counter() - wall
        self.cpu += self._database.cpu_seconds() - cpu

    def figure(self, seconds: Sequence[float]) -> Figure:
        """The figure of these calls, which were all that happened."""
        ordered = sorted(seconds)
        return Figure(
            calls=len(ordered),
            p50_ms=1e3 * ordered[len(ordered) // 2],
            p99_ms=1e3 * ordered[int(len(ordered) * 0.99)],
            database_ms=1e3 * self.cpu / len(ordered),
            per_second=len(ordered) / self.wall,
        )


def measured(database: Database, calls: Iterable[Callable[[], object]]) -> Figure:
    """Make these calls, one after the other."""
    clock, seconds = Clock(database), []
    with clock.running():
        for call in calls:
            before = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - before)
    return clock.figure(seconds)
