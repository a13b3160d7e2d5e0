"""Simulated agents: they do with the database exactly what real ones do; only sealing and power are left out.

A task is done by the program's own `Bundling`, from its first step to its last, with the real records, journal, fence
and checks. Left out are reading and sealing the volume (its parts are written down as if they had been sent), and the
hypervisor and the bucket, which are in memory. DBOS's worker, of which there can be one in a process, is stood in for
by its own database calls in their order.
"""

import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial

import sqlalchemy as sa
from dbos import DBOSPortableJSONSerializer as PortableJSON
from fleet_stage import Rooms, described, host_name

from thrave.buckets.buckets import ObjectHead
from thrave.bundle.checkpoint import Checkpoint, StreamPoint
from thrave.bundle.sealed import Sealed, SealedPart
from thrave.bundle.secrets import BundleSecrets
from thrave.compute.fleet import InstanceReports
from thrave.compute.instance import Instance, InstanceState
from thrave.compute.instances import Hold
from thrave.compute.power_records import PowerRecords
from thrave.database import host
from thrave.tasks.bundling import Bundling, Host
from thrave.tasks.engine import APPLICATION_VERSION, FLEET_POLLING_INTERVAL, RUNNING
from thrave.tasks.failures import Cancelled
from thrave.tasks.fence import Fence
from thrave.tasks.journal import Stored, StoredObject
from thrave.tasks.lease import Lease
from thrave.tasks.made_buckets import MadeBuckets
from thrave.tasks.states import BundleTaskState
from thrave.tasks.steps import Step
from thrave.tasks.task import BundleTask

PARTS = 4
"""Of a simulated bundle; a real one has a hundred for each GiB. See `docs/explanation/scale.md`."""
TASKS_AT_ONCE = 2
_PART = memoryview(bytes(10 << 20))
_ETAG = "d" * 32
_DIGESTS = {"sha1": "a" * 40, "sha256": "b" * 64}
_SMALL = 1 << 20  # bytes; the documents of a bundle are shorter, and are kept


class Guests:
    """The instances of a host, in memory: they power off and start at once. An `Instances`."""

    overlays = None

    def __init__(self, instances: Iterable[Instance]) -> None:
        self._instances = {instance.instance_id: instance for instance in instances}

    def list(
        self, account_id: str | None = None, *, belongs: Callable[[Instance], bool] | None = None
    ) -> Sequence[Instance]:
        """See Inventory."""
        mine = [one for one in self._instances.values() if account_id in {None, one.account_id}]
        return [one for one in mine if belongs is None or belongs(one)]

    def get(self, instance_id: str) -> Instance:
        """See Inventory."""
        return self._instances[instance_id]

    def state(self, instance_id: str) -> InstanceState:
        """See Instances."""
        return self._instances[instance_id].state

    def request_stop(self, instance_id: str) -> None:
        """See Inventory."""
        self._be(instance_id, InstanceState.STOPPED)

    def terminate(self, instance_id: str) -> None:
        """See Inventory."""
        self._be(instance_id, InstanceState.TERMINATED)

    def start(self, instance_id: str) -> None:
        """See Instances."""
        self._be(instance_id, InstanceState.RUNNING)

    def hold(self, _instance_id: str) -> AbstractContextManager[Hold]:
        """See Instances."""
        return nullcontext(_Held())

    def _be(self, instance_id: str, state: InstanceState) -> None:
        self._instances[instance_id] = replace(self._instances[instance_id], state=state)


class _Held:
    """Nobody else has a simulated machine."""

    def check(self) -> None:
        """See Hold."""


