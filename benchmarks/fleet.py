"""The benchmark of a fleet with 1,000 hosts and 100,000 instances on one PostgreSQL: costs of a task, and their growth.

    python benchmarks/fleet.py            half an hour, 2 GiB of memory (the database is on tmpfs)
    python benchmarks/fleet.py --quick    seconds; 4 hosts and 6 tasks; its figures mean little

10,000 tasks are created through `BundleTaskService`, and simulated agents (`fleet_agents.py`) run or cancel them. Every
kind of call is measured at 1,000 to 100,000 ended tasks; beyond 10,000 the tasks are copies. Then PostgreSQL explains
every query, and a real agent without work is measured.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from fleet_agents import Shards, SimulatedAgent
from fleet_measures import Clock, Database, Figure, Idle, Plan, QueryRecorder, measure, measure_idle_agent
from fleet_setup import (
    FULL,
    QUICK,
    Backend,
    Setup,
    copy_tasks,
    create_callers,
    host_name,
    make_request,
)
from harness import RESULTS, describe_machine, write_json

from thrave.concurrency import utc_now
from thrave.database import bundle_task, open_engine
from thrave.tasks.housekeeping import DELETE_BATCH
from thrave.tasks.models import FINISHED
from thrave.tasks.queries import TaskFilter, TaskQueries
from thrave.tasks.task_service import BundleTaskService

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.servers.postgres import running_postgres

_QUIET, _BUSY = "000000000000", "111111111111"
_SIZES = sa.text("SELECT schemaname, relname, pg_total_relation_size(relid) FROM pg_stat_user_tables")
Call = Callable[[], object]


@dataclass(frozen=True)
class Point:
    """All figures at one number of ended tasks."""

    rows: int
    figures: dict[str, Figure]


@dataclass(frozen=True)
class Results:
    """Results of a run."""

    when: str
    load: float
    """Load average of the machine at the start."""
    machine: dict[str, object]
    scale: dict[str, object]
    start: Figure
    """Start of an agent, with the first report of its instances."""
    points: list[Point]
    bytes_per_task: dict[str, float]
    """By table."""
    seldom: dict[str, float]
    """Milliseconds of rare calls, at the end."""
    idle: Idle
    plans: list[Plan]


def main() -> None:
    """Measure, print tables, and store the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 hosts, 6 tasks")
    parser.add_argument("--tasks", type=int, help="how many tasks are created; further ones are copies")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    scale = replace(scale, tasks=options.tasks or scale.tasks)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # to remove files on tmpfs, which would occupy memory
    tempfile.tempdir = "/dev/shm"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thrave-fleet-")))
        url = stack.enter_context(running_postgres()).new_database()
        results = Benchmark(Setup(url, folder / "data", scale), folder).run()
    _show(results)
    path = options.results / ("fleet-quick.json" if options.quick else "fleet.json")
    write_json(path, asdict(results))
    print(f"\n{path}")


