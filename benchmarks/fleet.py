"""A fleet of 1,000 hosts and 100,000 instances on one PostgreSQL: what a task costs, and how that grows.

    python benchmarks/fleet.py            half an hour, 2 GiB of memory (the database is on tmpfs)
    python benchmarks/fleet.py --quick    seconds; 20 hosts and 200 tasks; its figures say little

10,000 tasks are asked for at the door, by way of `BundleTasks`, and are done or cancelled by simulated agents
(`fleet_agents.py`). On the way, from 1,000 to 100,000 ended tasks, every kind of call is measured; beyond 10,000 the
tasks are copies. Then every query is explained, and a real agent is watched while it has nothing to do.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from fleet_agents import SimulatedAgent
from fleet_calls import Calls
from fleet_figures import Clock, Database, Figure, measured
from fleet_idle import Idle, idle_agent
from fleet_plans import Caught, Plan
from fleet_shards import Shards, request
from fleet_stage import FULL, QUICK, Rooms, Stage, copy_tasks, make_callers
from harness import describe_machine

from thrave.database import bundle_task, open_engine
from thrave.tasks.states import FINISHED

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.servers.postgres import running_postgres

_RESULTS = Path(__file__).with_name("results")
_QUIET, _BUSY = "000000000000", "111111111111"
_SIZES = sa.text("SELECT schemaname, relname, pg_total_relation_size(relid) FROM pg_stat_user_tables")


@dataclass(frozen=True)
class Point:
    """Every figure at one number of ended tasks."""

    rows: int
    figures: dict[str, Figure]


@dataclass(frozen=True)
class Results:
    """What came of a run."""

    when: str
    load: float
    """Of the machine when it began: the average number of processes that wanted to run."""
    machine: dict[str, object]
    scale: dict[str, object]
    start: Figure
    """An agent's start, with the first report of its instances."""
    points: list[Point]
    bytes_per_task: dict[str, float]
    """By table."""
    seldom: dict[str, float]
    """Milliseconds of what is called seldom, at the end."""
    idle: Idle
    plans: list[Plan]


