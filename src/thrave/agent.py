"""A host's agent: runs the host's bundle tasks and background jobs, and sends heartbeats.

A host has one agent, and a process has one. The agent carries out power requests for the host's instances, and in a
fleet (`thrave agent`) it reports these instances. When the agent loses its lease (`tasks/lease.py`), the process ends.
"""

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
from thrave.concurrency import monotonic, new_event, sleep, start_repeating, start_thread
from thrave.database import is_unavailable
from thrave.tasks import housekeeping
from thrave.tasks.created_buckets import CreatedBuckets
from thrave.tasks.engine import TaskWorker
from thrave.tasks.lease import HostLease, LeaseTimer
from thrave.tasks.models import HostState
from thrave.tasks.repository import TaskRepository
from thrave.tasks.workflow import OnState, TaskContext, TaskSettings, ignore_state, run_bundle_task

REPORT_INTERVAL = 1.0  # seconds
POWER_INTERVAL = 1.0  # seconds between two checks for power requests
REQUEUE_INTERVAL = 30.0  # seconds between two checks for tasks that nothing runs
DRAIN_INTERVAL = 0.5  # seconds
START_AGAIN = 30  # exit code (cli/exit_codes.py) after which a service manager starts the agent again

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class _UnfinishedWork:
    """Unfinished work of a draining host.

    Attributes:
        tasks: Started tasks, with their instances.
        power_requests: Instances with a recorded power request that was not carried out.
        to_recover: Instances that may have to be started, because a task that has ended shut them down.
        to_merge: Instances that run on the overlay of a task that has ended.
        waiting: Instances of the last two lists with another task that has not started. They are not changed before
            that task has ended.
    """

    tasks: dict[str, str]
    power_requests: list[str]
    to_recover: list[str]
    to_merge: list[str]
    waiting: list[str]

    @property
    def is_any(self) -> bool:
        """Whether anything is unfinished."""
        return bool(self.tasks or self.power_requests or self.to_recover or self.to_merge)

    @property
    def can_finish(self) -> bool:
        """Whether some of the work can finish while the host drains. A draining host starts no task."""
        can_change = {*self.to_recover, *self.to_merge}.difference(self.waiting)
        return bool(self.tasks or self.power_requests or can_change)


