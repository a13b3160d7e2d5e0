"""Every kind of call that a fleet's database answers all day: what it is, how often it comes, and who makes it."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from fleet_agents import SimulatedAgent
from fleet_stage import Rooms, host_name

from thrave.database import bundle_task, utc_now
from thrave.tasks.overview import Overview, Wanted
from thrave.tasks.requests import BundleTasks
from thrave.tasks.retention import AT_ONCE

Call = Callable[[], object]


@dataclass(frozen=True)
class Calls:
    """What can be called, on a stage that has ended tasks."""

    rooms: Rooms
    quiet: str
    """The account whose number of tasks stays as it is."""
    busy: str
    """The account that has one of ten at the end."""

    def kinds(self, number: int) -> Iterator[tuple[str, Sequence[Call]]]:
        """So many of each kind, of different tasks and hosts."""
        doors = self.rooms.new_tasks(), self.rooms.new_tasks()
        agents = self._agents(number)
        yield "Describe one", [self._describe(doors[0], *task) for task in self._tasks(number)]
        yield f"Describe all {self.rooms.stage.scale.quiet}", [lambda: doors[1].describe(self.quiet)] * number
        yield "heartbeat", [agent.heartbeat for agent in agents]
        yield "report", [agent.report for agent in agents]
        yield "caretaker's look", [agent.look_after for agent in agents]
        yield "left-overs' look", [agent.look_for_left_overs for agent in agents]
        yield "look for lost tasks", [agent.look_for_lost for agent in agents]
        yield "poll of a queue", [agent.poll for agent in agents]
        yield (
            "list of queues",
            [lambda: self.rooms.engine.list_queues(application_name="thrave")] * max(1, number // 10),
        )
        yield "thrave task list", [self._task_list] * max(1, number // 10)

    def once(self) -> Iterator[tuple[str, Call]]:
        """What comes seldom."""
        ground = self.rooms.ground
        long_ago = utc_now() - timedelta(days=400)
        yield "thrave host list", ground.hosts.list
        yield "retention", lambda: ground.records().purge(timedelta(days=400), most=AT_ONCE)
        yield "retention in the engine", lambda: ground.queues.forget(long_ago)
        yield "Describe all of a busy account", lambda: self.rooms.tasks.describe(self.busy)
        yield "left-overs' first look", lambda: ground.records().to_clean_up(host_name(0))

    def _describe(self, door: BundleTasks, account_id: str, bundle_id: str) -> Call:
        return lambda: door.describe(account_id, [bundle_id])

    def _tasks(self, number: int) -> list[tuple[str, str]]:
        some = sa.select(bundle_task.c.account_id, bundle_task.c.bundle_id).order_by(sa.func.random()).limit(number)
        with self.rooms.ground.database.connect() as connection:
            return [(row.account_id, row.bundle_id) for row in connection.execute(some)]

    def _agents(self, number: int) -> list[SimulatedAgent]:
        hosts = random.Random(1).choices(range(self.rooms.stage.scale.hosts), k=number)
        agents = {host: SimulatedAgent(self.rooms, host, lambda _task: False) for host in hosts}
        for agent in agents.values():
            agent.join()
        return [agents[host] for host in hosts]

    def _task_list(self) -> object:
        return Overview(self.rooms.ground.database, self.rooms.ground.records()).latest(Wanted(), limit=100)