class Store:
    """A bucket that keeps of its objects what can be asked of them. As much of `Buckets` as a task uses."""

    def __init__(self) -> None:
        self._heads: dict[str, ObjectHead] = {}
        self._documents: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def on_behalf_of(self, _access_key_id: str) -> "Store":
        """See Buckets."""
        return self

    def put(self, _bucket: str, key: str, data: bytes | memoryview, *, grant: object = None) -> str:  # noqa: ARG002 (Buckets' signature)
        """See Buckets."""
        self._heads[key] = ObjectHead(len(data), _ETAG)
        if len(data) < _SMALL:
            self._documents[key] = bytes(data)
        return _ETAG

    def get_range(self, _bucket: str, key: str, start: int, length: int) -> bytes:
        """See Buckets. Only documents are kept."""
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


class Workflow:
    """One task's run, in the durable engine's books."""

    def __init__(self, rooms: Rooms, workflow_id: str, owner: str) -> None:
        self._engine = rooms.engine
        self._workflow_id = workflow_id
        self._owner = owner
        self.bundle_id = workflow_id.partition(".")[0]

    def end(self) -> None:
        """Write down that it has ended."""
        nothing = PortableJSON().serialize(None)
        self._engine.update_workflow_outcome(self._workflow_id, "SUCCESS", output=nothing, owner_xid=self._owner)


