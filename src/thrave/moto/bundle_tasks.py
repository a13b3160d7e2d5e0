"""Bundle tasks in moto: their states, and what happens to instance and bucket in each.

moto's state manager decides when a task changes its state: at once (the default), after a number of calls of
DescribeBundleTasks, or after a time.

    from moto.moto_api import state_manager
    state_manager.set_transition(thrave.moto.STATE_MODEL, {"progression": "manual", "times": 1})
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

from cryptography.x509 import Certificate
from moto.moto_api import state_manager
from moto.moto_api._internal.managed_state_model import ManagedState

from thrave.buckets.errors import BucketError
from thrave.buckets.upload_policy import UploadPolicy
from thrave.bundle import SealedBundle, Sealer, write_manifest, write_side_file
from thrave.compute.errors import InstanceError, InstanceNotFound
from thrave.compute.instance import InstanceState
from thrave.concurrency import random_hex, utc_now
from thrave.identity.certificates import ServiceIdentity
from thrave.moto.adapters import MotoBuckets, MotoInstances
from thrave.moto.disks import GeneratedDisk
from thrave.tasks.bundle_location import BundleLocation
from thrave.tasks.errors import (
    BundleTaskNotCancellable,
    BundleTaskNotFound,
    BundlingInProgress,
    PrefixInUse,
    TaskCancelled,
    TooManyBundleTasks,
    to_task_failure,
)
from thrave.tasks.models import (
    CANCELLABLE,
    FINISHED,
    FIRST_STEP,
    BundleRequest,
    BundleTask,
    BundleTaskState,
)

STATE_MODEL = "thrave::bundle-task"
"""The name of bundle tasks for moto's state manager."""

MAX_UNFINISHED = 100  # tasks of an account

_S = BundleTaskState
# At the end of what a task does when it enters a state. It stores nothing when it enters `storing`.
_PROGRESS = {_S.BUNDLING: 100, _S.STORING: 0, _S.COMPLETE: 100}
_ORDER = (_S.PENDING, _S.WAITING_FOR_SHUTDOWN, _S.BUNDLING, _S.STORING, _S.COMPLETE)

state_manager.register_default_transition(STATE_MODEL, {"progression": "immediate"})


class MotoBundleTask:
    """One bundle task, with the objects that it has stored.

    Args:
        task: The new task, `pending`.
        request: The checked request.
        location: Where the bundle is stored.
        instances: For the instance.
        buckets: For the bucket.
        identity: Signs the manifest; its key opens the bundle.
        certificate: The account's certificate, whose key opens the bundle as well.
    """

    def __init__(
        self,
        task: BundleTask,
        request: BundleRequest,
        *,
        instances: MotoInstances,
        buckets: MotoBuckets,
        identity: ServiceIdentity,
        certificate: Certificate | None,
    ) -> None:
        self.task = task
        self._request = request
        self._location = BundleLocation.of(task)
        self._instances, self._buckets = instances, buckets
        self._identity, self._certificate = identity, certificate
        self._states = ManagedState(STATE_MODEL, [(a.value, b.value) for a, b in pairwise(_ORDER)])
        self._was_running = False
        self._sealed: SealedBundle | None = None
        self._stored: list[str] = []  # keys

    def advance(self) -> None:
        """Let moto's state manager change the state, and do what belongs to each state that is entered."""
        if self.task.state is _S.CANCELLING:
            self._end(_S.FAILED)
        if self.task.state in FINISHED:
            return
        self._states.advance()
        wanted = _ORDER.index(_S(self._states.status))
        for state in _ORDER[_ORDER.index(self.task.state) + 1 : wanted + 1]:
            try:
                self._enter(state)
            except (BucketError, InstanceError) as error:
                failure = to_task_failure(error)
                self.task = replace(self.task, error_code=failure.code, error_message=failure.message)
                self._undo()
                self._end(_S.FAILED)
                return
            self.task = replace(self.task, state=state, update_time=utc_now(), progress=_PROGRESS.get(state))

    def cancel(self) -> None:
        """Undo the task. It is `cancelling` now, and `failed` when it is described again."""
        if self.task.state not in CANCELLABLE:
            raise BundleTaskNotCancellable(self.task.state)
        cancelled = TaskCancelled()
        self._undo()
        self.task = replace(
            self.task,
            state=_S.CANCELLING,
            update_time=utc_now(),
            error_code=cancelled.code,
            error_message=cancelled.message,
        )

    def _enter(self, state: BundleTaskState) -> None:
        """Do what belongs to a state."""
        match state:
            case _S.WAITING_FOR_SHUTDOWN:
                self._stop_instance()
            case _S.BUNDLING:
                self._store_parts()
            case _S.STORING:
                self._start_instance()
            case _S.COMPLETE:
                self._store_manifest()

    def _stop_instance(self) -> None:
        self._was_running = self._instances.get(self.task.instance_id).state is InstanceState.RUNNING
        if self._was_running:
            self._instances.request_stop(self.task.instance_id)

    def _store_parts(self) -> None:
        self._check_instance()
        sealer = Sealer(GeneratedDisk(self.task.instance_id), self._location.name)
        for part in sealer.parts():
            self._put(part.filename, part.data)
        self._sealed = sealer.sealed

    def _start_instance(self) -> None:
        self._check_instance()
        if self._was_running:
            self._instances.start(self.task.instance_id)

    def _store_manifest(self) -> None:
        assert self._sealed is not None
        manifest = write_manifest(
            self._sealed,
            account_id=self.task.owner_id,
            architecture=self._instances.get(self.task.instance_id).architecture,
            user_certificate=self._certificate,
            service_certificate=self._identity.certificate,
            signing_key=self._identity.private_key,
        )
        side_file = write_side_file(
            self._sealed, manifest, side_key=self._identity.side_key, signing_key=self._identity.private_key
        )
        self._put(f"{self._location.name}.manifest.json", side_file)
        self._put(f"{self._location.name}.manifest.xml", manifest)

    def _check_instance(self) -> None:
        """Raise an InstanceError if the instance was terminated during the task."""
        instance = self._instances.get(self.task.instance_id)
        if instance.state is InstanceState.TERMINATED:
            raise InstanceNotFound(instance.instance_id)

    def _put(self, name: str, data: bytes | memoryview) -> None:
        key = self._location.folder + name
        request = self._request
        policy = UploadPolicy.parse_trusted(
            request.upload_policy, request.upload_policy_signature, request.access_key_id
        )
        self._buckets.put(self.task.bucket, key, data, policy=policy)
        self._stored.append(key)

    def _undo(self) -> None:
        self._buckets.delete(self.task.bucket, self._stored)
        if self.task.created_bucket:
            self._buckets.remove(self.task.bucket, self.task.owner_id)
        instance = self._instances.get(self.task.instance_id)
        if self._was_running and instance.state is InstanceState.STOPPED:
            self._instances.start(self.task.instance_id)

    def _end(self, state: BundleTaskState) -> None:
        self.task = replace(self.task, state=state, update_time=utc_now())


