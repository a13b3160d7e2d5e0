"""Runs many tasks in a fleet, kills its processes at random, and checks the result.

Callers request bundles from API processes, cancel some, and lose connections. API processes and agents are killed with
SIGKILL and started again. Then the fleet runs without kills until every task has ended. Each host has disks that no
other host can access, so a task on the wrong host would fail.
"""

import hashlib
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from support.bundles.open_check import opened_sha256
from support.disks.raw_disk import make_disk
from support.eventually import eventually
from thrave.compute.description_files import InstanceDescription
from thrave.compute.directory_driver import DirectoryDriver, new_instance_id
from thrave.compute.instance import InstanceState, VolumeFile
from thrave.tasks.models import FINISHED, BundleTaskState

BUCKET = "chaos"
KIB = 1 << 10
CALLERS = 4
TIMEOUT = 300  # seconds for all tasks to end after the last kill
ONE_TRY = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Size of a run."""

    tasks: int
    instances: int
    agents: int
    apis: int
    seed: int
    pause: float = 2.0
    """Maximum seconds between two kills."""


@dataclass
class Outcome:
    """Counts of a run."""

    kills: int = 0
    refused: Counter = field(default_factory=Counter)
    """Requests with an error response, by its code."""
    cut_off: int = 0
    """Requests without a response."""
    ended: Counter = field(default_factory=Counter)
    """Tasks by their final state or error code."""
    attempts: int = 0
    """Number of runs of all tasks."""


class Chaos:
    """One run."""

    def __init__(self, fleet, plan):
        self.fleet = fleet
        self.plan = plan
        self.random = random.Random(plan.seed)
        self.outcome = Outcome()
        self.answered = set()
        self.requested = 0
        self.lock = threading.Lock()
        self.starting = set()  # processes that were killed and do not run yet
        self.apis = {"api-1": fleet.first, **{name: fleet.api(name) for name in self._names("api", 2, plan.apis)}}
        self.account, self.key = fleet.first.account("alice")
        self.hosts = self._names("host", 1, plan.agents)
        self.instances = dict(self._new_instance(number) for number in range(plan.instances))
        self.agents = {name: fleet.agent(name) for name in self.hosts}

    def run(self):
        """Run all tasks, check the result, and return the counts."""
        self._await(lambda: len(self._reported()) == len(self.instances), "every instance is reported")
        callers = [threading.Thread(target=self._call, args=[self.plan.seed + number]) for number in range(CALLERS)]
        for caller in callers:
            caller.start()
        with ThreadPoolExecutor() as starting:
            while any(caller.is_alive() for caller in callers):
                self._kill_random_process(starting)
        self._check()
        return self.outcome

    @staticmethod
    def _names(kind, first, last):
        return [f"{kind}-{number}" for number in range(first, last + 1)]

    def _new_instance(self, number):
        """Create an instance on one of the hosts; return its id, its host and the SHA-256 of its disk."""
        host = self.hosts[number % len(self.hosts)]
        folder = self.fleet.data(host)
        folder.instances.mkdir(parents=True, exist_ok=True)
        size = self.random.randrange(64, 24 * KIB) * KIB
        disk = make_disk(folder.root / f"{number}.raw", size, seed=number)
        description = InstanceDescription(
            instance_id=new_instance_id(), account_id=self.account.account_id, platform="windows",
            root_volume=VolumeFile(path=disk),
        )  # fmt: skip
        DirectoryDriver(folder.instances).add(description)
        return description.instance_id, (host, hashlib.sha256(disk.read_bytes()).hexdigest())

    def _reported(self):
        ec2 = self.fleet.first.client(self.key)
        return ec2.describe_instances()["Reservations"]

    def _call(self, seed):
        """Request bundles until there are enough tasks, and cancel some."""
        mine = random.Random(seed)
        while (number := self._next_number()) is not None:
            instance_id = mine.choice([*self.instances])
            storage = self.fleet.first.storage(self.key, BUCKET, f"bundle-{number}")
            bundle_id = self._request("bundle_instance", mine, InstanceId=instance_id, Storage=storage)
            if bundle_id:
                self.answered.add(bundle_id)
                if mine.random() < 0.1:
                    time.sleep(mine.random())
                    self._request("cancel_bundle_task", mine, BundleId=bundle_id)
            else:
                time.sleep(mine.random())

    def _next_number(self):
        with self.lock:
            if len(self.answered) >= self.plan.tasks:
                return None
            self.requested += 1
            return self.requested

    def _request(self, action, mine, **parameters):
        ec2 = mine.choice([*self.apis.values()]).client(self.key, config=ONE_TRY)
        try:
            return getattr(ec2, action)(**parameters)["BundleTask"]["BundleId"]
        except ClientError as refusal:
            self.outcome.refused[refusal.response["Error"]["Code"]] += 1
        except BotoCoreError:
            self.outcome.cut_off += 1
        return None

    def _kill_random_process(self, starting):
        """Kill a running process, and start it again in another thread."""
        time.sleep(self.random.uniform(0.1, self.plan.pause))
        victim = self.random.choice([*self.apis, *self.hosts])
        if victim in self.starting:
            return
        self.starting.add(victim)
        self.outcome.kills += 1
        starting.submit(self._replace, victim)

    def _replace(self, victim):
        if victim in self.hosts:
            self.agents[victim].kill()
            self.agents[victim].wait()
            self.agents[victim] = self.fleet.agent(victim)
        else:
            self.apis[victim].stop(signal.SIGKILL)
            self.apis[victim].start()
            self.fleet.processes.append(self.apis[victim].process)
        self.starting.remove(victim)

    def _check(self):
        with self.fleet.components() as components:
            records = components.records()
            self._await(lambda: all(task.state in FINISHED for task in records.find()), "every task ends")
            tasks = {task.bundle_id: task for task in records.find()}
        self.outcome.ended = Counter(task.error_code or str(task.state) for task in tasks.values())
        self.outcome.attempts = sum(task.runs for task in tasks.values())
        assert self.answered <= set(tasks), "a task was lost"
        assert len(tasks) - len(self.answered) <= self.outcome.cut_off, "a request has created two tasks"
        assert set(self.outcome.ended) <= {"complete", "Client.Cancelled"}, self.outcome.ended
        complete = [task for task in tasks.values() if task.state is BundleTaskState.COMPLETE]
        self._check_bundles(complete)
        for instance_id, (host, _) in self.instances.items():
            there = DirectoryDriver(self.fleet.data(host).instances)
            assert there.state(instance_id) is InstanceState.RUNNING
            with there.hold_stopped(instance_id):
                pass  # the instance is not locked

    def _check_bundles(self, complete):
        """Check that each complete bundle opens to its instance's disk, and that the bucket has nothing else."""
        image = self.fleet.root / "opened.raw"
        for task in complete:
            host, digest = self.instances[task.instance_id]
            assert task.host == host, "a task has run on another host than that of its instance"
            assert opened_sha256(self.fleet.first, BUCKET, task.prefix, image) == digest
            image.unlink()
        prefixes = {task.prefix for task in complete}
        names = {path.name for path in (self.fleet.first.data.buckets / BUCKET).iterdir()}
        orphaned = [name for name in names if name.partition(".")[0] not in prefixes]
        assert orphaned == []

    def _await(self, holds, description):
        eventually(holds, description, timeout=TIMEOUT, interval=0.2)
