"""One bundle task, from a running instance to a bundle in a bucket.

`BundleWorkflow.run` runs the steps of `models.py`. The task's row names the next step, so after a crash it resumes
with the interrupted step. Every step may be repeated. Only this module uses instances, volumes, bundles and buckets
together; those packages do not import each other. The calls of the API are in `task_service.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from thrave.buckets.base import ObjectStore
from thrave.buckets.errors import BucketError, TransientError
from thrave.buckets.upload_policy import UploadPolicy
from thrave.bundle.gzip_stream import Compression
from thrave.bundle.manifest import write_manifest
from thrave.bundle.model import SealedBundle
from thrave.bundle.side_file import write_side_file
from thrave.compute.base import HypervisorDriver
from thrave.compute.instance import UNCLEAN_REASONS, UNREADABLE_REASONS, Instance, VolumeFile
from thrave.concurrency import Call, monotonic, sleep
from thrave.identity.accounts import Accounts
from thrave.identity.certificates import ServiceIdentity, load_certificate
from thrave.log_events import log_event
from thrave.tasks.created_buckets import CreatedBuckets
from thrave.tasks.engine import RUNNING
from thrave.tasks.errors import ErrorKind, TaskCancelled, TaskFailure, kind_of, to_task_failure
from thrave.tasks.failpoints import failpoint
from thrave.tasks.instance_power import InstancePower, RootOverlay, ShutdownTimeoutAction
from thrave.tasks.journal import Documents
from thrave.tasks.lease import LeaseExpiredError, LeaseTimer, RightLostError
from thrave.tasks.models import (
    FINISHED,
    STEP_TRANSITIONS,
    STEPS_UNTIL_READ,
    UNDO_STEPS,
    BundleTask,
    BundleTaskState,
    Step,
)
from thrave.tasks.monitor import TaskMonitor
from thrave.tasks.repository import TaskRepository
from thrave.tasks.root_volume import VolumeReader, check_root_volume
from thrave.tasks.step_retry import retry_database, retry_hypervisor
from thrave.tasks.task_objects import ExistingBundle, TaskObjects
from thrave.tasks.uploads import upload_volume
from thrave.volumes.formats import open_volume
from thrave.volumes.ntfs_volumes import UncleanVolume, find_unclean
from thrave.write_guard import WriteCheck, no_check

_PUBLISHED_TIMEOUT = 24 * 3600.0  # seconds to find out whether the store has a manifest that may have been sent
_PUBLISHED_INTERVAL = 15.0  # seconds between two attempts
_MERGE_RETRY_TIMEOUT = 60.0  # seconds for a restart of the hypervisor's daemon; later, housekeeping merges the overlay

_STEP_WARNINGS = {
    Step.START: "The instance is not started yet; the start is retried",
    Step.MERGE: "The instance still runs on its overlay; the merge is retried",
    Step.REMOVE_EARLIER: "Parts of the bundle that was replaced are still in the bucket",
}
"""Warnings about steps that fail after every part is in the bucket. Such a failure does not fail the task."""

log = structlog.get_logger()

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Settings of bundle tasks; `config.py` describes them."""

    shutdown_timeout: float
    """Seconds to wait for a guest to power off."""
    shutdown_timeout_action: ShutdownTimeoutAction
    capture_mode: Literal["offline", "overlay"]
    """`offline`: the instance is off until its root volume has been read. `overlay`: until it has an overlay."""
    sysprep_command: Sequence[str]
    """A command that prepares a guest for being copied and powers it off; empty: the guest is only powered off."""
    image_dirs: Sequence[Path]
    """Folders for files that a root volume's image refers to, in addition to the image's own folder."""
    unclean_volume: Literal["report", "refuse"]
    skip_unused: bool
    """Whether clusters are skipped that NTFS does not use."""
    compression: Compression
    existing_bundle: ExistingBundle
    upload_concurrency: int
    """Maximum number of parallel part uploads."""
    s3_retry_timeout: float
    """Seconds for which a call to the store is repeated that fails with a transient error."""
    stall_timeout: float
    """Seconds without progress (a byte read, an object stored) after which a task fails."""


OnState = Callable[[str, BundleTaskState], object]
"""Called with a task's id and state: before a run, when a state was recorded and its work has not begun, at the end.

It may block or raise TaskFailure."""


