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
from thrave.compute.instance import InstanceState, OffReason
from thrave.config import Settings
from thrave.identity.accounts import Accounts
from thrave.identity.certificates import ServiceIdentity
from thrave.tasks.hosts import HostRegistry
from thrave.tasks.repository import TaskRepository
from thrave.vault import Vault

BUCKET = "bucket"
OWNERS = 2
DRAINED, NOT_STARTED = "drained", "not started"
RESTART_PAUSES = {DRAINED: 200.0, NOT_STARTED: 5.0}
"""Seconds until a service manager starts an agent again that has ended for this reason."""


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
        self._restarts = {}  # what starts a process again, by process
        self.random = random.Random(seed)
        self.faults = Faults(self.random, without, focus)
        self.faults.on_fault = self._perhaps_crash_soon
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
            instance_id, blocks = f"i-{number:08x}", self.random.choice([2, 2, 20, 40, 60])
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
        """Start every agent and everybody who acts."""
        if self.faults.rates.get("crash"):
            self._plan_crash()
        for host in self.hosts:
            self.start_agent(host)
        for number in range(OWNERS):
            self._start_api(f"api {number}", Owner(self))
        self._start(Process("outsider"), Outsider(self))
        self.operator = Process("operator")
        self._start(self.operator, Operator(self, self._components(self.operator).hosts))

    def start_agent(self, host):
        """Start an agent process on a host."""
        process = Process(
            f"agent {host} #{self.next_number()}", host, can_crash=True,
            clock_error=self.random.choice([0.0, 0.0, -300.0, 300.0]),
            drift=self.random.choice([0.0, 0.0, 0.01, -0.01]),
        )  # fmt: skip
        self.agents[host] = process
        self._restarts[process] = lambda: self._restart(process)
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

    def reach_failpoint(self, place):
        """A thread of the product is before or after the block of a failpoint."""
        if self.scheduler.current is not None:
            self.count(f"failpoint {place.partition(',')[0]}")
            self._perhaps_crash("at a failpoint")

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
        """Seconds after which a guest follows a shutdown request, below twice `shutdown_timeout`; None: it does not.

        The product takes a guest that powers off later for one that its owner has shut down.
        """
        if self.faults.occurs("guest: deaf"):
            return None
        return self.random.choice([40.0, 55.0]) if self.faults.occurs("guest: late") else self.random.uniform(0, 10)

    def lose_answer(self, what, instance_id):
        """Perhaps lose the response of the hypervisor to a command that took effect."""
        if self.faults.occurs("hypervisor: answer lost"):
            self.note(f"the response to {what} {instance_id} is lost")
            raise HypervisorUnavailable(instance_id, "the connection was lost")

    def _start_api(self, name, owner):
        """Start an API process with an owner who sends his requests to it; it is started again if it crashes."""
        process = Process(name, can_crash=True)
        self._restarts[process] = lambda: self._start_api(f"api #{self.next_number()}", owner)
        self._start(process, owner)

    def _start(self, process, actor):
        self.scheduler.start(process, type(actor).__name__.lower(), actor.run)

    def _run_agent(self, process):
        try:
            agent = Agent(self._components(process))
            agent.start(reports=True)
        except Exception as error:  # noqa: BLE001 (the command ends, and a service manager starts it again)
            self.note(f"the agent does not start: {error!r}")
            self.scheduler.kill(process, NOT_STARTED)
        agent.wait()
        self.scheduler.kill(process, DRAINED)

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

    def _perhaps_crash_soon(self):
        """Perhaps plan a crash for the time in which the product handles a fault: that code seldom runs."""
        if self.faults.rates.get("crash") and self.random.random() < 0.05:
            self.scheduler.crash_in = 1 + int(self.random.expovariate(1 / self.random.choice([30, 300])))

    def _process_ended(self, process, why):
        self.note(f"the process {process} ends: {why}")
        if why in RESTART_PAUSES:
            self.scheduler.call_later(RESTART_PAUSES[why], self._restarts[process])
            return
        self.faults.happened["crash"] += self.faults.are_on
        if restart := self._restarts.get(process):
            self.scheduler.call_later(self.random.choice([0.5, 5.0, 200.0]), restart)
        if process.host and self.faults.occurs("host: loses power"):
            self._lose_power()
        if self.faults.are_on and self.faults.rates.get("crash") and self.random.random() < 0.6:
            self._plan_crash()

    def _restart(self, process):
        if self.agents[process.host] is process:
            self.start_agent(process.host)

    def _lose_power(self):
        """Switch some machines off, as if their host had lost power together with its agent."""
        for machine in self.machines.values():
            if self.random.random() < 0.7:
                self.note(f"{machine.instance_id} loses power")
                machine.power_off(OffReason.LOST_POWER)
                self.wanted[machine.instance_id] = None

    def _database_fault(self, moment):
        """A fault of the database at a moment: before a transaction, before a commit, or after it."""
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
        else:
            self._perhaps_crash("after a commit")

    def _perhaps_crash(self, when):
        """Perhaps kill the current process, in a run that has crashes."""
        process = self.scheduler.current.process
        if self.scheduler.crash_in is not None and process.can_crash and self.random.random() < 0.01:
            self.scheduler.crash_in = None
            self.scheduler.kill(process, when)
