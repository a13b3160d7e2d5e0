"""The main job: one bundle task, from a running instance to a bundle in a bucket.

`BundleWorkflow.run` does the steps of `steps.py`, each as the task's row names it, so after a crash the task goes on
with the
step that was cut off. Each can be repeated without harm. It is the one place where instances, volumes, bundles
and buckets meet; they do not know each other. It never answers a caller: that is `requests.py`.
"""

import time
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
from thrave.compute.instance import MAYBE_UNCLEAN, NOT_TO_BE_READ, Instance, VolumeFile
from thrave.concurrency import Call
from thrave.identity.accounts import Accounts
from thrave.identity.certificates import ServiceIdentity, load_certificate
from thrave.tasks.engine import RUNNING
from thrave.tasks.errors import ErrorKind, TaskCancelled, TaskFailure, kind_of, to_task_failure
from thrave.tasks.failpoints import failpoint
from thrave.tasks.instance_power import InstancePower, RootOverlay, ShutdownTimeoutAction
from thrave.tasks.journal import Documents
from thrave.tasks.lease import Lease, LeaseExpiredError, RightLostError
from thrave.tasks.models import BEFORE_READ, FINISHED, UNDO, BundleTask, BundleTaskState, Step, following
from thrave.tasks.monitor import TaskMonitor
from thrave.tasks.object_removal import CreatedBuckets
from thrave.tasks.repository import TaskRepository
from thrave.tasks.root_volume import VolumeReader, check_root_volume
from thrave.tasks.step_retry import retry_database, retry_hypervisor
from thrave.tasks.uploads import ExistingBundle, TaskObjects, VolumeSealer
from thrave.volumes.formats import open_volume
from thrave.volumes.ntfs_volumes import Finding, check_unclean
from thrave.write_guard import WriteCheck, no_check

_STORE_AWAY = 24 * 3600.0  # seconds for which the store is asked whether it has a manifest that may have been sent
_STORE_PAUSE = 15.0  # seconds
_DAEMON_RESTART = 60.0  # seconds that a hypervisor's daemon may be away before the caretaker goes on
_Result = TypeVar("_Result")

_STILL = {
    Step.START: "The instance is not started yet, which is tried again",
    Step.MERGE: "The instance still runs on its overlay, which is tried to be merged again",
    Step.REMOVE_EARLIER: "Parts of the bundle that was replaced are still in the bucket",
}
"""What a warning says of a step that failed after the bundle was complete in the bucket, or all but complete."""


log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """What a task works with on the host that has the disk."""

    name: str
    records: TaskRepository
    accounts: Accounts
    instances: HypervisorDriver
    buckets: ObjectStore
    made_buckets: CreatedBuckets
    service: ServiceIdentity
    shutdown_timeout: float
    """Seconds that a guest has to power off."""
    shutdown_timeout_action: ShutdownTimeoutAction
    """What is done about a guest that takes longer."""
    compression: Compression
    """How hard bundles are compressed."""
    capture_mode: Literal["offline", "overlay"]
    """How long an instance is off: until its root volume has been read, or until it has an overlay."""
    sysprep_command: Sequence[str]
    """A command that prepares a guest for being copied and powers it off; none: it is only powered off."""
    image_dirs: Sequence[Path]
    """Where files may lie that a root volume's image refers to, besides its own folder."""
    unclean_volume: Literal["report", "refuse"]
    """What is done about an NTFS volume that its guest has not unmounted."""
    skip_unused: bool
    """What of a root volume's data is left out."""
    existing_bundle: ExistingBundle
    """What is done about a bundle that is in the place of a new one."""
    upload_concurrency: int
    """Parts of a bundle that are sent at the same time."""
    store_patience: float
    """Seconds for which the store is asked again when it fails in a way that may pass."""
    stall_timeout: float
    """Seconds without a byte read or an object stored after which a task fails."""
    lease: Lease = field(default_factory=lambda: Lease(None))
    """Checked before each attempt of a call to the store or the hypervisor."""
    before_attempt: WriteCheck = no_check
    """Made before each attempt of a call to the store: the same lease, for as long as an attempt may take."""


