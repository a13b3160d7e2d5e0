"""The processes of the fleet benchmark: each is a door, and the agents of every so-manieth host.

A process is asked for one thing after the other (`ProcessPoolExecutor` with one worker), and answers with the seconds
that each call took.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

from fleet_agents import SimulatedAgent
from fleet_stage import BUCKET, Rooms, Stage, instance_id

from thrave.tasks.task import BundleRequest, BundleTask

Seconds = dict[str, list[float]]
"""What each call took, by its name."""
_Answer = TypeVar("_Answer")


class Shard:
    """One process's part of the fleet."""

    def __init__(self, rooms: Rooms, number: int) -> None:
        self._rooms = rooms
        self._scale = rooms.stage.scale
        hosts = range(number, self._scale.hosts, self._scale.shards)
        self._agents = [SimulatedAgent(rooms, host, self._is_cancelled) for host in hosts]

    def start_agents(self) -> Seconds:
        """Have every host taken, and its instances reported."""
        return _timed(("agent's start", agent.start) for agent in self._agents)

    def create(self, numbers: Sequence[int]) -> Seconds:
        """Ask for tasks. One of ten is cancelled at once."""
        return _timed(call for number in numbers for call in self._requests(number))

    def work(self) -> Seconds:
        """Do all tasks that wait. One of ten is cancelled when it is half done."""
        return _timed(("task", task) for agent in self._agents for task in agent.work())

    def _requests(self, number: int) -> Iterator[tuple[str, Callable[[], object]]]:
        asked = request(self._rooms.stage, number)
        made: list[BundleTask] = []
        yield "create", lambda: made.append(self._rooms.tasks.create(asked))
        if _ends_in(asked.instance_id, 0):
            yield "cancel", lambda: self._rooms.tasks.cancel(asked.account_id, made[0].bundle_id)

    def _is_cancelled(self, task: BundleTask) -> bool:
        if not _ends_in(task.instance_id, 5):
            return False
        self._rooms.tasks.cancel(task.account_id, task.bundle_id)
        return True


class Shards:
    """All processes."""

    def __init__(self, executors: Sequence[ProcessPoolExecutor]) -> None:
        self._executors = executors

    @classmethod
    @contextmanager
    def running(cls, stage: Stage) -> Iterator["Shards"]:
        """The processes, ended at the end."""
        with ExitStack() as stack:
            yield cls(
                [
                    stack.enter_context(
                        ProcessPoolExecutor(
                            1, mp_context=get_context("spawn"), initializer=_open, initargs=(stage, number)
                        )
                    )
                    for number in range(stage.scale.shards)
                ]
            )

    def start_agents(self) -> Seconds:
        """As `Shard.start_agents`."""
        return _together([executor.submit(_ask, Shard.start_agents) for executor in self._executors])

    def create(self, numbers: Sequence[int]) -> Seconds:
        """As `Shard.create`, shared out."""
        number = len(self._executors)
        shares = [numbers[at::number] for at in range(number)]
        return _together(
            [
                executor.submit(_ask, partial(_create, numbers=share))
                for executor, share in zip(self._executors, shares, strict=True)
            ]
        )

    def work(self) -> Seconds:
        """As `Shard.work`."""
        return _together([executor.submit(_ask, Shard.work) for executor in self._executors])


def request(stage: Stage, number: int) -> BundleRequest:
    """What the task of that number is asked for with."""
    instance = stage.scale.instance_of_task(number)
    caller = stage.callers[stage.scale.account(instance)]
    return BundleRequest(
        account_id=caller.account_id,
        owner_id=caller.account_id,
        instance_id=instance_id(instance),
        bucket=BUCKET,
        prefix=f"winami-{number}",
        access_key_id=caller.access_key_id,
        upload_policy=caller.policy,
        upload_policy_signature=caller.signature,
    )


_shards: list[Shard] = []  # this process's


def _ends_in(name: str, digit: int) -> bool:
    """One of ten."""
    return int(name.removeprefix("i-"), base=16) % 10 == digit


def _open(stage: Stage, number: int) -> None:
    rooms = ExitStack().enter_context(stage.rooms())
    _shards.append(Shard(rooms, number))


def _ask(question: Callable[[Shard], _Answer]) -> _Answer:
    return question(_shards[0])


def _create(shard: Shard, *, numbers: Sequence[int]) -> Seconds:
    return shard.create(numbers)


def _timed(calls: Iterator[tuple[str, Callable[[], object]]]) -> Seconds:
    taken: Seconds = defaultdict(list)
    for name, call in calls:
        before = time.perf_counter()
        call()
        taken[name].append(time.perf_counter() - before)
    return dict(taken)


def _together(answers: Sequence[Future[Seconds]]) -> Seconds:
    taken: Seconds = defaultdict(list)
    for answer in answers:
        for name, seconds in answer.result().items():
            taken[name].extend(seconds)
    return dict(taken)
