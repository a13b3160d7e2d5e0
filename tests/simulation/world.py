"""One simulated fleet, from a seed: hosts with agents, API processes, machines, store, database, and faults."""

import random
from collections import Counter
from datetime import UTC, datetime
from types import SimpleNamespace

from simulation.actors import Operator, Outsider, Owner
from simulation.database import SimulatedDatabase, lost_commit, unavailable
from simulation.engine import SimulatedQueue
from simulation.faults import Faults
from simulation.invariants import Invariants
from simulation.machines import Machine, SimulatedDriver
from simulation.scheduler import EPOCH, Process, Scheduler
from simulation.store import SimulatedStore
from thrave.agent import Agent
from thrave.compute.errors import HypervisorUnavailable
from thrave.compute.instance import InstanceState
from thrave.concurrency import sleep
from thrave.config import Settings
from thrave.identity.accounts import Accounts
from thrave.identity.certificates import ServiceIdentity
from thrave.tasks.hosts import HostRegistry
from thrave.tasks.repository import TaskRepository
from thrave.vault import Vault

BUCKET = "bucket"


class Fixture:
    """What all runs of this process share: the prepared database, an account, and the service's keys.

    Args:
        folder: For the keys.
    """

    def __init__(self, folder):
        self.folder = folder
        self.database = SimulatedDatabase()
        self.vault = Vault.open_or_create(folder / "vault.key")
        self.identity = ServiceIdentity.open_or_create(folder / "service")
        self.account, self.key = Accounts(self.database.engine, self.vault).create("alice")
        self.database.save()