def main() -> None:
    """Run it all, print the tables, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 hosts, 200 tasks")
    parser.add_argument("--tasks", type=int, help="how many go through the door; further ones are copies")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    scale = replace(scale, tasks=options.tasks or scale.tasks)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or what lies on tmpfs would stay in memory
    tempfile.tempdir = "/dev/shm"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thrave-fleet-")))
        url = stack.enter_context(running_postgres()).new_database()
        results = Benchmark(Stage(url, folder / "data", scale), folder).run()
    _show(results)
    path = options.results / ("fleet-quick.json" if options.quick else "fleet.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")
    print(f"\n{path}")


class Benchmark:
    """One run."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        """Run it on an empty `stage`; what is needed besides goes to `folder`."""
        self._folder = folder
        self._scale = stage.scale
        with stage.rooms() as rooms:
            self._stage = replace(stage, callers=make_callers(rooms))
        self._engine = open_engine(stage.url)
        with self._engine.connect() as connection:
            self._database = Database(connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one())
        self._tasks = 0

    def run(self) -> Results:
        """All of it."""
        load = os.getloadavg()[0]
        with self._stage.rooms() as rooms:
            with Shards.running(self._stage) as shards:
                start = self._start(shards)
                empty = self._sizes()
                points = [self._point(rooms, shards, rows) for rows in self._scale.rows if rows <= self._scale.tasks]
                full = self._sizes()
                points += [self._point(rooms, shards, rows) for rows in self._scale.rows if rows > self._scale.tasks]
            self._check()
            self._give(_BUSY, self._scale.rows[-1] // 10)
            calls = Calls(rooms, _QUIET, _BUSY)
            seldom = {name: measured(self._database, [call] * 3).p50_ms for name, call in calls.once()}
            plans = self._plans(rooms, calls)
        return Results(
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            load=load,
            machine=describe_machine(),
            scale=asdict(self._scale),
            start=start,
            points=points,
            bytes_per_task={name: (full[name] - empty.get(name, 0)) / self._scale.tasks for name in sorted(full)},
            seldom=seldom,
            idle=idle_agent(self._stage, self._database, self._engine, self._folder / "instances"),
            plans=plans,
        )

    def _start(self, shards: Shards) -> Figure:
        clock = Clock(self._database)
        with clock.running():
            seconds = shards.start_agents()
        self._execute(sa.text("VACUUM ANALYZE"))  # now, and not while it is measured
        return clock.figure(seconds["agent's start"])

    def _point(self, rooms: Rooms, shards: Shards, rows: int) -> Point:
        """Let there be so many ended tasks, the last of them asked for and done now, and measure."""
        missing = rows - self._ended()
        if rows > self._scale.tasks:
            with self._engine.begin() as connection:
                copy_tasks(connection, missing - self._scale.sample, but=_QUIET)
            self._execute(sa.text("VACUUM ANALYZE"))  # now, and not while it is measured
            missing = self._scale.sample
        figures = self._run_tasks(shards, missing)
        if self._tasks == missing:
            self._give(_QUIET, self._scale.quiet)
        for name, calls in Calls(rooms, _QUIET, _BUSY).kinds(self._scale.sample):
            figures[name] = measured(self._database, calls)
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

    def _give(self, account_id: str, number: int) -> None:
        """Let an account have had so many of the tasks."""
        ended = bundle_task.c.state.in_([*FINISHED]) & (bundle_task.c.account_id != _QUIET)
        some = sa.select(bundle_task.c.bundle_id).where(ended).order_by(bundle_task.c.start_time).limit(number)
        mine = bundle_task.c.bundle_id.in_(some.scalar_subquery())
        self._execute(bundle_task.update().where(mine).values(account_id=account_id))

    def _check(self) -> None:
        """See that every task has ended, and none but for a reason that was meant."""
        other = bundle_task.c.state.not_in([*FINISHED]) | (bundle_task.c.error_code != "Client.Cancelled")
        query = sa.select(bundle_task.c.state, bundle_task.c.error_message).where(other)
        with self._engine.connect() as connection:
            if wrong := connection.execute(query).first():
                sys.exit(f"a task is {wrong.state}: {wrong.error_message}")

    def _plans(self, rooms: Rooms, calls: Calls) -> list[Plan]:
        """Every query of every kind of call, and of one task from its beginning to its end."""
        caught, engines = Caught(), (rooms.ground.database, rooms.engine.engine)
        agent = SimulatedAgent(rooms, self._scale.host(self._scale.instance_of_task(self._tasks)), lambda _task: False)
        agent.join()
        with caught.during("create", *engines):
            rooms.tasks.create(request(self._stage, self._tasks))
        with caught.during("run a task", *engines):
            for task in agent.work():
                task()
        for name, some in (*calls.kinds(10), *((name, [call]) for name, call in calls.once())):
            with caught.during(name, *engines):
                some[0]()
        with self._engine.begin() as connection:
            return caught.plans(connection)

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
    """Print its table."""
    title = f"{point.rows:,} ended tasks"
    print(f"\n{title:30} {'p50 ms':>8} {'p99 ms':>8} {'DB ms':>8} {'a second':>9}")
    for name, figure in point.figures.items():
        latency = f"{figure.p50_ms:8.2f} {figure.p99_ms:8.2f}"
        print(f"{name:30} {latency} {figure.database_ms:8.2f} {figure.per_second:9.1f}", flush=True)


def _show(results: Results) -> None:
    """Print what is known at the end."""
    print(f"\nan agent's start: {results.start}\nidle: {results.idle}\nseldom: {results.seldom}")
    total = sum(results.bytes_per_task.values())
    print(
        f"bytes a task: {total:.0f}", {name: round(size) for name, size in results.bytes_per_task.items() if size > 50}
    )
    for plan in results.plans:
        if plan.scans:
            print(f"SCAN of {', '.join(plan.scans)} ({plan.what}): {plan.query}")


if __name__ == "__main__":
    main()