class MotoTasks:
    """The bundle tasks of one account and region, with the methods of `BundleTaskService` that the actions use.

    Args:
        new_task: Creates the task of a request.
    """

    def __init__(self, new_task: Callable[[BundleTask, BundleRequest], MotoBundleTask]) -> None:
        self.created_buckets = MotoCreatedBuckets()
        self._new_task = new_task
        self._tasks: dict[str, MotoBundleTask] = {}

    def create(self, request: BundleRequest) -> BundleTask:
        """Record a task. Without another setting of moto's state manager, the whole task is done now.

        Returns:
            The task as it begins: `pending`.
        """
        now = utc_now()
        task = BundleTask(
            bundle_id=f"bun-{random_hex(9)[:17]}",
            account_id=request.account_id,
            owner_id=request.owner_id,
            instance_id=request.instance_id,
            host="moto",
            state=BundleTaskState.PENDING,
            next_step=FIRST_STEP,
            progress=None,
            start_time=now,
            update_time=now,
            bucket=request.bucket,
            prefix=request.prefix,
            access_key_id=request.access_key_id,
            created_bucket=request.created_bucket,
            run_after_task=None,
            power_recovery_until=None,
            error_code=None,
            error_message=None,
            warning=None,
            volume_size=None,
            runs=1,
        )
        moto_task = self._tasks[task.bundle_id] = self._new_task(task, request)
        if state_manager.get_transition(STATE_MODEL)["progression"] == "immediate":
            moto_task.advance()
        return task

    def describe(self, _account_id: str, bundle_ids: Sequence[str] = ()) -> list[BundleTask]:
        """Return all tasks, or those with the given ids, oldest first. Each of them may change its state first.

        Raises:
            BundleTaskNotFound: There is no task with one of the ids.
        """
        found = [self._find(bundle_id) for bundle_id in dict.fromkeys(bundle_ids or self._tasks)]
        for moto_task in found:
            moto_task.advance()
        return sorted((moto_task.task for moto_task in found), key=lambda task: (task.start_time, task.bundle_id))

    def cancel(self, _account_id: str, bundle_id: str) -> BundleTask:
        """Cancel a task and return it.

        Raises:
            BundleTaskNotFound: There is no such task.
            BundleTaskNotCancellable: The task has ended, or is already being cancelled.
        """
        moto_task = self._find(bundle_id)
        moto_task.cancel()
        return moto_task.task

    def in_progress(self, instance_id: str) -> BundleTask | None:
        """Return the unfinished task of an instance, or None."""
        return next((task for task in self._unfinished() if task.instance_id == instance_id), None)

    def check_quota(self, _account_id: str) -> None:
        """Raise TooManyBundleTasks if the account has its maximum of unfinished tasks."""
        if len(self._unfinished()) >= MAX_UNFINISHED:
            raise TooManyBundleTasks(MAX_UNFINISHED)

    def check_location(self, _account_id: str, instance_id: str, bucket: str, prefix: str) -> None:
        """Check that no unfinished task has a bucket and prefix.

        Raises:
            BundlingInProgress: The instance's own task has them.
            PrefixInUse: Another task has them.
        """
        for task in self._unfinished():
            if (task.bucket, task.prefix) == (bucket, prefix):
                if task.instance_id == instance_id:
                    raise BundlingInProgress(task.bundle_id)
                raise PrefixInUse(bucket, prefix, task.bundle_id)

    def _unfinished(self) -> list[BundleTask]:
        return [moto_task.task for moto_task in self._tasks.values() if moto_task.task.state not in FINISHED]

    def _find(self, bundle_id: str) -> MotoBundleTask:
        if bundle_id not in self._tasks:
            raise BundleTaskNotFound(bundle_id)
        return self._tasks[bundle_id]


class MotoCreatedBuckets:
    """Buckets that requests create. Requests are handled one after another, so no lock is needed."""

    @contextmanager
    def in_use(self, _bucket: str) -> Iterator[None]:
        """See `CreatedBuckets.in_use`."""
        yield

    def remove(self, buckets: MotoBuckets, bucket: str, owner_id: str) -> None:
        """Remove the bucket of a request that was refused, if it is empty."""
        buckets.remove(bucket, owner_id)