class World:
    """One run.

    Args:
        fixture: Shared by all runs.
        seed: Decides everything.
        without: Kinds of faults to leave out.
        focus: Kinds of faults to have often.
        trace: Called with each event as text; None: nothing is recorded.
        reintroduced: A function of `reintroduced.FAULTS`, which puts a fault back into the product.

    Attributes:
        wanted: The state that each instance's owner has asked for last; None: not known.
        owners_done: How many owners have sent all their requests.
    """

    def __init__(self, fixture, seed, *, without=(), focus=(), trace=None, reintroduced=None):
        self.fixture = fixture
        self.trace = trace
        self.reintroduced = reintroduced
        self.counts = Counter()
        self.owners_done = 0
        self._number = 0
        self._away = {}
        self.random = random.Random(seed)
        self.faults = Faults(self.random, without, focus)
        self.scheduler = Scheduler(
            self.random,
            switch_probability=self.random.choice([0.05, 0.3, 1.0]),
            pause_probability=self.random.choice([0.0, 0.01, 0.1]),
        )
        self.scheduler.on_crash = self._process_ended
        self.invariants = Invariants(self)
        self.database = fixture.database
        self.database.reset(self.scheduler)
        self.database.faults = self._database_fault
        self.database.after_commit = self.invariants.after_commit
        self.store = SimulatedStore(self, BUCKET, fixture.account.account_id)
        self.hosts = [f"host-{number}" for number in range(1, 1 + self.random.choice([1, 1, 2, 3]))]
        self.agents = {}
        self.has_overlays = self.random.random() < 0.8
        self.machines = {}
        for number in range(self.random.choice([1, 1, 2])):
            instance_id, blocks = f"i-{number:08x}", self.random.choice([2, 20, 40, 60])
            self.machines[instance_id] = Machine(self, instance_id, fixture.account.account_id, blocks)
        self.wanted = dict.fromkeys(self.machines, InstanceState.RUNNING)
        self.settings = self._draw_settings()

    def _draw_settings(self):
        heartbeat_interval = self.random.choice([5.0, 20.0])
        return Settings(
            data_dir=self.fixture.folder,
            database_url="postgresql://simulated/simulated",
            capture_mode=self.random.choice(["offline", "overlay"]),
            existing_bundle=self.random.choice(["refuse", "replace", "replace"]),
            shutdown_timeout=30.0,
            shutdown_timeout_action=self.random.choice(["fail", "power-off"]),
            stall_timeout=90.0,
            s3_retry_timeout=self.random.choice([10.0, 60.0]),
            heartbeat_interval=heartbeat_interval,
            heartbeat_timeout=5 * heartbeat_interval,
            upload_concurrency=self.random.choice([1, 2, 4]),
            worker_concurrency=2,
        )

    def start(self):
        """Start every agent and everybody who acts; return the number of owners."""
        if self.faults.rates.get("crash"):
            self._plan_crash()
        for host in self.hosts:
            self.start_agent(host)
        owners = self.random.choice([1, 1, 2])
        for number in range(owners):
            self._start(Process(f"api {number}"), Owner(self))
        self._start(Process("outsider"), Outsider(self))
        self.operator = Process("operator")
        self._start(self.operator, Operator(self, self._components(self.operator).hosts))
        return owners

    def start_agent(self, host):
        """Start an agent process on a host."""
        process = Process(
            f"agent {host} #{self.next_number()}", host,
            clock_error=self.random.choice([0.0, 0.0, -300.0, 300.0]),
            drift=self.random.choice([0.0, 0.0, 0.01, -0.01]),
        )  # fmt: skip
        self.agents[host] = process
        self.scheduler.start(process, "main", lambda: self._run_agent(process))

    def calm(self):
        """End all faults, and give every host an active agent."""
        self.note("the faults end")
        self.faults.are_on = False
        self.store.is_full = False
        self.scheduler.crash_in = None
        self.scheduler.discard(self.operator)  # it must not drain a host from now on
        self.database.rows("UPDATE host SET state = 'active' WHERE state IN ('draining', 'drained')")
        for host in self.hosts:
            if not self.agents[host].is_alive:
                self.start_agent(host)

    # Used by the simulated parts

    def note(self, text):
        """Record an event in the trace."""
        if self.trace is not None:
            current = self.scheduler.current
            who = f"{current.process} [{current.name}]" if current else "-"
            self.trace(f"{self.scheduler.now:10.3f}  {who:38}  {text}")

    def count(self, what):
        self.counts[what] += 1

    def next_number(self):
        self._number += 1
        return self._number

    def utc_now(self):
        """The time of the database server."""
        return datetime.fromtimestamp(EPOCH + self.scheduler.now, UTC)

    def take_away(self, what, seconds):
        """Have the hypervisor or the database not respond to one agent for some seconds."""
        agent = self.random.choice([*self.agents.values()])
        self.note(f"the {what} does not respond to {agent} for {seconds:.0f} s")
        self._away[what, agent] = self.scheduler.now + seconds

    def is_away(self, what):
        """Whether the hypervisor or the database does not respond to the current process."""
        until = self._away.get((what, self.scheduler.current.process), 0.0)
        return self.faults.are_on and self.scheduler.now < until

    def stop_delay(self):
        """Seconds after which a guest follows a shutdown request; None: it does not."""
        if self.faults.occurs("guest: deaf"):
            return None
        return self.random.choice([40.0, 100.0]) if self.faults.occurs("guest: late") else self.random.uniform(0, 10)

    def lose_answer(self, what, instance_id):
        """Perhaps lose the response of the hypervisor to a command that took effect."""
        if self.faults.occurs("hypervisor: answer lost"):
            self.note(f"the response to {what} {instance_id} is lost")
            raise HypervisorUnavailable(instance_id, "the connection was lost")

    def _start(self, process, actor):
        self.scheduler.start(process, type(actor).__name__.lower(), actor.run)

    def _run_agent(self, process):
        components = self._components(process)
        while True:
            try:
                agent = Agent(components)
                agent.start(reports=True)
                break
            except Exception as error:  # noqa: BLE001 (a service manager starts it again)
                self.note(f"the agent does not start: {error!r}")
                sleep(5.0)
        agent.wait()
        self.scheduler.kill(process, "drained")

    def _components(self, process):
        """What `thrave.components.Components` has, for one process."""
        engine, vault, queues = self.database.engine, self.fixture.vault, SimulatedQueue(self)

        def records(lease=None):
            if lease is not None:
                process.memory["lease"] = lease.token
            return TaskRepository(engine, vault, lease)

        settings = self.settings.model_copy(update={"host_id": process.host or "none"})
        hosts = HostRegistry(
            engine, records(), queues, heartbeat_interval=settings.heartbeat_interval,
            heartbeat_timeout=settings.heartbeat_timeout,
        )  # fmt: skip
        return SimpleNamespace(
            settings=settings, database=engine, instances=SimulatedDriver(self), buckets=self.store, hosts=hosts,
            accounts=Accounts(engine, vault), service=self.fixture.identity, queues=queues, records=records,
        )  # fmt: skip

    def _plan_crash(self):
        self.scheduler.crash_in = 1 + int(self.random.expovariate(1 / self.random.choice([30, 300, 3000])))

    def _process_ended(self, process):
        self.note(f"the process {process} ends")
        self.faults.happened["crash"] += self.faults.are_on
        if self.agents.get(process.host) is process:
            self.scheduler.call_later(self.random.choice([0.5, 5.0, 200.0]), lambda: self._restart(process))
        if self.faults.are_on and self.faults.rates.get("crash") and self.random.random() < 0.6:
            self._plan_crash()

    def _restart(self, process):
        if self.agents[process.host] is process:
            self.start_agent(process.host)

    def _database_fault(self, moment):
        """A fault of the database at a moment: before a transaction, before a commit, or after it."""
        process = self.scheduler.current.process
        if moment == "begin":
            if self.is_away("database") or self.faults.occurs("database: begin fails"):
                raise unavailable()
        elif moment == "commit":
            if self.faults.occurs("database: commit fails"):
                self.note("a commit fails")
                raise lost_commit()
        elif self.faults.occurs("database: commit answer lost"):
            self.note("the response to a commit is lost")
            raise lost_commit()
        elif self.scheduler.crash_in is not None and process.host and self.random.random() < 0.01:
            self.scheduler.crash_in = None
            self.scheduler.kill(process, "after a commit")
