"""Simulated agents, and the processes that they run in. An agent makes the database calls of a real one.

Thrave's own code runs each task from the first step to the last, with its database rows, journal, lease and checks. Not
real are: reading and sealing the volume (parts are recorded as if they had been stored), the hypervisor and the bucket
(both in memory), and DBOS's worker, of which a process can have only one: its database calls are made in their order.
"""

import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from multiprocessing import get_context

import sqlalchemy as sa
from dbos import DBOSPortableJSONSerializer as PortableJSON
from fleet_setup import Backend, Setup, describe_instance, host_name, make_request

from thrave.buckets.base import ObjectHead
from thrave.bundle.model import BundleKey, Checkpoint, PartRecord, SealedBundle, StreamPosition
from thrave.compute.base import VolumeHold
from thrave.compute.fleet import InstanceReporter
from thrave.compute.instance import Instance, InstanceState
from thrave.compute.power_records import PowerRecords
from thrave.database import host
from thrave.tasks.created_buckets import CreatedBuckets
from thrave.tasks.engine import APPLICATION_VERSION, FLEET_POLLING_INTERVAL, RUNNING
from thrave.tasks.errors import TaskCancelled
from thrave.tasks.journal import StoredBatch, StoredObject
from thrave.tasks.lease import HostLease, LeaseTimer
from thrave.tasks.models import BundleTask, BundleTaskState, Step
from thrave.tasks.workflow import BundleWorkflow, TaskContext, TaskSettings

PARTS = 4
"""Backend of a simulated bundle; a real one has a hundred for each GiB. See `docs/explanation/scale.md`."""
WORKER_CONCURRENCY = 2
_PART = memoryview(bytes(10 << 20))
_ETAG = "d" * 32
_DIGESTS = {"sha1": "a" * 40, "sha256": "b" * 64}
_MAX_DOCUMENT = 1 << 20  # bytes; larger objects are parts, whose content is not stored


Seconds = dict[str, list[float]]
"""Duration of each call, by its name."""


class MemoryInstances:
    """The instances of a host, in memory; they power off and start immediately."""

    overlays = None

    def __init__(self, instances: Iterable[Instance]) -> None:
        self._instances = {instance.instance_id: instance for instance in instances}

    def list(
        self, account_id: str | None = None, *, include: Callable[[Instance], bool] | None = None
    ) -> Sequence[Instance]:
        """See Inventory."""
        mine = [one for one in self._instances.values() if account_id in {None, one.account_id}]
        return [one for one in mine if include is None or include(one)]

    def get(self, instance_id: str) -> Instance:
        """See Inventory."""
        return self._instances[instance_id]

    def state(self, instance_id: str) -> InstanceState:
        """See Instances."""
        return self._instances[instance_id].state

    def request_stop(self, instance_id: str) -> None:
        """See Inventory."""
        self._set_state(instance_id, InstanceState.STOPPED)

    def terminate(self, instance_id: str) -> None:
        """See Inventory."""
        self._set_state(instance_id, InstanceState.TERMINATED)

    def start(self, instance_id: str) -> None:
        """See Instances."""
        self._set_state(instance_id, InstanceState.RUNNING)

    def hold_stopped(self, _instance_id: str) -> AbstractContextManager[VolumeHold]:
        """See Instances."""
        return nullcontext(_MemoryHold())

    def _set_state(self, instance_id: str, state: InstanceState) -> None:
        self._instances[instance_id] = replace(self._instances[instance_id], state=state)


class _MemoryHold:
    """No other process uses a simulated machine."""

    def check(self) -> None:
        """See Hold."""