def ignore_state(_bundle_id: str, _state: BundleTaskState) -> None:
    """Do nothing at a change of state."""


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """Everything that the tasks of one host share."""

    host: str
    settings: TaskSettings
    repository: TaskRepository
    accounts: Accounts
    driver: HypervisorDriver
    store: ObjectStore
    created_buckets: CreatedBuckets
    identity: ServiceIdentity
    lease_timer: LeaseTimer = field(default_factory=lambda: LeaseTimer(None))
    """Checked before each attempt of a call to the store or the hypervisor."""
    before_attempt: WriteCheck = no_check
    """Called before each attempt of a call to the store: checks the lease for the longest time of an attempt."""
    on_state: OnState = ignore_state
    """A test double stops tasks with it, or lets them fail."""


class BundleWorkflow:
    """One run of one bundle task."""

    def __init__(self, context: TaskContext, task: BundleTask, run_number: int) -> None:
        """Run a task, for the first time or after a crash. A run writes nothing once a later run has started."""
        self._context = context
        self._settings = context.settings
        self._task = task
        self._run_number = run_number
        self._repository = repository = context.repository.for_run(task.bundle_id, run_number)
        self._power = InstancePower(
            context.driver,
            repository,
            task,
            shutdown_timeout=self._settings.shutdown_timeout,
            shutdown_timeout_action=self._settings.shutdown_timeout_action,
            check=context.lease_timer.check,
        )
        self._overlay = RootOverlay(
            context.driver,
            repository,
            task,
            stall_timeout=self._settings.stall_timeout,
            check=context.lease_timer.check,
        )
        self._journal = repository.journal(task.bundle_id)
        self._steps: dict[Step, Callable[[], object]] = {
            Step.STOP: self.shut_down,
            Step.RUN_ON_OVERLAY: self.start_on_overlay,
            Step.SEAL: self.upload_volume,
            Step.START: self._power.restore,
            Step.STORE: self.publish,
            Step.MERGE: self.merge_overlay,
            Step.REMOVE_EARLIER: self.remove_earlier,
            Step.COMPLETE: self.complete,
            Step.UNDO_START: self._power.restore,
            Step.UNDO_MERGE: self.undo_overlay,
            Step.UNDO_REMOVE: self.remove_objects,
            Step.FAIL: self.fail,
        }

    def run(self) -> None:
        """Run the step that the task's row names, then the next one, until the task has ended.

        Raises:
            RightLostError: A later run or another host has the task; nothing more may be done for it.
        """
        while (task := self._read_unfinished()) is not None:
            self._task, step = task, task.next_step
            try:
                self._run_step(step)
            except TaskFailure as failure:
                if not self._can_continue(step, failure):
                    self.roll_back(failure)
                    continue
            if step in STEP_TRANSITIONS:  # the last step has ended the task
                self._retry(partial(self._repository.finish_step, self._task.bundle_id, step))

    def roll_back(self, failure: TaskFailure) -> None:
        """Record why the task fails. From then on its row names only undo steps."""
        self._retry(partial(self._repository.start_undo, self._task.bundle_id, failure))

    def _read_unfinished(self) -> BundleTask | None:
        # Read before each step: a cancellation, or an operator who retires the host, changes the next step.
        task = self._retry(partial(self._repository.get, self._task.bundle_id))
        return None if task is None or task.state in FINISHED else task

    def _can_continue(self, step: Step, failure: TaskFailure) -> bool:
        """Record the failure of a step if the task continues (`models.FORWARD_STEPS`); False if the task fails."""
        bundle_id = self._task.bundle_id
        if step in UNDO_STEPS:
            self._retry(lambda: self._repository.append_failure(bundle_id, failure))
        elif step in _STEP_WARNINGS:
            warning = f"{_STEP_WARNINGS[step]}: {failure.message}"
            self._retry(lambda: self._repository.add_warning(bundle_id, warning))
        else:
            return step is Step.STORE and self._is_published()
        return True

    def shut_down(self) -> None:
        """Check the root volume, and shut the guest down."""
        with self._enter_state(BundleTaskState.WAITING_FOR_SHUTDOWN) as monitor:
            self._merge_overlay(monitor)  # of an earlier task, if it could not be merged then
            root = self._context.driver.get(self._task.instance_id).root_volume
            monitor.wait_for_result(Call("image", lambda: self._check_image(root)))
            self._power.record_power_state()
            if self._settings.sysprep_command:
                self._power.run_sysprep(monitor, self._settings.sysprep_command)
            self._power.shut_down(monitor)
            self._check_off_reason(self._context.driver.get(self._task.instance_id))

    def start_on_overlay(self) -> None:
        """Start the instance on an overlay, if `capture_mode` says so and the instance is to run."""
        if self._settings.capture_mode == "offline" or not self._power.should_run():
            return
        with self._enter_state(BundleTaskState.WAITING_FOR_SHUTDOWN):
            self._overlay.create()
            if self._overlay.overlay is not None:
                self._power.restore()

    def upload_volume(self) -> None:
        """Seal the root volume and upload its parts. The data of the volume is not written to any local file."""
        if self._journal.documents() is not None:  # every part is stored
            return
        with self._enter_state(BundleTaskState.BUNDLING) as monitor, self._hold_volume(monitor) as (instance, root):
            monitor.wait_for_result(Call("image", lambda: self._check_image(root)))
            opening = partial(
                open_volume,
                root.path,
                root.format,
                skip_unused=self._settings.skip_unused,
                secret_file=root.secret_file,
                directories=self._settings.image_dirs,
            )
            with VolumeReader(opening, monitor) as reader:  # fails at its end if the volume was changed in the block
                for warned in reader.warnings:
                    self._repository.add_warning(self._task.bundle_id, f"{warned.public}.")
                volume = reader.volume
                with failpoint("volume-size-recorded"):
                    self._repository.set_volume_size(self._task.bundle_id, volume.size)
                self._check_clean(reader.run(find_unclean))
                sealed = upload_volume(
                    volume, self._objects, self._journal, monitor, compression=self._settings.compression
                )
        with failpoint("documents-recorded"):
            self._journal.record_documents(self._documents(instance, sealed))

    def publish(self) -> None:
        """Verify that the bucket has every part, then upload the side file, and the manifest last."""
        documents = self._journal.documents()
        assert documents is not None, "every part is stored"
        with self._enter_state(BundleTaskState.STORING) as monitor:
            self._objects.verify_stored(documents, monitor)
            with failpoint("side-file-stored"):
                self._objects.put_side_file(documents, monitor)
            with failpoint("manifest-stored"):  # a bundle with a manifest is complete
                record_sent = partial(self._repository.record_manifest_sent, self._task.bundle_id)
                self._objects.put_manifest(documents, monitor, record_sent)

    def merge_overlay(self) -> None:
        """Merge the overlay, if there is one. The bundle is complete even if that fails."""
        with self._enter_state(BundleTaskState.STORING) as monitor:
            if self._overlay.overlay is not None:
                with suppress(TaskFailure):  # power recovery starts the instance later
                    self._power.restore()  # the host may have rebooted since the last step
            retry_hypervisor(lambda: self._merge_overlay(monitor), _MERGE_RETRY_TIMEOUT, sleep=monitor.pause)

    def remove_earlier(self) -> None:
        """Delete the remaining objects of the bundle that was replaced; housekeeping retries if that fails."""
        earlier = self._journal.earlier()
        if earlier is None:
            return
        self._journal.record_earlier(replace(earlier, is_replaced=True))
        self._objects.remove_earlier()

    def complete(self) -> None:
        """End the task as `complete`, unless an operator has ended it before (`thrave host retire`)."""
        with failpoint("task-ended"):
            if self._repository.complete(self._task.bundle_id):
                return
        if self._repository.state(self._task.bundle_id) not in FINISHED:
            raise RuntimeError(f"{self._task.bundle_id} cannot be completed from its state")
        log.warning("task ended before its bundle was complete", bundle_id=self._task.bundle_id)

    def undo_overlay(self) -> None:
        """Merge the overlay, if there is one, of a task that fails."""
        self._overlay.merge_with_timeout(self._settings.stall_timeout)

    def remove_objects(self) -> None:
        """Delete what the task has stored, and the bucket if the request created it and the bucket is empty."""
        self._objects.remove_objects()
        self._context.created_buckets.remove_of(self._context.store, self._task)

    def fail(self) -> None:
        """End the task as `failed`, with the reason that was recorded before the undo."""
        assert self._task.error_code is not None, "the reason is recorded first"
        failure = TaskFailure(self._task.error_code, self._task.error_message or "")
        with failpoint("task-ended"):
            self._repository.fail(self._task.bundle_id, failure)

    def _run_step(self, step: Step) -> None:
        """Run a step; repeat it while the hypervisor, the database or a resource of the host is unavailable.

        Raises:
            TaskFailure: The step failed with a permanent error.
            RightLostError: The task belongs to a later run or another host.
        """
        work = self._steps[step]
        try:
            self._retry(
                lambda: retry_hypervisor(work, self._settings.stall_timeout, is_whole_step=True),
                fails_if_started=step in STEPS_UNTIL_READ,
            )
        except Exception as error:
            # The last steps only write the row, so they fail only because of a bug. The task is run again later.
            if kind_of(error) is ErrorKind.RIGHT_LOST or step in {Step.COMPLETE, Step.FAIL}:
                raise
            raise to_task_failure(error) from error

    def _retry(self, work: Callable[[], _Result], *, fails_if_started: bool = False) -> _Result:
        """Repeat `work` while the database is unavailable. Start the instance if that takes too long.

        Args:
            work: Must be safe to repeat.
            fails_if_started: Whether `work` fails if the instance had to be started before the database was available
                again: its volume has changed then.
        """
        start = _StartWithoutDatabase(self._context, self._task, self._repository, self._power, fails_if_started)
        return retry_database(work, start)

    def _is_published(self) -> bool:
        """Whether the bucket has the task's manifest, although storing it has failed. Retries while the store fails."""
        until = monotonic() + _PUBLISHED_TIMEOUT
        while True:
            try:
                return self._retry(lambda: retry_hypervisor(self._has_manifest, self._settings.stall_timeout))
            except (TransientError, TaskFailure) as error:
                if monotonic() > until:
                    return False  # the undo restores the manifest that this one may have replaced
                log.warning("store unavailable: retrying to read the manifest", error=str(error))
                sleep(_PUBLISHED_INTERVAL)
            except BucketError as error:
                log.warning("the store refuses to return the manifest", error=str(error))
                return False

    def _has_manifest(self) -> bool:
        documents = self._journal.documents()
        if documents is None or not self._journal.is_manifest_sent():
            return False
        with self._enter_state(BundleTaskState.STORING) as monitor:
            return self._objects.has_manifest(documents, monitor)

    @cached_property
    def _objects(self) -> TaskObjects:
        policy = UploadPolicy.parse_trusted(
            *self._repository.stored_policy(self._task.bundle_id), self._task.access_key_id
        )
        return TaskObjects(
            self._context.store.on_behalf_of(policy.access_key_id),
            self._journal,
            self._task,
            policy,
            upload_concurrency=self._settings.upload_concurrency,
            retry_timeout=self._settings.s3_retry_timeout,
            existing_bundle=self._settings.existing_bundle,
            stall_timeout=self._settings.stall_timeout,
            before_attempt=self._context.before_attempt,
        )

    @contextmanager
    def _enter_state(self, state: BundleTaskState) -> Iterator[TaskMonitor]:
        """Change the state of the task, and monitor the work of the block.

        Raises:
            TaskCancelled: The task cannot change to this state: it was cancelled, or fails.
        """
        if not self._repository.change_state(self._task.bundle_id, state):
            raise TaskCancelled
        context = self._context
        context.on_state(self._task.bundle_id, state)
        with TaskMonitor(
            self._repository,
            self._task.bundle_id,
            stall_timeout=self._settings.stall_timeout,
            is_ours=lambda task: (task.host, task.runs) == (context.host, self._run_number),
            lease_timer=context.lease_timer,
        ) as monitor:
            yield monitor

    @contextmanager
    def _hold_volume(self, monitor: TaskMonitor) -> Iterator[tuple[Instance, VolumeFile]]:
        """Yield the instance and a volume that nothing writes to: the instance is off, or runs on an overlay."""
        overlay = self._overlay.overlay
        if overlay is None:
            with self._power.hold_stopped(monitor) as instance:
                self._check_off_reason(instance)
                yield instance, instance.root_volume
        else:
            self._power.restore()  # the host may have rebooted since the last step
            with self._overlay.hold(overlay, monitor) as instance:
                yield instance, overlay.volume

    def _merge_overlay(self, monitor: TaskMonitor) -> None:
        # A hypervisor that hangs is abandoned. Housekeeping finds the overlay later, and continues.
        monitor.wait_for_result(Call("merge", lambda: self._overlay.merge(monitor.pause)))

    def _check_image(self, root: VolumeFile) -> None:
        """Refuse an image whose metadata shows only a part of a disk, and a file that another machine writes to."""
        check_root_volume(self._context.driver, self._task.instance_id, root, self._settings.image_dirs)

    def _check_off_reason(self, instance: Instance) -> None:
        """Fail if the volume is not the instance's current disk; report or refuse one whose guest did not shut down."""
        if instance.off_reason is None:
            return
        if (reason := UNREADABLE_REASONS.get(instance.off_reason)) is not None:
            raise TaskFailure("Server.VolumeError", f"The instance is off, but {reason}.")
        if (reason := UNCLEAN_REASONS.get(instance.off_reason)) is not None:
            message = (
                f"The instance is off, but perhaps was not shut down: {reason}. What its guest had not written is "
                "missing."
            )
            if self._settings.unclean_volume == "refuse":
                raise TaskFailure("Server.VolumeError", message)
            self._repository.add_warning(self._task.bundle_id, message)

    def _check_clean(self, found: Sequence[UncleanVolume]) -> None:
        """Warn the owner about each volume on the disk that is unclean or was not checked, or refuse the disk."""
        if found and self._settings.unclean_volume == "refuse":
            raise TaskFailure("Server.VolumeError", f"The root volume: {'; '.join(each.message for each in found)}.")
        for each in found:
            self._repository.add_warning(self._task.bundle_id, f"The root volume: {each.message}.")

    def _documents(self, instance: Instance, sealed: SealedBundle) -> Documents:
        """Write manifest and side file. The service and the account (if it has a certificate) can read the key."""
        identity = self._context.identity
        pem = self._context.accounts.get(self._task.account_id).certificate
        manifest = write_manifest(
            sealed,
            account_id=self._task.account_id,
            architecture=instance.architecture,
            user_certificate=load_certificate(pem) if pem else None,
            service_certificate=identity.certificate,
            signing_key=identity.private_key,
        )
        side_file = write_side_file(sealed, manifest, side_key=identity.side_key, signing_key=identity.private_key)
        return {"manifest": manifest.decode(), "side_file": side_file.decode()}