class SimulatedBundling(Bundling):
    """A task done without a volume."""

    def __init__(self, host: Host, task: BundleTask, run: int, agent: "SimulatedAgent") -> None:
        super().__init__(host, task, run)
        self._agent = agent

    def stop(self) -> None:
        """Ask the guest before its first look at it, which saves the pause between two looks."""
        with self._state(BundleTaskState.WAITING_FOR_SHUTDOWN) as watch:
            self._freezer.merge(watch.pause)
            self._power.note()
            self._host.instances.request_stop(self._task.instance_id)
            self._power.off(watch)

    def seal(self) -> None:
        """Write parts down as if they were sealed and sent one after the other."""
        secrets_of_bundle = BundleSecrets.generate()
        names = [f"{self._task.prefix}.part.{index:02}" for index in range(PARTS)]
        parts = [SealedPart(index, name, len(_PART), **_DIGESTS) for index, name in enumerate(names)]
        with self._state(BundleTaskState.BUNDLING) as watch, self._power.held_off(watch) as instance:
            self._records.note_volume_size(self._task.bundle_id, PARTS * len(_PART))
            self._journal.begin(secrets_of_bundle)
            stored = Stored()
            for index, part in enumerate(parts):
                stored = self._send(part, stored)
                self._records.advance(self._task.bundle_id, BundleTaskState.BUNDLING, 100 * (index + 1) // PARTS)
                if index == PARTS // 2 and self._agent.is_cancelled(self._task):
                    raise Cancelled
            self._journal.stored(stored)
        sealed = Sealed(self._task.prefix, PARTS * len(_PART), "e" * 40, secrets_of_bundle, tuple(parts))
        self._journal.conclude(self._documents(instance, sealed))

    def _send(self, part: SealedPart, before: Stored) -> Stored:
        self._journal.sending(part.filename, part, before)
        etag = self._host.buckets.put(self._task.bucket, part.filename, _PART)
        checkpoint = Checkpoint(
            part.index + 1, StreamPoint(part.size * part.index, 1, 1, "c" * 40), 1, "d" * 64, "e" * 32
        )
        return Stored([StoredObject(part.filename, part.size, etag)], checkpoint)

    def _do(self, step: Step) -> None:
        super()._do(step)
        if step in {Step.STOP, Step.FREE, Step.START, Step.UNDO_START}:
            self._agent.report()  # a real one does so every second


class SimulatedAgent:
    """The agent of one host."""

    def __init__(self, rooms: Rooms, number: int, is_cancelled: Callable[[BundleTask], bool]) -> None:
        """Be the agent of the host of that number; a task that `is_cancelled` half-way gives up then."""
        stage, ground = rooms.stage, rooms.ground
        self.name = host_name(number)
        self.is_cancelled = is_cancelled
        self._rooms = rooms
        mine = range(number, stage.scale.instances, stage.scale.hosts)
        self._guests = Guests(described(stage, instance) for instance in mine)
        self._reports = InstanceReports(ground.database, self._guests, self.name)
        self._power = PowerRecords(ground.database, self.name)
        self.fence = Fence(self.name, "")

    def start(self) -> None:
        """Take the host, and report its instances."""
        self.fence = self._rooms.ground.hosts.take(self.name, tasks_at_once=TASKS_AT_ONCE)
        self._rooms.engine.upsert_queue(
            name=self._queue_name, concurrency=None, worker_concurrency=TASKS_AT_ONCE, rate_limit_max=None,
            rate_limit_period_sec=None, partition_concurrency=None, partition_worker_concurrency=None,
            partition_rate_limit_max=None, partition_rate_limit_period_sec=None,
            polling_interval_sec=FLEET_POLLING_INTERVAL, update_existing=True,
        )  # fmt: skip
        self.report()

    def join(self) -> None:
        """Be the host's agent beside the one that took it, in another process."""
        query = sa.select(host.c.lease).where(host.c.host == self.name)
        with self._rooms.ground.database.connect() as connection:
            self.fence = Fence(self.name, connection.execute(query).scalar_one())

    def heartbeat(self) -> None:
        """Give a sign of life."""
        self._rooms.ground.hosts.heartbeat(self.fence)

    def report(self) -> None:
        """Report the instances, and look for what is to be done with their power."""
        assert not self._power.to_do()
        self._reports.report()

    def look_after(self) -> None:
        """Look as the caretaker does."""
        self._rooms.ground.records().looked_after(self.name)

    def look_for_left_overs(self) -> None:
        """Look as the agent does who cleans up, from its second look on."""
        self._rooms.ground.records().to_clean_up(self.name)

    def look_for_lost(self) -> None:
        """Look for tasks that no workflow will run."""
        self._rooms.ground.hosts.enqueue_lost(self.name)

    def poll(self) -> list[tuple[str, str]]:
        """Look into the queue as DBOS does; give the workflows that are to be run, each with its owner."""
        queue = self._rooms.engine.get_queue(self._queue_name)
        owner = secrets.token_hex(16)
        taken, _ = self._rooms.engine.start_queued_workflows(
            queue, self.name, APPLICATION_VERSION, None, 0, owner_xid=owner
        )
        return [(workflow_id, owner) for workflow_id in taken]

    def work(self) -> Iterator[Callable[[], None]]:
        """The tasks in the host's queue, to be done one by one."""
        worker = self._host()
        while taken := self.poll():
            self._rooms.engine.get_workflow_statuses([workflow_id for workflow_id, _ in taken])
            for workflow_id, owner in taken:
                yield partial(self._do, worker, Workflow(self._rooms, workflow_id, owner))

    def _do(self, worker: Host, workflow: Workflow) -> None:
        """What `bundling.bundle` does."""
        bundle_id = workflow.bundle_id
        with RUNNING.claimed(bundle_id) as is_first:
            task = worker.records.get(bundle_id)
            if is_first and task is not None and task.host == worker.name:
                run = worker.records.take_up(bundle_id)
                if run is not None:
                    SimulatedBundling(worker, task, run, self).run()
        workflow.end()

    def _host(self) -> Host:
        ground, settings = self._rooms.ground, self._rooms.ground.settings
        given = {
            "name": self.name,
            "records": ground.records(self.fence),
            "accounts": ground.accounts,
            "instances": self._guests,
            "buckets": Store(),
            "made_buckets": MadeBuckets(ground.database, ground.records(self.fence)),
            "store_patience": settings.s3_patience,
            "service": ground.service,
            "lease": Lease(None),  # a process here stands for many hosts
        }
        names = {field.name for field in fields(Host)} - given.keys()
        rest = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
        return Host(**given, **rest)

    @property
    def _queue_name(self) -> str:
        return f"host-{self.name}"