class MemoryStore:
    """A bucket that stores documents, and size and ETag of parts. Has the methods that a task calls."""

    def __init__(self) -> None:
        self._heads: dict[str, ObjectHead] = {}
        self._documents: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def on_behalf_of(self, _access_key_id: str) -> "MemoryStore":
        """See Buckets."""
        return self

    def put(self, _bucket: str, key: str, data: bytes | memoryview, *, policy: object = None) -> str:  # noqa: ARG002 (the signature of Buckets)
        """See Buckets."""
        self._heads[key] = ObjectHead(len(data), _ETAG)
        if len(data) < _MAX_DOCUMENT:
            self._documents[key] = bytes(data)
        return _ETAG

    def get_range(self, _bucket: str, key: str, start: int, length: int) -> bytes:
        """See Buckets. Only documents are stored."""
        return self._documents[key][start : start + length]

    def head(self, _bucket: str, key: str) -> ObjectHead | None:
        """See Buckets."""
        return self._heads.get(key)

    def delete(self, _bucket: str, keys: Iterable[str]) -> None:
        """See Buckets."""
        with self._lock:
            for key in keys:
                self._heads.pop(key, None)
                self._documents.pop(key, None)


class SimulatedWorkflow:
    """The workflow of one task in the tables of DBOS."""

    def __init__(self, backend: Backend, workflow_id: str, owner: str) -> None:
        self._engine = backend.engine
        self._workflow_id = workflow_id
        self._owner = owner
        self.bundle_id = workflow_id.partition(".")[0]

    def end(self) -> None:
        """Record its end."""
        result = PortableJSON().serialize(None)
        self._engine.update_workflow_outcome(self._workflow_id, "SUCCESS", output=result, owner_xid=self._owner)


class SimulatedBundling(BundleWorkflow):
    """Runs a task without a volume."""

    def __init__(self, host: TaskContext, task: BundleTask, run: int, agent: "SimulatedAgent") -> None:
        super().__init__(host, task, run)
        self._agent = agent

    def shut_down(self) -> None:
        """Power off before the state is read, which saves the pause between two readings."""
        with self._enter_state(BundleTaskState.WAITING_FOR_SHUTDOWN) as watch:
            self._overlay.merge(watch.pause)
            self._power.record_power_state()
            self._context.driver.request_stop(self._task.instance_id)
            self._power.shut_down(watch)

    def upload_volume(self) -> None:
        """Record parts as if they were sealed and stored one after the other."""
        secrets_of_bundle = BundleKey.generate()
        names = [f"{self._task.prefix}.part.{index:02}" for index in range(PARTS)]
        parts = [PartRecord(index, name, len(_PART), **_DIGESTS) for index, name in enumerate(names)]
        with self._enter_state(BundleTaskState.BUNDLING) as watch, self._power.hold_stopped(watch) as instance:
            self._repository.set_volume_size(self._task.bundle_id, PARTS * len(_PART))
            self._journal.start_sealing(secrets_of_bundle)
            stored = StoredBatch()
            for index, part in enumerate(parts):
                stored = self._send(part, stored)
                self._repository.set_progress(
                    self._task.bundle_id, BundleTaskState.BUNDLING, 100 * (index + 1) // PARTS
                )
                if index == PARTS // 2 and self._agent.is_cancelled(self._task):
                    raise TaskCancelled
            self._journal.record_stored(stored)
        sealed = SealedBundle(self._task.prefix, PARTS * len(_PART), "e" * 40, secrets_of_bundle, tuple(parts))
        self._journal.record_documents(self._documents(instance, sealed))

    def _send(self, part: PartRecord, before: StoredBatch) -> StoredBatch:
        self._journal.record_upload(part.filename, part, before)
        etag = self._context.store.put(self._task.bucket, part.filename, _PART)
        checkpoint = Checkpoint(
            part.index + 1, StreamPosition(part.size * part.index, 1, 1, "c" * 40), 1, "d" * 64, "e" * 32
        )
        return StoredBatch([StoredObject(part.filename, part.size, etag)], checkpoint)

    def _do(self, step: Step) -> None:
        super()._do(step)
        if step in {Step.STOP, Step.RUN_ON_OVERLAY, Step.START, Step.UNDO_START}:
            self._agent.report()  # a real agent does so every second


