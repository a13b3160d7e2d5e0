"""The main job: one bundle task, from a running instance to a bundle in a bucket.

`Bundling.run` is the whole of it, top to bottom. Each line of it is a durable step: after a crash the task goes on with
the step that was cut off, so each can be repeated without harm. It is the one place where instances, volumes, bundles
and buckets meet; they do not know each other. It never answers a caller: that is `requests.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, TypeVar

import structlog

from thrave.buckets.buckets import Buckets
from thrave.buckets.errors import BucketError
from thrave.buckets.policy import UploadPolicy
from thrave.bundle.sealed import Sealed
from thrave.bundle.sidefile import write_side_file
from thrave.bundle.writing import write_manifest
from thrave.bundle.zlibs import Level
from thrave.compute.errors import HoldLostError, HypervisorGoneError, InstanceError, InstanceHeld
from thrave.compute.instance import MAYBE_UNCLEAN, NOT_TO_BE_READ, Instance, VolumeFile
from thrave.compute.instances import Instances
from thrave.concurrency import Call
from thrave.database import is_unavailable
from thrave.identity.accounts import Accounts
from thrave.identity.certificates import load_certificate
from thrave.identity.service import ServiceIdentity
from thrave.tasks.crash_points import durable
from thrave.tasks.engine import step
from thrave.tasks.failures import Cancelled, TaskFailure
from thrave.tasks.freezing import Freezer
from thrave.tasks.journal import Documents
from thrave.tasks.lease import Lease
from thrave.tasks.made_buckets import MadeBuckets
from thrave.tasks.patience import patiently
from thrave.tasks.power import PowerSwitch, ShutdownTimeoutAction
from thrave.tasks.reading import VolumeReader
from thrave.tasks.records import Records
from thrave.tasks.root_volume import check_root_volume
from thrave.tasks.sealing import VolumeSealer
from thrave.tasks.states import FINISHED, BundleTaskState
from thrave.tasks.storing import BundleStore, ExistingBundle
from thrave.tasks.task import BundleTask
from thrave.tasks.watch import Watch
from thrave.volumes.conditions import Finding, conditions
from thrave.volumes.opening import Skip, open_volume

_DAEMON_RESTART = 60.0  # seconds that a hypervisor's daemon may be away before the caretaker goes on
_Result = TypeVar("_Result")
_FURTHER_ON = frozenset({BundleTaskState.BUNDLING, BundleTaskState.STORING})


log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Host:
    """What a task works with on the host that has the disk."""

    name: str
    records: Records
    accounts: Accounts
    instances: Instances
    buckets: Buckets
    made_buckets: MadeBuckets
    service: ServiceIdentity
    shutdown_grace: float
    """Seconds that a guest has to power off."""
    shutdown_timeout_action: ShutdownTimeoutAction
    """What is done about a guest that takes longer."""
    level: Level
    """How hard bundles are compressed."""
    downtime: Literal["whole", "overlay"]
    """How long an instance is off: until its root volume has been read, or until it has an overlay."""
    sysprep: Sequence[str]
    """A command that prepares a guest for being copied and powers it off; none: it is only powered off."""
    image_directories: Sequence[Path]
    """Where files may lie that a root volume's image refers to, besides its own folder."""
    unclean_volume: Literal["report", "refuse"]
    """What is done about an NTFS volume that its guest has not unmounted."""
    skip: Skip
    """What of a root volume's data is left out."""
    existing_bundle: ExistingBundle
    """What is done about a bundle that is in the place of a new one."""
    uploads_at_once: int
    """Parts of a bundle that are sent at the same time."""
    store_patience: float
    """Seconds for which the store is asked again when it fails in a way that may pass."""
    stall_timeout: float
    """Seconds without a byte read or an object stored after which a task fails."""
    lease: Lease = field(default_factory=lambda: Lease(None))
    """Checked before each attempt of a call to the store or the hypervisor."""