@dataclass(frozen=True)
class _StartWithoutDatabase:
    """Starts the instance after `stall_timeout` if the database is full, locked or unavailable while it is off."""

    context: TaskContext
    task: BundleTask
    repository: TaskRepository
    power: InstancePower
    fails_if_started: bool

    @property
    def timeout(self) -> float:
        return self.context.settings.stall_timeout

    def act(self) -> bool:
        """Start the instance, unless another host may have it. The step has ended, so nothing reads its volume."""
        # After the lease has expired, the database may still confirm it: one with a full disk can be read.
        check = None if self.context.lease_timer.is_valid() else self._require_lease
        if check is not None and not self._holds_lease():
            log.error(
                "instance stays off: the database is unavailable, and another host may have adopted the task",
                instance_id=self.task.instance_id,
            )
            return False
        return self.power.restore_without_record(check=check) and self.fails_if_started

    def _require_lease(self) -> None:
        if not self._holds_lease():
            raise LeaseExpiredError

    def _holds_lease(self) -> bool:
        try:
            return self.repository.holds_lease()
        except SQLAlchemyError:
            return False

    def record(self) -> TaskFailure:
        message = (
            f"The database was unavailable for {self.timeout:g} seconds. The instance was started again, so its volume "
            "was not read to its end."
        )
        self.repository.add_event(self.task.bundle_id, message)
        return TaskFailure("Server.NoProgress", message)