class SimulatedAgent:
    """The agent of one host."""

    def __init__(self, backend: Backend, number: int, is_cancelled: Callable[[BundleTask], bool]) -> None:
        """Simulate the agent of a host; `is_cancelled` says whether a task is cancelled when half of it is done."""
        setup, components = backend.setup, backend.components
        self.name = host_name(number)
        self.is_cancelled = is_cancelled
        self._backend = backend
        instances = range(number, setup.scale.instances, setup.scale.hosts)
        self._instances = MemoryInstances(describe_instance(setup, instance) for instance in instances)
        self._reports = InstanceReporter(components.database, self._instances, self.name)
        self._power = PowerRecords(components.database, self.name)
        self.lease = HostLease(self.name, "")

    def start(self) -> None:
        """Acquire the lease of the host, and report its instances."""
        self.lease = self._backend.components.hosts.acquire_lease(self.name, worker_concurrency=WORKER_CONCURRENCY)
        self._backend.engine.upsert_queue(
            name=self._queue_name, concurrency=None, worker_concurrency=WORKER_CONCURRENCY, rate_limit_max=None,
            rate_limit_period_sec=None, partition_concurrency=None, partition_worker_concurrency=None,
            partition_rate_limit_max=None, partition_rate_limit_period_sec=None,
            polling_interval_sec=FLEET_POLLING_INTERVAL, update_existing=True,
        )  # fmt: skip
        self.report()

    def join(self) -> None:
        """Use the lease that the agent of this host has acquired in another process."""
        query = sa.select(host.c.lease).where(host.c.host == self.name)
        with self._backend.components.database.connect() as connection:
            self.lease = HostLease(self.name, connection.execute(query).scalar_one())

    def heartbeat(self) -> None:
        """Send a heartbeat."""
        self._backend.components.hosts.heartbeat(self.lease)

    def report(self) -> None:
        """Report the instances, and query power requests."""
        assert not self._power.list_pending()
        self._reports.report()

    def query_power_recovery(self) -> None:
        """Query instances whose power state must be restored."""
        self._backend.components.records().power_recoveries(self.name)

    def query_cleanup(self) -> None:
        """Query tasks with orphaned objects, as in every pass of the cleanup but the first."""
        self._backend.components.records().cleanups(self.name)

    def enqueue_lost(self) -> None:
        """Query tasks that have no workflow."""
        self._backend.components.hosts.requeue_lost(self.name)

    def poll(self) -> list[tuple[str, str]]:
        """Poll the queue as DBOS does; return the workflows to run, each with its owner."""
        queue = self._backend.engine.get_queue(self._queue_name)
        owner = secrets.token_hex(16)
        workflows, _ = self._backend.engine.start_queued_workflows(
            queue, self.name, APPLICATION_VERSION, None, 0, owner_xid=owner
        )
        return [(workflow_id, owner) for workflow_id in workflows]

    def work(self) -> Iterator[Callable[[], None]]:
        """Yield a function for each task in the host's queue, which runs the task."""
        worker = self._host()
        while workflows := self.poll():
            self._backend.engine.get_workflow_statuses([workflow_id for workflow_id, _ in workflows])
            for workflow_id, owner in workflows:
                yield partial(self._run, worker, SimulatedWorkflow(self._backend, workflow_id, owner))

    def _run(self, worker: TaskContext, workflow: SimulatedWorkflow) -> None:
        """Run a task as `bundling.bundle` does."""
        bundle_id = workflow.bundle_id
        with RUNNING.claimed(bundle_id) as is_first:
            task = worker.repository.get(bundle_id)
            if is_first and task is not None and task.host == worker.host:
                run = worker.repository.start_run(bundle_id)
                if run is not None:
                    SimulatedBundling(worker, task, run, self).run()
        workflow.end()

    def _host(self) -> TaskContext:
        components, settings = self._backend.components, self._backend.components.settings
        return TaskContext(
            host=self.name,
            settings=TaskSettings(**{field.name: getattr(settings, field.name) for field in fields(TaskSettings)}),
            repository=components.records(self.lease),
            accounts=components.accounts,
            driver=self._instances,
            store=MemoryStore(),
            created_buckets=CreatedBuckets(components.database, components.records(self.lease)),
            identity=components.service,
            lease_timer=LeaseTimer(None),  # one process has the agents of many hosts
        )

    @property
    def _queue_name(self) -> str:
        return f"host-{self.name}"