class BundleWorkflow:
    """One bundle task being done."""

    def __init__(self, host: TaskContext, task: BundleTask, run: int) -> None:
        """Work on a task, for the first time or after a crash; once another run has begun, this one changes nothing."""
        self._host = host
        self._task = task
        self._run = run
        self._records = records = host.records.of_run(task.bundle_id, run)
        self._power = InstancePower(
            host.instances,
            records,
            task,
            grace=host.shutdown_timeout,
            when_late=host.shutdown_timeout_action,
            check=host.lease.check,
        )
        self._freezer = RootOverlay(
            host.instances, records, task, stall_timeout=host.stall_timeout, check=host.lease.check
        )
        self._journal = records.journal(task.bundle_id)
        self._steps: dict[Step, Callable[[], object]] = {
            Step.STOP: self.stop,
            Step.FREE: self.free,
            Step.SEAL: self.seal,
            Step.START: self._power.restore,
            Step.STORE: self.store,
            Step.MERGE: self.merge,
            Step.REMOVE_EARLIER: self.remove_earlier,
            Step.COMPLETE: self.complete,
            Step.UNDO_START: self._power.restore,
            Step.UNDO_MERGE: self._put_back_volume,
            Step.UNDO_REMOVE: self.remove,
            Step.FAIL: self.fail,
        }

    def run(self) -> None:
        """Do the steps of the task, each as its row names it, until the task has ended.

        Raises:
            RightLostError: Another run or another host has the task; nothing more may be done for it.
        """
        while (step := self._next_step()) is not None:
            try:
                self._do(step)
            except TaskFailure as failure:
                self._failed(step, failure)
            else:
                self._ended(step)

    def give_up(self, failure: TaskFailure) -> None:
        """Record why the task fails. From then on its row names the steps that undo it, and no other."""
        self._surely(lambda: self._records.decide(self._task.bundle_id, failure))

    def _next_step(self) -> Step | None:
        task = self._surely(lambda: self._records.get(self._task.bundle_id))
        return None if task is None or task.state in FINISHED else task.next_step

    def _ended(self, step: Step) -> None:
        if following(step) is not None:
            self._surely(lambda: self._records.step_ended(self._task.bundle_id, step))

    def _failed(self, step: Step, failure: TaskFailure) -> None:
        """Record the failure of a step; `steps.py` has what follows from it."""
        if step in UNDO:
            self._surely(lambda: self._records.also(self._task.bundle_id, failure))
        elif step in _STILL:
            self._surely(lambda: self._records.notice(self._task.bundle_id, f"{_STILL[step]}: {failure.message}"))
        elif not (step is Step.STORE and self._has_stored()):
            self.give_up(failure)
            return
        self._ended(step)

    def stop(self) -> None:
        """Have the guest power off, as a person would."""
        with self._state(BundleTaskState.WAITING_FOR_SHUTDOWN) as watch:
            self._merge_overlay(watch)  # what an earlier task may have left
            root = self._host.instances.get(self._task.instance_id).root_volume
            watch.result_of(Call("image", lambda: self._check_volume(root)))
            self._power.note()
            if self._host.sysprep_command:
                self._power.sysprep(watch, self._host.sysprep_command)
            self._power.off(watch)
            self._check_why_off(self._host.instances.get(self._task.instance_id))

    def free(self) -> None:
        """Have the instance run on an overlay while its root volume is read, if that is wanted, and it ran before."""
        task = self._records.get(self._task.bundle_id)
        if self._host.capture_mode == "offline" or task is None or not self._power.is_to_run():
            return
        with self._state(BundleTaskState.WAITING_FOR_SHUTDOWN):
            self._freezer.freeze()
            if self._freezer.frozen is not None:
                self._power.restore()

    def seal(self) -> None:
        """Send the root volume, sealed, part by part to the bucket; nothing of it is written anywhere else."""
        if self._journal.documents() is not None:
            return
        with self._state(BundleTaskState.BUNDLING) as watch, self._held(watch) as (instance, root):
            watch.result_of(Call("image", lambda: self._check_volume(root)))
            opening = partial(
                open_volume,
                root.path,
                root.format,
                skip_unused=self._host.skip_unused,
                secret_file=root.secret_file,
                directories=self._host.image_dirs,
            )
            with VolumeReader(opening, watch) as reader:  # its end fails if the volume was changed meanwhile
                for warned in reader.warnings:
                    self._records.notice(self._task.bundle_id, f"{warned.public}.")
                volume = reader.volume
                with failpoint("volume opened"):
                    self._records.note_volume_size(self._task.bundle_id, volume.size)
                self._check_clean(reader.look(check_unclean))
                sealed = VolumeSealer(self._store, self._journal, self._host.compression).seal(volume, watch)
        with failpoint("sealing ended"):
            self._journal.conclude(self._documents(instance, sealed))

    def store(self) -> None:
        """Check that the bucket has every part; then the side file; the manifest last: its presence means complete."""
        documents = self._journal.documents()
        assert documents is not None, "every part is stored"
        with self._state(BundleTaskState.STORING) as watch:
            self._store.check(documents, watch)
            with failpoint("side file stored"):
                self._store.put_side_file(documents, watch)
            with failpoint("manifest stored"):
                self._store.put_manifest(documents, watch, partial(self._records.send_manifest, self._task.bundle_id))

    def is_stored(self) -> bool:
        """Whether the bucket has the task's manifest, though storing it is said to have failed."""
        documents = self._journal.documents()
        if documents is None or not self._records.has_sent_manifest(self._task.bundle_id):
            return False
        with self._state(BundleTaskState.STORING) as watch:
            return self._store.has_manifest(documents, watch)

    def _has_stored(self) -> bool:
        """Whether the bucket has the task's manifest. While the store does not say, nothing is decided."""
        given_up = time.monotonic() + _STORE_AWAY
        while True:
            try:
                return self._surely(lambda: retry_hypervisor(self.is_stored, self._host.stall_timeout))
            except (TransientError, TaskFailure) as error:
                if time.monotonic() > given_up:
                    return False  # what the manifest may have replaced is recorded, and put back
                log.warning("store unavailable: retrying to read the manifest", error=str(error))
                time.sleep(_STORE_PAUSE)
            except BucketError as error:
                log.warning("the store refuses to let the manifest be read", error=str(error))
                return False

    def merge(self) -> None:
        """Have the instance go on without the overlay. The bundle is complete if that fails."""
        with self._state(BundleTaskState.STORING) as watch:
            if self._freezer.frozen is not None:
                with suppress(TaskFailure):  # its power is restored later then
                    self._power.restore()  # its host may have lost its power since
            retry_hypervisor(lambda: self._merge_overlay(watch), _DAEMON_RESTART, sleep=watch.pause)

    def _merge_overlay(self, watch: TaskMonitor) -> None:
        # A hypervisor that hangs is abandoned: whatever it does later is seen by the caretaker, who goes on.
        watch.result_of(Call("merge", lambda: self._freezer.merge(watch.pause)))

    def _put_back_volume(self) -> None:
        self._freezer.merge_within(self._host.stall_timeout)

    def remove(self) -> None:
        """Take away what the task has stored, and the bucket if the request created it and it is empty."""
        self._store.remove()
        self._host.made_buckets.discard_of(self._host.buckets, self._task)

    def remove_earlier(self) -> None:
        """Remove what is left of the bundle that was replaced; the agent tries again if that fails."""
        earlier = self._journal.earlier()
        if earlier is None:
            return
        self._journal.replace(replace(earlier, is_replaced=True))
        self._store.remove_earlier()

    def complete(self) -> None:
        """End the task as `complete`, unless an operator has ended it meanwhile (`thrave host retire`)."""
        with failpoint("record closed"):
            if self._records.complete(self._task.bundle_id):
                return
        if self._records.state(self._task.bundle_id) not in FINISHED:
            raise RuntimeError(f"{self._task.bundle_id} cannot be completed from its state")
        log.warning("a task has ended before its bundle was complete", bundle_id=self._task.bundle_id)

    def fail(self) -> None:
        """End the task with the reason that was recorded before it was undone."""
        task = self._records.get(self._task.bundle_id)
        assert task is not None, "a task is purged only after its end"
        assert task.error_code is not None, "the reason is recorded first"
        failure = TaskFailure(task.error_code, task.error_message or "")
        with failpoint("record closed"):
            self._records.fail(self._task.bundle_id, failure)

    def _do(self, step: Step) -> None:
        """Do a step, again while what it needs is unavailable.

        Raises:
            TaskFailure: The step failed, for a reason that does not pass.
            RightLostError: The task is another run's or another host's.
        """
        work = self._steps[step]
        try:
            self._surely(
                lambda: retry_hypervisor(work, self._host.stall_timeout, is_whole_step=True),
                is_over_if_started=step in BEFORE_READ,
            )
        except Exception as error:
            # Nothing but a fault of the program ends the last steps, which only write the row: it is run again later.
            if kind_of(error) is ErrorKind.RIGHT_LOST or step in {Step.COMPLETE, Step.FAIL}:
                raise
            raise to_task_failure(error) from error

    def _surely(self, work: Callable[[], _Result], *, is_over_if_started: bool = False) -> _Result:
        """Do something for as long as the database is unavailable; the instance does not stay off so long.

        Args:
            work: Must be safe to repeat.
            is_over_if_started: Whether it fails if the instance had to be started meanwhile: its volume is not what it
                was.
        """
        return retry_database(work, _PowerFirst(self._host, self._task, self._records, self._power, is_over_if_started))

    @cached_property
    def _store(self) -> TaskObjects:
        policy = UploadPolicy.trusted(*self._records.grant(self._task.bundle_id), self._task.access_key_id)
        return TaskObjects(
            self._host.buckets.on_behalf_of(policy.access_key_id),
            self._journal,
            self._task,
            policy,
            upload_concurrency=self._host.upload_concurrency,
            patience=self._host.store_patience,
            existing=self._host.existing_bundle,
            stall_timeout=self._host.stall_timeout,
            before_attempt=self._host.before_attempt,
        )

    @contextmanager
    def _state(self, state: BundleTaskState) -> Iterator[TaskMonitor]:
        """Be in a state of the task for as long as the work of it lasts, watched for progress and cancellation."""
        if not self._records.move(self._task.bundle_id, state):
            raise TaskCancelled
        host = self._host
        with TaskMonitor(
            self._records,
            self._task.bundle_id,
            stall_timeout=host.stall_timeout,
            is_ours=lambda task: (task.host, task.attempts) == (host.name, self._run),
            lease=host.lease,
        ) as watch:
            yield watch

    @contextmanager
    def _held(self, watch: TaskMonitor) -> Iterator[tuple[Instance, VolumeFile]]:
        """The instance and its root volume, which nobody writes to: it is off, or runs on an overlay."""
        frozen = self._freezer.frozen
        if frozen is None:
            with self._power.held_off(watch) as instance:
                self._check_why_off(instance)
                yield instance, instance.root_volume
        else:
            self._power.restore()  # its host may have lost its power since
            with self._freezer.held(frozen, watch) as instance:
                yield instance, frozen.volume

    def _check_volume(self, root: VolumeFile) -> None:
        """Refuse an image that is no whole disk by its own words, and a file that another machine writes to."""
        check_root_volume(self._host.instances, self._task.instance_id, root, self._host.image_dirs)

    def _check_why_off(self, instance: Instance) -> None:
        """Fail if the volume is not the instance's content; report or refuse one whose guest did not shut down."""
        if instance.off_reason is None:
            return
        if (why := NOT_TO_BE_READ.get(instance.off_reason)) is not None:
            raise TaskFailure("Server.VolumeError", f"The instance is off, but {why}.")
        if (why := MAYBE_UNCLEAN.get(instance.off_reason)) is not None:
            words = (
                f"The instance is off, but perhaps was not shut down: {why}. What its guest had not written is missing."
            )
            if self._host.unclean_volume == "refuse":
                raise TaskFailure("Server.VolumeError", words)
            self._records.notice(self._task.bundle_id, words)

    def _check_clean(self, found: Sequence[Finding]) -> None:
        """Report to the owner each volume on the disk that is unclean or was not checked, or refuse the disk."""
        if found and self._host.unclean_volume == "refuse":
            raise TaskFailure("Server.VolumeError", f"The root volume: {'; '.join(each.words for each in found)}.")
        for each in found:
            self._records.notice(self._task.bundle_id, f"The root volume: {each.words}.")

    def _documents(self, instance: Instance, sealed: SealedBundle) -> Documents:
        """The manifest, signed by the service and readable by the account (if it has a certificate) and the service."""
        service = self._host.service
        pem = self._host.accounts.get(self._task.account_id).certificate
        manifest = write_manifest(
            sealed,
            account_id=self._task.account_id,
            architecture=instance.architecture,
            user_certificate=load_certificate(pem) if pem else None,
            service_certificate=service.certificate,
            signing_key=service.private_key,
        )
        side_file = write_side_file(sealed, manifest, side_key=service.side_key, signing_key=service.private_key)
        return {"manifest": manifest.decode(), "side_file": side_file.decode()}