@dataclass(frozen=True)
class Calls:
    """The calls that the database of a fleet receives, in a database with ended tasks."""

    backend: Backend
    quiet: str
    """An account that gets no more tasks."""
    busy: str
    """An account that has a tenth of all tasks at the end."""

    def kinds(self, number: int) -> Iterator[tuple[str, Sequence[Call]]]:
        """Yield frequent calls: `number` of each kind, for different tasks and hosts."""
        apis = self.backend.new_tasks(), self.backend.new_tasks()
        agents = self._agents(number)
        yield "Describe one", [self._describe(apis[0], *task) for task in self._tasks(number)]
        yield f"Describe all {self.backend.setup.scale.quiet}", [lambda: apis[1].describe(self.quiet)] * number
        yield "heartbeat", [agent.heartbeat for agent in agents]
        yield "report", [agent.report for agent in agents]
        yield "power recovery query", [agent.query_power_recovery for agent in agents]
        yield "cleanup query", [agent.query_cleanup for agent in agents]
        yield "lost tasks query", [agent.enqueue_lost for agent in agents]
        yield "poll of a queue", [agent.poll for agent in agents]
        yield (
            "list of queues",
            [lambda: self.backend.engine.list_queues(application_name="thrave")] * max(1, number // 10),
        )
        yield "thrave task list", [self._task_list] * max(1, number // 10)

    def once(self) -> Iterator[tuple[str, Call]]:
        """Yield rare calls."""
        components = self.backend.components
        long_ago = utc_now() - timedelta(days=400)
        yield "thrave host list", components.hosts.list
        yield "retention", lambda: components.records().delete_ended(timedelta(days=400), limit=DELETE_BATCH)
        yield "retention in the engine", lambda: components.queues.delete_ended(long_ago)
        yield "Describe all of a busy account", lambda: self.backend.tasks.describe(self.busy)
        yield "first cleanup query", lambda: components.records().cleanups(host_name(0))

    def _describe(self, api: BundleTaskService, account_id: str, bundle_id: str) -> Call:
        return lambda: api.describe(account_id, [bundle_id])

    def _tasks(self, number: int) -> list[tuple[str, str]]:
        some = sa.select(bundle_task.c.account_id, bundle_task.c.bundle_id).order_by(sa.func.random()).limit(number)
        with self.backend.components.database.connect() as connection:
            return [(row.account_id, row.bundle_id) for row in connection.execute(some)]

    def _agents(self, number: int) -> list[SimulatedAgent]:
        hosts = random.Random(1).choices(range(self.backend.setup.scale.hosts), k=number)
        agents = {host: SimulatedAgent(self.backend, host, lambda _task: False) for host in hosts}
        for agent in agents.values():
            agent.join()
        return [agents[host] for host in hosts]

    def _task_list(self) -> object:
        return TaskQueries(self.backend.components.database, self.backend.components.records()).latest(
            TaskFilter(), limit=100
        )


class Benchmark:
    """One run of the benchmark."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        """Prepare an empty database; temporary files go to `folder`."""
        self._folder = folder
        self._scale = setup.scale
        with setup.open() as backend:
            self._setup = replace(setup, callers=create_callers(backend))
        self._engine = open_engine(setup.url)
        with self._engine.connect() as connection:
            self._database = Database(connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one())
        self._tasks = 0

    def run(self) -> Results:
        """Measure everything."""
        load = os.getloadavg()[0]
        with self._setup.open() as backend:
            with Shards.running(self._setup) as shards:
                start = self._start(shards)
                empty = self._sizes()
                points = [self._point(backend, shards, rows) for rows in self._scale.rows if rows <= self._scale.tasks]
                full = self._sizes()
                points += [self._point(backend, shards, rows) for rows in self._scale.rows if rows > self._scale.tasks]
            self._check()
            self._assign(_BUSY, self._scale.rows[-1] // 10)
            calls = Calls(backend, _QUIET, _BUSY)
            seldom = {name: measure(self._database, [call] * 3).p50_ms for name, call in calls.once()}
            plans = self._plans(backend, calls)
        return Results(
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            load=load,
            machine=describe_machine(),
            scale=asdict(self._scale),
            start=start,
            points=points,
            bytes_per_task={name: (full[name] - empty.get(name, 0)) / self._scale.tasks for name in sorted(full)},
            seldom=seldom,
            idle=measure_idle_agent(self._setup, self._database, self._engine, self._folder / "instances"),
            plans=plans,
        )

    def _start(self, shards: Shards) -> Figure:
        clock = Clock(self._database)
        with clock.running():
            seconds = shards.start_agents()
        self._execute(sa.text("VACUUM ANALYZE"))  # now, not during the measurement
        return clock.figure(seconds["agent's start"])

    def _point(self, backend: Backend, shards: Shards, rows: int) -> Point:
        """Create and run tasks until `rows` have ended, and measure."""
        missing = rows - self._ended()
        if rows > self._scale.tasks:
            with self._engine.begin() as connection:
                copy_tasks(connection, missing - self._scale.sample, but=_QUIET)
            self._execute(sa.text("VACUUM ANALYZE"))  # now, not during the measurement
            missing = self._scale.sample
        figures = self._run_tasks(shards, missing)
        if self._tasks == missing:
            self._assign(_QUIET, self._scale.quiet)
        for name, calls in Calls(backend, _QUIET, _BUSY).kinds(self._scale.sample):
            figures[name] = measure(self._database, calls)
        point = Point(rows, figures)
        _show_point(point)
        return point

    def _run_tasks(self, shards: Shards, number: int) -> dict[str, Figure]:
        numbers = range(self._tasks, self._tasks + number)
        self._tasks += number
        creating, working = Clock(self._database), Clock(self._database)
        with creating.running():
            created = shards.create(numbers)
        with working.running():
            worked = shards.work()
        return {"create": creating.figure(created["create"]), "run a task": working.figure(worked["task"])}

    def _assign(self, account_id: str, number: int) -> None:
        """Make an account the owner of so many ended tasks."""
        ended = bundle_task.c.state.in_([*FINISHED]) & (bundle_task.c.account_id != _QUIET)
        some = sa.select(bundle_task.c.bundle_id).where(ended).order_by(bundle_task.c.start_time).limit(number)
        chosen = bundle_task.c.bundle_id.in_(some.scalar_subquery())
        self._execute(bundle_task.update().where(chosen).values(account_id=account_id))

    def _check(self) -> None:
        """Check that every task is complete or was cancelled on purpose."""
        other = bundle_task.c.state.not_in([*FINISHED]) | (bundle_task.c.error_code != "Client.Cancelled")
        query = sa.select(bundle_task.c.state, bundle_task.c.error_message).where(other)
        with self._engine.connect() as connection:
            if wrong := connection.execute(query).first():
                sys.exit(f"a task is {wrong.state}: {wrong.error_message}")

    def _plans(self, backend: Backend, calls: Calls) -> list[Plan]:
        """Explain every query of every kind of call, and of one task from start to end."""
        recorder, engines = QueryRecorder(), (backend.components.database, backend.engine.engine)
        agent = SimulatedAgent(
            backend, self._scale.host(self._scale.instance_of_task(self._tasks)), lambda _task: False
        )
        agent.join()
        with recorder.during("create", *engines):
            backend.tasks.create(make_request(self._setup, self._tasks))
        with recorder.during("run a task", *engines):
            for task in agent.work():
                task()
        for name, some in (*calls.kinds(10), *((name, [call]) for name, call in calls.once())):
            with recorder.during(name, *engines):
                some[0]()
        with self._engine.begin() as connection:
            return recorder.plans(connection)

    def _ended(self) -> int:
        query = sa.select(sa.func.count()).where(bundle_task.c.state.in_([*FINISHED]))
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def _sizes(self) -> dict[str, int]:
        with self._engine.connect() as connection:
            return {f"{schema}.{table}": size for schema, table, size in connection.execute(_SIZES)}

    def _execute(self, statement: sa.Executable) -> None:
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(statement)


def _show_point(point: Point) -> None:
    """Print the table of one number of tasks."""
    title = f"{point.rows:,} ended tasks"
    print(f"\n{title:30} {'p50 ms':>8} {'p99 ms':>8} {'DB ms':>8} {'a second':>9}")
    for name, figure in point.figures.items():
        latency = f"{figure.p50_ms:8.2f} {figure.p99_ms:8.2f}"
        print(f"{name:30} {latency} {figure.database_ms:8.2f} {figure.per_second:9.1f}", flush=True)


def _show(results: Results) -> None:
    """Print what is measured at the end."""
    print(f"\nstart of an agent: {results.start}\nidle agent: {results.idle}\nrare calls: {results.seldom}")
    total = sum(results.bytes_per_task.values())
    print(
        f"bytes of a task: {total:.0f}",
        {name: round(size) for name, size in results.bytes_per_task.items() if size > 50},
    )
    for plan in results.plans:
        if plan.scans:
            print(f"SEQUENTIAL SCAN of {', '.join(plan.scans)} ({plan.what}): {plan.query}")


if __name__ == "__main__":
    main()