class Shard:
    """The part of the fleet in one process: an API, and the agents of some hosts."""

    def __init__(self, backend: Backend, number: int) -> None:
        self._backend = backend
        scale = backend.setup.scale
        hosts = range(number, scale.hosts, scale.shards)
        self._agents = [SimulatedAgent(backend, host, self._is_cancelled) for host in hosts]

    def start_agents(self) -> Seconds:
        """Start the agent of every host."""
        return _time(("agent's start", agent.start) for agent in self._agents)

    def create(self, numbers: Sequence[int]) -> Seconds:
        """Create tasks, and cancel one of ten immediately."""
        return _time(call for number in numbers for call in self._requests(number))

    def work(self) -> Seconds:
        """Run all tasks in the queues. One of ten is cancelled when half of it is done."""
        return _time(("task", task) for agent in self._agents for task in agent.work())

    def _requests(self, number: int) -> Iterator[tuple[str, Callable[[], object]]]:
        request = make_request(self._backend.setup, number)
        created: list[BundleTask] = []
        yield "create", lambda: created.append(self._backend.tasks.create(request))
        if _ends_in(request.instance_id, 0):
            yield "cancel", lambda: self._backend.tasks.cancel(request.account_id, created[0].bundle_id)

    def _is_cancelled(self, task: BundleTask) -> bool:
        if not _ends_in(task.instance_id, 5):
            return False
        self._backend.tasks.cancel(task.account_id, task.bundle_id)
        return True


class Shards:
    """All processes of the simulation. Each makes one call after the other and returns the seconds of each."""

    def __init__(self, executors: Sequence[ProcessPoolExecutor]) -> None:
        self._executors = executors

    @classmethod
    @contextmanager
    def running(cls, setup: Setup) -> Iterator["Shards"]:
        """Run the processes during the block."""
        with ExitStack() as stack:
            yield cls(
                [
                    stack.enter_context(
                        ProcessPoolExecutor(
                            1, mp_context=get_context("spawn"), initializer=_open, initargs=(setup, number)
                        )
                    )
                    for number in range(setup.scale.shards)
                ]
            )

    def start_agents(self) -> Seconds:
        """See Shard."""
        return _merge([executor.submit(_call, Shard.start_agents) for executor in self._executors])

    def create(self, numbers: Sequence[int]) -> Seconds:
        """See Shard; the tasks are distributed over the processes."""
        number = len(self._executors)
        shares = [numbers[at::number] for at in range(number)]
        return _merge(
            [
                executor.submit(_call, partial(_create, numbers=share))
                for executor, share in zip(self._executors, shares, strict=True)
            ]
        )

    def work(self) -> Seconds:
        """See Shard."""
        return _merge([executor.submit(_call, Shard.work) for executor in self._executors])


_shards: list[Shard] = []  # the one of this process


def _ends_in(name: str, digit: int) -> bool:
    """Whether an instance id ends in a decimal digit; true for one of ten."""
    return int(name.removeprefix("i-"), base=16) % 10 == digit


def _open(setup: Setup, number: int) -> None:
    backend = ExitStack().enter_context(setup.open())
    _shards.append(Shard(backend, number))


def _call(method: Callable[[Shard], Seconds]) -> Seconds:
    return method(_shards[0])


def _create(shard: Shard, *, numbers: Sequence[int]) -> Seconds:
    return shard.create(numbers)


def _time(calls: Iterator[tuple[str, Callable[[], object]]]) -> Seconds:
    durations: Seconds = defaultdict(list)
    for name, call in calls:
        started = time.perf_counter()
        call()
        durations[name].append(time.perf_counter() - started)
    return dict(durations)


def _merge(futures: Sequence[Future[Seconds]]) -> Seconds:
    durations: Seconds = defaultdict(list)
    for future in futures:
        for name, seconds in future.result().items():
            durations[name].extend(seconds)
    return dict(durations)
