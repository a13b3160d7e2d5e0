"""A host's agent: runs the host's bundle tasks, and sends heartbeats. There is one a host, and one in a process.

It does what was asked of the power of the host's instances, and in a fleet (`thrave agent`) it reports them.
What it may do hangs on its lease (`tasks/lease.py`): without it the process ends.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial

import structlog

from thrave import files
from thrave.components import Components
from thrave.compute.fleet import InstanceReporter
from thrave.compute.power import BackgroundPower
from thrave.compute.power_records import PowerRecords
from thrave.concurrency import repeat, supervised
from thrave.database import is_unavailable
from thrave.tasks import housekeeping
from thrave.tasks.engine import TaskWorker
from thrave.tasks.lease import Fence, Lease
from thrave.tasks.models import HostState
from thrave.tasks.object_removal import CreatedBuckets
from thrave.tasks.repository import TaskRepository
from thrave.tasks.workflow import TaskContext, TaskSettings, run_bundle_task

REPORT_INTERVAL = 1.0  # seconds
POWER_INTERVAL = 1.0  # seconds between two looks for what is to be done with the power of instances
LOST_INTERVAL = 30.0  # seconds
DRAIN_INTERVAL = 0.5  # seconds
START_AGAIN = 30  # the exit status (cli/exit_codes.py) after which a service manager starts the agent again

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class _Unfinished:
    """Work of a host that drains.

    Attributes:
        tasks: Begun tasks, and their instances.
        power_requests: Instances of which an accepted request was not carried out.
        to_recover: Instances that may have to be started, since a task that has ended switched them off.
        to_merge: Instances that run on the overlay of a task that has ended.
        waiting: Those of the last two whose next task has not begun. Nothing is done to them before it has ended.
    """

    tasks: dict[str, str]
    power_requests: list[str]
    to_recover: list[str]
    to_merge: list[str]
    waiting: list[str]

    @property
    def is_any(self) -> bool:
        """Whether there is any."""
        return bool(self.tasks or self.power_requests or self.to_recover or self.to_merge)

    @property
    def can_finish(self) -> bool:
        """Whether any can be finished while the host drains and begins no task."""
        others = {*self.to_recover, *self.to_merge}.difference(self.waiting)
        return bool(self.tasks or self.power_requests or others)


class Agent:
    """The agent of the host that the settings name."""

    def __init__(self, ground: Components) -> None:
        self._ground = ground
        self._settings = ground.settings
        self._worker = TaskWorker(
            self._settings.database, self._settings.host_id, worker_concurrency=self._settings.worker_concurrency
        )
        others_can_adopt = not self._settings.database.startswith("sqlite")
        self._lease = Lease(self._settings.heartbeat_timeout if others_can_adopt else None)
        # Within an attempt the check is repeated before each piece of a request (`buckets/s3_client.py`).
        self._before_attempt = partial(self._lease.check, self._settings.s3_send_timeout)
        self._takes_tasks = True
        self.power = self._power(None)
        """Carries out what is asked of the instances' power."""
        self._draining = False
        self._drain_until: float | None = None
        self._over = threading.Event()
        self._status = 0

    def start(self, *, reports: bool) -> None:
        """Take the host, and begin to work in threads of its own; `reports` its instances if others show them."""
        ground, name = self._ground, self._settings.host_id
        sent = self._lease.now()
        fence = ground.hosts.take(name, worker_concurrency=self._settings.worker_concurrency)
        self._lease.renewed(sent)
        if reports:
            self._remember_name()
            report = InstanceReporter(ground.database, ground.instances, name, fence.holds).report
            report()
            self._begin("reports", REPORT_INTERVAL, report)
            self.power = self._power(fence)
        self._begin("power", POWER_INTERVAL, self.power.look)
        records = ground.records(fence)
        context = TaskContext(
            host=name,
            settings=self._task_settings(),
            repository=records,
            accounts=ground.accounts,
            driver=ground.instances,
            store=ground.buckets,
            created_buckets=CreatedBuckets(ground.database, records, before_attempt=self._before_attempt),
            identity=ground.service,
            lease=self._lease,
            before_attempt=self._before_attempt,
        )
        find_lost = partial(ground.hosts.enqueue_lost, name)
        find_lost()  # before the worker recovers its own: what is in the queue already needs nothing
        self._note(ground.hosts.heartbeat(fence))  # before a task can begin: the host may drain
        if not self._takes_tasks:
            log.warning("host takes no task: it drains until `thrave host activate`", host=name)
        self._worker.launch(partial(self._run, context))
        self._begin("lost tasks", LOST_INTERVAL, find_lost)
        self._keep_house(records)
        self._begin("heartbeat", self._settings.heartbeat_interval, partial(self._heartbeat, fence))

    def _task_settings(self) -> TaskSettings:
        return TaskSettings(
            shutdown_timeout=self._settings.shutdown_timeout,
            shutdown_timeout_action=self._settings.shutdown_timeout_action,
            capture_mode=self._settings.capture_mode,
            sysprep_command=self._settings.sysprep_command,
            image_dirs=self._settings.image_dirs,
            unclean_volume=self._settings.unclean_volume,
            skip_unused=self._settings.skip_unused,
            compression=self._settings.compression,
            existing_bundle=self._settings.existing_bundle,
            upload_concurrency=self._settings.upload_concurrency,
            s3_retry_timeout=self._settings.s3_retry_timeout,
            stall_timeout=self._settings.stall_timeout,
        )

    def _keep_house(self, records: TaskRepository) -> None:
        ground, name = self._ground, self._settings.host_id
        left_over = housekeeping.ObjectCleanup(
            records,
            ground.buckets,
            name,
            stall_timeout=self._settings.stall_timeout,
            before_attempt=self._before_attempt,
        )
        keep = timedelta(days=self._settings.task_retention_days)
        looks_after = housekeeping.PowerRecovery(records, ground.instances, name, check=self._lease.check)
        self._begin("caretaker", housekeeping.POWER_RECOVERY_INTERVAL, looks_after.look)
        self._begin(
            "overlays", housekeeping.POWER_RECOVERY_INTERVAL, looks_after.merge
        )  # a merge may take long, and nobody waits for it
        self._begin("left-overs", housekeeping.OBJECT_CLEANUP_INTERVAL, left_over.look)
        made = CreatedBuckets(ground.database, records, before_attempt=self._before_attempt)
        self._begin("made buckets", housekeeping.OBJECT_CLEANUP_INTERVAL, partial(made.look, ground.buckets, name))
        self._begin(
            "retention",
            housekeeping.RETENTION_INTERVAL,
            housekeeping.TaskRetention(records, ground.queues.delete_ended, keep).look,
        )

    def _power(self, fence: Fence | None) -> BackgroundPower:
        database = self._ground.database
        self._power_records = (
            PowerRecords(database) if fence is None else PowerRecords(database, fence.host, fence.holds)
        )
        return BackgroundPower(
            self._ground.instances,
            self._power_records,
            grace=self._settings.shutdown_timeout,
            check=self._lease.check,
        )

    def wait(self) -> int:
        """Wait until the host has been drained; return the exit status, 0 unless the agent is to be started anew."""
        self._over.wait()  # no timeout: this is what the process is there for; signals end it
        return self._status

    def _heartbeat(self, fence: Fence) -> None:
        sent = self._lease.now()
        self._note(self._ground.hosts.heartbeat(fence))
        self._lease.renewed(sent)
        if not self._takes_tasks and not self._draining:
            self._draining = True
            try:
                supervised("drain", partial(self._drain, fence), on_failure=self._not_drained)
            except RuntimeError as error:  # no thread can be started
                self._not_drained(error)

    def _not_drained(self, error: BaseException) -> None:
        """Have the next heartbeat begin to drain again."""
        log.error("the host could not be drained; it is tried again", exc_info=error)
        self._draining = False

    def _note(self, state: HostState) -> None:
        """Record that the host drains. There is no way back: an operator who ends a drain starts the agent anew."""
        if state is HostState.DRAINING:
            self._takes_tasks = False

    def _run(self, context: TaskContext, bundle_id: str) -> None:
        """Work on a task, unless the host drains and has not begun it: then it waits for the next agent."""
        if self._takes_tasks or bundle_id in self._ground.hosts.begun(context.host):
            run_bundle_task(context, bundle_id)

    def _drain(self, fence: Fence) -> None:
        """Wait for what this host has begun, `drain_timeout` at the most, and end the agent. May be repeated."""
        log.info("draining", host=fence.host)
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self._settings.drain_timeout
        # The worker goes on meanwhile: tasks that a crash cut off may still be in its queue.
        while self._unfinished(fence.host).can_finish and time.monotonic() < self._drain_until:
            time.sleep(DRAIN_INTERVAL)
        self._worker.drain(max(self._drain_until - time.monotonic(), 0.0))
        unfinished = self._unfinished(fence.host)
        if unfinished.is_any:
            # The host stays `draining`: it counts as lost soon, and its next agent finishes this.
            log.error("the drain ends with unfinished work", host=fence.host, **asdict(unfinished))
            is_ended = self._ground.hosts.heartbeat(fence) is not HostState.DRAINING
        else:
            is_ended = not self._ground.hosts.drained(fence)
        if is_ended:
            # The engine cannot be started twice in a process: a service manager starts another process.
            log.warning("an operator has ended the drain: the agent has to be started anew", host=fence.host)
            self._status = START_AGAIN
        self._over.set()

    def _unfinished(self, host: str) -> "_Unfinished":
        """What the host has begun and not finished."""
        records = self._ground.records()
        begun = self._ground.hosts.begun(host)  # first: a task that ends leaves its instance to the others
        tasks = {bundle_id: task.instance_id for bundle_id in begun if (task := records.get(bundle_id)) is not None}
        to_recover = {
            task.instance_id for task in (*records.power_recoveries(host), *records.moved_power_recoveries(host))
        }
        to_merge = {task.instance_id for task in records.unmerged_overlays(host)}
        waiting = {
            instance_id
            for instance_id in to_recover | to_merge
            if (task := records.in_progress(instance_id)) is not None and task.bundle_id not in tasks
        }
        return _Unfinished(
            tasks=tasks,
            power_requests=sorted(self._power_records.to_do()),
            to_recover=sorted(to_recover),
            to_merge=sorted(to_merge),
            waiting=sorted(waiting),
        )

    def _remember_name(self) -> None:
        """Keep the host's name in the data directory, so that commands there add instances to this host."""
        directory = self._settings.directory
        files.replace(directory.host_id, f"{self._settings.host_id}\n".encode(), spool=directory.root)

    def _begin(self, name: str, interval: float, work: Callable[[], None]) -> None:
        repeat(name, interval, work, on_failure=partial(_report, name))


def _report(job: str, error: BaseException) -> None:
    if is_unavailable(error):  # the database may be back next time
        log.warning("the database does not answer", reason=str(getattr(error, "orig", error)))
    else:
        log.error("an agent's errand failed", job=job, exc_info=error)