@dataclass(frozen=True)
class _PowerFirst:
    """An instance does not stay off for longer than `stall_timeout` because the database is full, locked or away."""

    host: TaskContext
    task: BundleTask
    records: TaskRepository
    power: InstancePower
    is_over_if_started: bool

    @property
    def timeout(self) -> float:
        return self.host.stall_timeout

    def act(self) -> bool:
        """Start the instance, if no other host can have it. The step has ended, so nothing reads its volume."""
        proved = None if self.host.lease.holds() else self._prove_lease
        if proved is not None and not self._is_still_ours():
            log.error(
                "an instance stays off: the database is unavailable, and another host may have adopted the task",
                instance_id=self.task.instance_id,
            )
            return False
        return self.power.restore_without_record(check=proved) and self.is_over_if_started

    def _prove_lease(self) -> None:
        if not self._is_still_ours():
            raise LeaseExpiredError

    def _is_still_ours(self) -> bool:
        """A database whose disk is full can still be asked."""
        try:
            return self.records.holds_lease()
        except SQLAlchemyError:
            return False

    def record(self) -> TaskFailure:
        words = (
            f"The database was unavailable for {self.timeout:g} seconds. The instance was started again, so that its "
            "volume was not read to its end."
        )
        self.records.tell(self.task.bundle_id, words)
        return TaskFailure("Server.NoProgress", words)


def run_bundle_task(host: TaskContext, bundle_id: str) -> None:
    """Do the task `bundle_id`, unless it has ended, another host has adopted it, or this process does it already."""
    with RUNNING.claimed(bundle_id) as is_first:
        if not is_first:
            log.warning("a task is running already; the second run does nothing", bundle_id=bundle_id)
            return
        try:
            _bundle(host, bundle_id)
        except RightLostError as error:
            log.warning("a run of a task ends", bundle_id=bundle_id, error=str(error))
        except Exception:
            log.exception("a run of a task failed; it is run again", bundle_id=bundle_id)
            raise


def _bundle(host: TaskContext, bundle_id: str) -> None:
    task = retry_database(lambda: host.records.get(bundle_id))
    if task is None or task.host != host.name:
        return
    if task.state is BundleTaskState.FAILED:
        retry_database(lambda: host.made_buckets.discard_of(host.buckets, task))  # cancelled before it was begun
    run = retry_database(lambda: host.records.take_up(bundle_id))
    if run is not None:
        BundleWorkflow(host, task, run).run()