class Agent:
    """The agent of the host that the settings name."""

    def __init__(self, components: Components, *, on_state: OnState = ignore_state) -> None:
        self._components = components
        self._on_state = on_state
        self._settings = components.settings
        self._worker = TaskWorker(
            self._settings.database, self._settings.host_id, worker_concurrency=self._settings.worker_concurrency
        )
        # SQLite: one machine, so no other host can adopt the tasks.
        others_can_adopt = not self._settings.database.startswith("sqlite")
        self._lease_timer = LeaseTimer(self._settings.heartbeat_timeout if others_can_adopt else None)
        # The S3 client repeats the check before each piece of a request: a piece takes `s3_send_timeout` at most.
        self._before_attempt = partial(self._lease_timer.check, self._settings.s3_send_timeout)
        self._accepts_tasks = True
        self.power = self._open_power(None)
        """Carries out power requests for the host's instances."""
        self._draining = False
        self._drain_until: float | None = None
        self._has_ended = new_event()
        self._exit_status = 0

    def start(self, *, reports: bool) -> None:
        """Acquire the host's lease and start all jobs, each in a thread of its own.

        Args:
            reports: Whether to report the host's instances: other processes show them.
        """
        components, name = self._components, self._settings.host_id
        sent = self._lease_timer.now()
        lease = components.hosts.acquire_lease(name, worker_concurrency=self._settings.worker_concurrency)
        self._lease_timer.renew(sent)
        if reports:
            self._save_host_id()
            report = InstanceReporter(components.database, components.instances, name, lease.is_held).report
            report()
            self._start_job("reports", REPORT_INTERVAL, report)
            self.power = self._open_power(lease)
        self._start_job("power", POWER_INTERVAL, self.power.resume_pending)
        records = components.records(lease)
        created_buckets = CreatedBuckets(components.database, records, before_attempt=self._before_attempt)
        context = TaskContext(
            host=name,
            settings=self._task_settings(),
            repository=records,
            accounts=components.accounts,
            driver=components.instances,
            store=components.buckets,
            created_buckets=created_buckets,
            identity=components.service,
            lease_timer=self._lease_timer,
            before_attempt=self._before_attempt,
            on_state=self._on_state,
        )
        requeue_lost = partial(components.hosts.requeue_lost, name)
        requeue_lost()  # before the worker recovers its own workflows: tasks that are queued already need nothing
        self._update_state(components.hosts.heartbeat(lease))  # before a task can start: the host may drain
        if not self._accepts_tasks:
            log.warning("host starts no task: it drains until `thrave host activate`", host=name)
        self._worker.launch(partial(self._run, context))
        self._start_job("requeue lost tasks", REQUEUE_INTERVAL, requeue_lost)
        self._start_housekeeping(records, created_buckets)
        self._start_job("heartbeat", self._settings.heartbeat_interval, partial(self._heartbeat, lease))

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

    def _start_housekeeping(self, records: TaskRepository, created_buckets: CreatedBuckets) -> None:
        components, name = self._components, self._settings.host_id
        object_cleanup = housekeeping.ObjectCleanup(
            records,
            components.buckets,
            name,
            stall_timeout=self._settings.stall_timeout,
            before_attempt=self._before_attempt,
        )
        keep = timedelta(days=self._settings.task_retention_days)
        power_recovery = housekeeping.PowerRecovery(records, components.instances, name, check=self._lease_timer.check)
        self._start_job("power recovery", housekeeping.POWER_RECOVERY_INTERVAL, power_recovery.run_once)
        # In a thread of its own, since a merge may take minutes.
        self._start_job("overlay merge", housekeeping.POWER_RECOVERY_INTERVAL, power_recovery.merge_overlays)
        self._start_job("object cleanup", housekeeping.OBJECT_CLEANUP_INTERVAL, object_cleanup.run_once)
        self._start_job(
            "bucket cleanup",
            housekeeping.OBJECT_CLEANUP_INTERVAL,
            partial(created_buckets.remove_all, components.buckets, name),
        )
        self._start_job(
            "retention",
            housekeeping.RETENTION_INTERVAL,
            housekeeping.TaskRetention(records, components.queues.delete_ended, keep).run_once,
        )

    def _open_power(self, lease: HostLease | None) -> BackgroundPower:
        database = self._components.database
        self._power_records = (
            PowerRecords(database) if lease is None else PowerRecords(database, lease.host, lease.is_held)
        )
        return BackgroundPower(
            self._components.instances,
            self._power_records,
            shutdown_timeout=self._settings.shutdown_timeout,
            check_lease=self._lease_timer.check,
        )

    def wait(self) -> int:
        """Wait until the host is drained; return the exit code: 0, or `START_AGAIN`."""
        self._has_ended.wait()  # no timeout: the process runs until its agent ends or a signal arrives
        return self._exit_status

    def _heartbeat(self, lease: HostLease) -> None:
        sent = self._lease_timer.now()
        self._update_state(self._components.hosts.heartbeat(lease))
        self._lease_timer.renew(sent)
        if not self._accepts_tasks and not self._draining:
            self._draining = True
            try:
                start_thread("drain", partial(self._drain, lease), on_failure=self._retry_drain)
            except RuntimeError as error:  # no thread can be started
                self._retry_drain(error)

    def _retry_drain(self, error: BaseException) -> None:
        """Have the next heartbeat start the drain again."""
        log.error("drain failed, retrying", exc_info=error)
        self._draining = False

    def _update_state(self, state: HostState) -> None:
        """Stop taking tasks if the host drains. This is final: to end a drain, the agent must be started again."""
        if state is HostState.DRAINING:
            self._accepts_tasks = False

    def _run(self, context: TaskContext, bundle_id: str) -> None:
        """Run a task. While the host drains, a task that has not started waits for the next agent."""
        if self._accepts_tasks or bundle_id in self._components.hosts.started_tasks(context.host):
            run_bundle_task(context, bundle_id)

    def _drain(self, lease: HostLease) -> None:
        """Wait at most `drain_timeout` until this host has finished its work, and end the agent. May be repeated."""
        log.info("drain started", host=lease.host)
        if self._drain_until is None:  # kept when the drain is repeated
            self._drain_until = monotonic() + self._settings.drain_timeout
        # The worker continues meanwhile: its queue may have tasks that a crash interrupted.
        while self._unfinished(lease.host).can_finish and monotonic() < self._drain_until:
            sleep(DRAIN_INTERVAL)
        self._worker.drain(max(self._drain_until - monotonic(), 0.0))
        unfinished = self._unfinished(lease.host)
        if unfinished.is_any:
            # The host stays `draining`. It is lost soon, and its next agent finishes this work.
            log.error("drain ended with unfinished work", host=lease.host, **asdict(unfinished))
            is_drain_cancelled = self._components.hosts.heartbeat(lease) is not HostState.DRAINING
        else:
            is_drain_cancelled = not self._components.hosts.record_drained(lease)
        if is_drain_cancelled:
            # The engine cannot be started twice in a process: a service manager starts another process.
            log.warning("drain ended by an operator: the agent must be started again", host=lease.host)
            self._exit_status = START_AGAIN
        self._has_ended.set()

    def _unfinished(self, host: str) -> _UnfinishedWork:
        """Return what the host has started and not finished."""
        records = self._components.records()
        # Read first: when a task ends, its instance moves to one of the other lists.
        started = self._components.hosts.started_tasks(host)
        tasks = {bundle_id: task.instance_id for bundle_id in started if (task := records.get(bundle_id)) is not None}
        to_recover = {
            task.instance_id for task in (*records.power_recoveries(host), *records.moved_power_recoveries(host))
        }
        to_merge = {task.instance_id for task in records.unmerged_overlays(host)}
        waiting = {
            instance_id
            for instance_id in to_recover | to_merge
            if (task := records.in_progress(instance_id)) is not None and task.bundle_id not in tasks
        }
        return _UnfinishedWork(
            tasks=tasks,
            power_requests=sorted(self._power_records.list_pending()),
            to_recover=sorted(to_recover),
            to_merge=sorted(to_merge),
            waiting=sorted(waiting),
        )

    def _save_host_id(self) -> None:
        """Save the host id in the data directory, so that commands there add instances to this host."""
        directory = self._settings.directory
        files.replace(directory.host_id, f"{self._settings.host_id}\n".encode(), spool=directory.root)

    def _start_job(self, name: str, interval: float, work: Callable[[], None]) -> None:
        start_repeating(name, interval, work, on_failure=partial(_report, name))


def _report(job: str, error: BaseException) -> None:
    if is_unavailable(error):
        log.warning("database unavailable, retrying", job=job, error=str(getattr(error, "orig", error)))
    else:
        log.error("background job failed", job=job, exc_info=error)