class Bundling:
    """One bundle task being done."""

    def __init__(self, host: Host, task: BundleTask) -> None:
        """Take up a task, for the first time or after a crash."""
        self._host = host
        self._task = task
        self._records = host.records
        self._power = PowerSwitch(
            host.instances,
            host.records,
            task,
            grace=host.shutdown_grace,
            when_late=host.shutdown_timeout_action,
            check=host.lease.check,
        )
        self._freezer = Freezer(host.instances, host.records, task, stall_timeout=host.stall_timeout)
        self._journal = host.records.journal(task.bundle_id)

    def run(self) -> None:
        """Stop the instance; read, seal and store its root volume; start it again; store the manifest.

        With an overlay it is started before its volume is read, and in the end the overlay is merged.
        """
        try:
            self._step("stop the instance", self.stop, is_over_if_started=True)
            self._step("start the instance on an overlay", self.free, is_over_if_started=True)
            self._step("seal the root volume into the bucket", self.seal, is_over_if_started=True)
            self._step("start the instance", self._power.restore)
            self._step("store the manifest", self.store)
        except TaskFailure as failure:
            if not self._has_stored():
                self.give_up(failure)
                return
        self.finish()

    def finish(self) -> None:
        """Merge the overlay, remove a bundle that was replaced, complete the task; no failure undoes a whole bundle."""
        try:
            self._step("merge the overlay", self.merge)
        except TaskFailure as failure:
            still = f"The instance still runs on its overlay, which is tried to be merged again: {failure.message}"
            self._step("tell of the overlay", lambda: self._records.notice(self._task.bundle_id, still))
        self._step("remove the earlier bundle", self.remove_earlier)
        self._step("complete the task", self.complete)

    def give_up(self, failure: TaskFailure) -> None:
        """Start the instance, take away what was stored, and end the task with the reason."""
        task = self._records.get(self._task.bundle_id)
        if task is None or task.state in FINISHED:
            return  # cancelled in the moment before it was begun: nothing was touched, and its grant is erased
        for name, put_back in (
            ("start the instance after a failure", self._power.restore),
            ("merge the overlay after a failure", self._put_back_volume),
            ("remove what was stored", self.remove),
        ):
            try:
                self._step(name, put_back)
            except TaskFailure as another:
                failure = failure.also(another)
        self._step("fail the task", lambda: self.fail(failure))

    def put_power_back(self) -> None:
        """Start the instance if the task has switched it off; the database is not needed."""
        self._power.restore_without_record()

    def stop(self) -> None:
        """Have the guest power off, as a person would."""
        if self._records.state(self._task.bundle_id) in _FURTHER_ON:
            return  # another host has got as far before it was lost
        with self._state(BundleTaskState.WAITING_FOR_SHUTDOWN) as watch:
            self._merge_overlay(watch)  # what an earlier task may have left
            root = self._host.instances.get(self._task.instance_id).root_volume
            watch.result_of(Call("image", lambda: self._check_volume(root)))
            self._power.note()
            if self._host.sysprep:
                self._power.sysprep(watch, self._host.sysprep)
            self._power.off(watch)
            self._check_why_off(self._host.instances.get(self._task.instance_id))

    def free(self) -> None:
        """Have the instance run on an overlay while its root volume is read, if that is wanted, and it ran before."""
        task = self._records.get(self._task.bundle_id)
        if self._host.downtime == "whole" or task is None or task.state in _FURTHER_ON:
            return
        if not self._power.is_to_run():
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
                skip=self._host.skip,
                secret_file=root.secret_file,
                directories=self._host.image_directories,
            )
            with VolumeReader(opening, watch) as reader:  # its end fails if the volume was changed meanwhile
                for warned in reader.warnings:
                    self._records.notice(self._task.bundle_id, f"{warned.public}.")
                volume = reader.volume
                with durable("volume opened"):
                    self._records.note_volume_size(self._task.bundle_id, volume.size)
                self._check_clean(reader.look(conditions))
                sealed = VolumeSealer(self._store, self._journal, self._host.level).seal(volume, watch)
        with durable("sealing ended"):
            self._journal.conclude(self._documents(instance, sealed))

    def store(self) -> None:
        """Check that the bucket has every part; then the side file; the manifest last: its presence means complete."""
        documents = self._journal.documents()
        assert documents is not None, "every part is stored"
        with self._state(BundleTaskState.STORING) as watch:
            self._store.check(documents, watch)
            with durable("side file stored"):
                self._store.put_side_file(documents, watch)
            with durable("manifest stored"):
                self._store.put_manifest(documents, watch, partial(self._records.send_manifest, self._task.bundle_id))

    def is_stored(self) -> bool:
        """Whether the bucket has the task's manifest, though storing it is said to have failed."""
        documents = self._journal.documents()
        if documents is None or not self._records.has_sent_manifest(self._task.bundle_id):
            return False
        with self._state(BundleTaskState.STORING) as watch:
            return self._store.has_manifest(documents, watch)

    def _has_stored(self) -> bool:
        try:
            return self._step("look whether the manifest is stored", self.is_stored)
        except TaskFailure:
            return False  # what the manifest may have replaced is recorded, and put back

    def merge(self) -> None:
        """Have the instance go on without the overlay. The bundle is there if that fails, and the caretaker goes on."""
        with self._state(BundleTaskState.STORING) as watch:
            if self._freezer.frozen is not None:
                with suppress(TaskFailure):  # it is looked after then
                    self._power.restore()  # its host may have lost its power since
            try:
                patiently(lambda: self._merge_overlay(watch), _DAEMON_RESTART, pause=watch.pause)
            except InstanceError as error:
                still = f"The instance still runs on its overlay, which is tried to be merged again: {error}."
                self._records.notice(self._task.bundle_id, still)

    def _merge_overlay(self, watch: Watch) -> None:
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
        try:
            self._store.remove_earlier()
        except (BucketError, TaskFailure) as error:
            still = f"Parts of the bundle that was replaced are still in the bucket: {error}"
            self._records.notice(self._task.bundle_id, still)

    def complete(self) -> None:
        """End the task well."""
        with durable("record closed"):
            if not self._records.complete(self._task.bundle_id):
                log.warning("a task has ended before its bundle was complete", bundle_id=self._task.bundle_id)

    def fail(self, failure: TaskFailure) -> None:
        """End the task with the reason."""
        with durable("record closed"):
            self._records.fail(self._task.bundle_id, failure)

    def _step(self, name: str, work: Callable[[], _Result], *, is_over_if_started: bool = False) -> _Result:
        """A durable step, if the task is still this host's.

        Args:
            name: What it is called.
            work: Must be safe to repeat.
            is_over_if_started: Whether it fails if the instance had to be started while the database was unavailable:
                then its volume is not what it was.
        """
        return step(name, lambda: self._do(work), _PowerFirst(self._host, self._task, self._power, is_over_if_started))

    def _do(self, work: Callable[[], _Result]) -> _Result:
        def do_it() -> _Result:
            self._records.check_mine(self._task.bundle_id)
            return work()

        return patiently(do_it, self._host.stall_timeout, on=(HypervisorGoneError, InstanceHeld, HoldLostError))

    @cached_property
    def _store(self) -> BundleStore:
        policy = UploadPolicy.trusted(*self._records.grant(self._task.bundle_id), self._task.access_key_id)
        return BundleStore(
            self._host.buckets.on_behalf_of(policy.access_key_id),
            self._journal,
            self._task,
            policy,
            uploads_at_once=self._host.uploads_at_once,
            patience=self._host.store_patience,
            existing=self._host.existing_bundle,
            stall_timeout=self._host.stall_timeout,
        )

    @contextmanager
    def _state(self, state: BundleTaskState) -> Iterator[Watch]:
        """Be in a state of the task for as long as the work of it lasts, watched for progress and cancellation."""
        if not self._records.move(self._task.bundle_id, state):
            raise Cancelled
        host = self._host
        with Watch(
            self._records,
            self._task.bundle_id,
            stall_timeout=host.stall_timeout,
            is_ours=lambda task: task.host == host.name,
            lease=host.lease,
        ) as watch:
            yield watch

    @contextmanager
    def _held(self, watch: Watch) -> Iterator[tuple[Instance, VolumeFile]]:
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
        check_root_volume(self._host.instances, self._task.instance_id, root, self._host.image_directories)

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

    def _documents(self, instance: Instance, sealed: Sealed) -> Documents:
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

    host: Host
    task: BundleTask
    power: PowerSwitch
    is_over_if_started: bool

    @property
    def timeout(self) -> float:
        return self.host.stall_timeout

    def act(self) -> bool:
        """Start the instance. The step has ended, so nothing reads its volume."""
        return self.power.restore_without_record() and self.is_over_if_started

    def record(self) -> TaskFailure:
        words = (
            f"The database was unavailable for {self.timeout:g} seconds. The instance was started again, so that its "
            "volume was not read to its end."
        )
        self.host.records.tell(self.task.bundle_id, words)
        return TaskFailure("Server.NoProgress", words)


def bundle(host: Host, bundle_id: str) -> None:
    """Do the task `bundle_id`, unless it has ended (cancelled before it began) or another host has adopted it."""
    task = host.records.get(bundle_id)
    if task is not None and task.state is BundleTaskState.FAILED and task.host == host.name:
        host.made_buckets.discard_of(host.buckets, task)  # cancelled before it was begun
    if task is not None and task.state not in FINISHED and task.host == host.name:
        host.records.take_up(bundle_id)
        bundling = Bundling(host, task)
        try:
            bundling.run()
        except Exception as error:
            # The engine could not record a step's end. The task is run again once it can; until then nothing reads.
            if is_unavailable(error):
                bundling.put_power_back()
            raise