def run_bundle_task(context: TaskContext, bundle_id: str) -> None:
    """Run a task, unless it has ended, another host has adopted it, or this process runs it already."""
    with RUNNING.claimed(bundle_id) as is_first:
        if not is_first:
            log.warning("task is running already, second run ignored", bundle_id=bundle_id)
            return
        try:
            with structlog.contextvars.bound_contextvars(bundle_id=bundle_id):
                _run_once(context, bundle_id)
        except RightLostError as error:
            log.warning("run of a task ended", bundle_id=bundle_id, error=str(error))
        except Exception:
            log.exception("run of a task failed; it is run again", bundle_id=bundle_id)
            raise


def _run_once(context: TaskContext, bundle_id: str) -> None:
    context.on_state(bundle_id, BundleTaskState.PENDING)
    task = retry_database(lambda: context.repository.get(bundle_id))
    if task is None or task.host != context.host:
        return
    if task.state is BundleTaskState.FAILED:  # it was cancelled before it started
        retry_database(lambda: context.created_buckets.remove_of(context.store, task))
    run_number = retry_database(lambda: context.repository.start_run(bundle_id))
    if run_number is not None:
        log_event(
            "task run started", bundle_id=bundle_id, instance_id=task.instance_id, account_id=task.account_id,
            host=task.host, run=run_number, step=task.next_step.value,
        )  # fmt: skip
        with structlog.contextvars.bound_contextvars(instance_id=task.instance_id, account_id=task.account_id):
            BundleWorkflow(context, task, run_number).run()
    state = retry_database(lambda: context.repository.state(bundle_id))
    if state is not None:
        context.on_state(bundle_id, state)
