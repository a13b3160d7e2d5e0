"""Uploads a volume to a bucket: resume, parallel part uploads, verification, side file and manifest.

Every key is claimed before its object is sent (`claims.py`), so cleanup after a crash finds exactly what was sent. No
existing object is overwritten, except the manifest of a replaced bundle: last, after every part was verified.
A crash costs the parts in flight. No thread of a task waits inside a call to the store (`store_calls.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import structlog

from thrave.buckets.base import ObjectStore
from thrave.buckets.errors import BucketError, NoSuchBucket, NoSuchKey, TransientError
from thrave.buckets.retrying_store import RetryingStore
from thrave.buckets.upload_policy import UploadPolicy
from thrave.bundle.errors import ResumeError
from thrave.bundle.gzip_stream import Compression
from thrave.bundle.manifest import read_manifest
from thrave.bundle.model import (
    BundleKey,
    Checkpoint,
    Part,
    PartRecord,
    SealedBundle,
    bound_side_filename,
    manifest_filename,
    new_series,
    side_filename,
)
from thrave.bundle.sealer import Sealer
from thrave.bundle.side_file import Digest, read_side_file
from thrave.concurrency import Semaphore, monotonic, new_semaphore, utc_now
from thrave.pipeline import StoppedError
from thrave.tasks.bundle_location import MIN_MANIFEST_SIZE, BundleLocation
from thrave.tasks.claims import ObjectInUseError
from thrave.tasks.errors import TaskCancelled, TaskFailure
from thrave.tasks.failpoints import failpoint
from thrave.tasks.journal import (
    EMPTY_BATCH,
    Documents,
    EarlierBundle,
    ResumeState,
    StoredBatch,
    StoredObject,
    UploadJournal,
)
from thrave.tasks.models import BundleTask
from thrave.tasks.monitor import TaskMonitor
from thrave.tasks.object_removal import remove_earlier, remove_objects
from thrave.tasks.store_calls import IN_FLIGHT, CallGroup
from thrave.volumes.base import MonitoredVolume, Volume
from thrave.write_guard import WriteCheck, no_check

ExistingBundle = Literal["refuse", "replace"]
"""What to do if the bucket has a bundle under the task's prefix."""

WINDOW = 4
"""The newest part may be `WINDOW * upload_concurrency` parts ahead of the first part that is not stored. This limits
how many parts a crash makes the sealer read again, and how far the others may get ahead of one slow upload."""

_MAX_CHECKS = 16  # concurrent requests while the stored parts are verified
_READ_PAUSE = 0.25  # seconds between two checks whether the calls were stopped, while waiting to read a part back
_CLAIM_INTERVAL = 1.0  # seconds between two attempts to claim an object

log = structlog.get_logger()

_Result = TypeVar("_Result")


def upload_volume(
    volume: Volume, objects: "TaskObjects", journal: UploadJournal, monitor: TaskMonitor, *, compression: Compression
) -> SealedBundle:
    """Seal a volume and upload its parts; resume an upload that a crash interrupted.

    An upload resumes with the same key at the end of the stored parts, if the volume is proved to be unchanged: by the
    digest of all data before that point, and by the digests of every part that was sent beyond it. If the volume has
    changed, the upload restarts with another key: one key and IV never encrypt two states of a disk.

    Raises:
        BucketError: The policy or the bucket refuses a part.
        TaskFailure: Another bundle is in the task's location, or the task has to stop.
        Exception: What reading the volume raises.
    """
    state = journal.resume_state()
    if state is not None:
        beyond = sum(part.stored for part in state.sent.values())
        monitor.add_event(f"Sealing resumes after {state.first_part} parts; {beyond} parts beyond them are stored.")
        try:
            return PartUploader(volume, objects, journal, state, monitor, compression=compression).run()
        except ResumeError as error:
            monitor.add_event(f"Sealing restarts with another key: {error}.")
    # The key of a sealing that cannot be resumed is not used again, so its parts are of no use.
    objects.remove_objects()
    objects.check_location(monitor)
    # A request of an earlier sealing may still be in flight, in this process or in a proxy: it must hit no new part.
    series = "" if objects.can_use_plain_names(monitor) else new_series()
    state = ResumeState(BundleKey.generate(), series)
    with failpoint("bundle-key-recorded"):
        journal.start_sealing(state.bundle_key, series)
    return PartUploader(volume, objects, journal, state, monitor, compression=compression).run()


@dataclass(frozen=True)
class UploadedPart:
    """A part that is in the bucket."""

    index: int
    stored: StoredObject
    checkpoint: Checkpoint | None


class PartUploader:
    """Uploads the parts of one sealing: several at a time, finished in any order.

    One transaction per part records two facts: which parts are stored, and that the next part is about to be sent. The
    checkpoint only moves to the end of the stored prefix. A stored part beyond it is known by its record: after a crash
    the part is sealed again, but not sent again. No part may differ from a part that was sent with the same key.
    """

    def __init__(
        self,
        volume: Volume,
        objects: "TaskObjects",
        journal: UploadJournal,
        state: ResumeState,
        monitor: TaskMonitor,
        *,
        compression: Compression,
    ) -> None:
        """Start at the first part, or at the part that `state` names."""
        self._objects = objects
        self._journal = journal
        self._sent = state.sent
        self._monitor = monitor
        self._sealer = Sealer(
            MonitoredVolume(volume, monitor.report_activity),
            objects.name,
            bundle_key=state.bundle_key,
            compression=compression,
            resume_point=state.resume_point,
            series=state.series,
        )
        # A failed upload cancels the sealer, which may be waiting for the disk.
        self._calls = CallGroup[UploadedPart](wake=self._sealer.cancel)
        self._prefix = StoredPrefix(state.first_part)
        self._unrecorded: list[StoredObject] = []

    def run(self) -> SealedBundle:
        """Seal the volume and upload every part that is not stored.

        Raises:
            BucketError: The policy or the bucket refuses a part. The other uploads are stopped.
            ResumeError: The volume differs from the one that was sealed before.
        """
        with self._objects.report_retries(self._monitor), self._calls:
            self._monitor.watch(self._calls.stop, lambda: self._sealer.progress)
            try:
                with closing(self._sealer.parts()) as parts:
                    for part in parts:
                        if self._is_stored(part):
                            self._prefix.add(part.index, part.checkpoint)
                        else:
                            self._start_upload(part)
                for uploaded in self._calls.remaining():
                    self._add(uploaded)
                self._record_stored()
            except StoppedError:
                self._calls.check()  # raises the error of the upload that has stopped the sealer
                raise
        return self._sealer.sealed

    def _is_stored(self, part: Part) -> bool:
        before = self._sent.get(part.index)
        if before is None:
            return False
        if before.record != part.record:
            raise ResumeError(f"part {part.index} differs from the part that was sent before")
        return before.stored

    def _start_upload(self, part: Part) -> None:
        self._wait_for_slot(part.index)
        key = self._objects.key_of(part.filename)
        with failpoint("part-claimed"):
            self._objects.claim(key, self._monitor, part.record, self._take_unrecorded())
        self._calls.start(partial(self._upload, key, part))

    def _upload(self, key: str, part: Part) -> UploadedPart:
        with failpoint("part-stored"):
            stored = self._objects.upload(self._calls, key, part.data)
        return UploadedPart(part.index, stored, part.checkpoint)

    def _wait_for_slot(self, index: int) -> None:
        """Wait until another upload may start, and `index` is within the window."""
        self._add_results(wait=False)
        limit = self._objects.upload_concurrency
        while self._calls.pending >= limit or index >= self._prefix.end + WINDOW * limit:
            self._record_stored()
            self._add_results()

    def _record_stored(self) -> None:
        if self._unrecorded:
            with failpoint("part-recorded"):
                self._journal.record_stored(self._take_unrecorded())

    def _add_results(self, *, wait: bool = True) -> None:
        for uploaded in self._calls.results(wait=wait):
            self._add(uploaded)

    def _add(self, uploaded: UploadedPart) -> None:
        self._monitor.report_activity()
        self._unrecorded.append(uploaded.stored)
        self._prefix.add(uploaded.index, uploaded.checkpoint)

    def _take_unrecorded(self) -> StoredBatch:
        """Return what was stored since the last call."""
        batch = StoredBatch(self._unrecorded, self._prefix.checkpoint)
        self._unrecorded, self._prefix.checkpoint = [], None
        return batch


class StoredPrefix:
    """The longest unbroken run of stored parts from the first part on.

    Attributes:
        end: The index of the first part that is not in it.
        checkpoint: The last checkpoint within it; None if there is none, or its owner has taken it.
    """

    def __init__(self, end: int) -> None:
        self.end = end
        self.checkpoint: Checkpoint | None = None
        self._beyond: dict[int, Checkpoint | None] = {}

    def add(self, index: int, checkpoint: Checkpoint | None) -> None:
        """Add a stored part."""
        self._beyond[index] = checkpoint
        while self.end in self._beyond:
            self.checkpoint = self._beyond.pop(self.end) or self.checkpoint
            self.end += 1


class TaskObjects:
    """The objects of one task's bundle in its bucket: sent under the caller's upload policy, recorded and verified."""

    def __init__(
        self,
        buckets: ObjectStore,
        journal: UploadJournal,
        task: BundleTask,
        policy: UploadPolicy,
        *,
        upload_concurrency: int,
        retry_timeout: float,
        stall_timeout: float,
        existing_bundle: ExistingBundle = "refuse",
        before_attempt: WriteCheck = no_check,
    ) -> None:
        """Use the task's bucket and prefix.

        Args:
            buckets: The object store.
            journal: Records what is sent.
            task: Whose bundle it is.
            policy: The caller's upload policy.
            upload_concurrency: Maximum number of parallel part uploads; each part is held in memory.
            retry_timeout: Seconds for which a call is repeated that fails with a transient error.
            stall_timeout: Seconds without a response after which a removal ends.
            existing_bundle: What to do if the bucket has a bundle in the task's location.
            before_attempt: Called before each attempt of each call; see `RetryingStore`.
        """
        self._buckets = RetryingStore(
            buckets, retry_timeout, self._retried, before_attempt=before_attempt, unanswered=IN_FLIGHT.unanswered
        )
        self._retries: list[TransientError] = []
        self._journal = journal
        self._location = BundleLocation.of(task)
        self._bucket, self.name = self._location.bucket, self._location.name
        self._policy = policy
        self.upload_concurrency = upload_concurrency
        self._stall_timeout = stall_timeout
        self._existing_bundle = existing_bundle

    def key_of(self, filename: str) -> str:
        """Return the key of a file of the bundle."""
        return self._location.folder + filename

    def check_location(self, monitor: TaskMonitor) -> None:
        """Check, before anything is sent, whether the bundle may go to the task's location.

        Raises:
            BucketError: The policy does not allow the manifest.
            TaskFailure: The bucket has a bundle that must not be replaced, or a request of an earlier task may be in
                flight.
        """
        key = self._location.manifest_key
        self._policy.check_upload(self._bucket, key, content_length=None, now=utc_now())
        self._retry_claim(lambda: self._journal.check_free(key), monitor)
        if self._existing_bundle == "refuse" and self._call(self._location.has_bundle, monitor):
            raise self._prefix_in_use()

    def can_use_plain_names(self, monitor: TaskMonitor) -> bool:
        """Whether nobody has used the plain names of parts, as far as can be checked.

        An access key without permission to list the bucket cannot check this: then the answer is no.
        """
        is_first = self._journal.is_only_task_at_location() and not self._journal.has_started()
        return is_first and self._call(self._is_empty, monitor)

    def verify_stored(self, documents: Documents, monitor: TaskMonitor) -> None:
        """Verify that the bucket has every part that the manifest names, with the size and digest that were sealed.

        Where the store keeps an MD5, and returned the right one for the upload, the MD5 is compared. Otherwise the part
        is read back.

        Raises:
            TaskFailure: A part is missing or differs.
            BucketError: The store refuses to let a part be read.
        """
        sealed = read_side_file(documents["side_file"].encode()).parts
        names = [part.filename for part in read_manifest(documents["manifest"].encode()).parts]
        sent = self._journal.stored_digests()
        reading = new_semaphore(self.upload_concurrency)  # each part that is read back is held in memory
        done = 0
        with CallGroup[None]() as calls:
            monitor.watch(calls.stop, lambda: done / len(names))
            for name in names:
                if calls.pending >= _MAX_CHECKS:
                    done += len(calls.results())
                    monitor.report_activity()
                key = self.key_of(name)
                proof = sent.get(key)
                md5 = proof.md5 if proof and proof.sha256 == sealed[name].sha256 else None
                calls.start(partial(self._verify_object, calls, key, sealed[name], md5, reading))
            for _ in calls.remaining():
                done += 1
                monitor.report_activity()

    def put_side_file(self, documents: Documents, monitor: TaskMonitor) -> None:
        """Upload the side file, and verify that the bucket has it.

        Where another bundle is, or may have been, the side file gets a name that is bound to the manifest: an earlier
        manifest must never be read with a later side file, nor the other way round.

        Raises:
            BucketError, TaskFailure: As `put_manifest`.
        """
        plain, bound = side_filename(self.name), bound_side_filename(self.name, documents["manifest"].encode())
        sent = {item.key for item in self._journal.objects()}
        if self.key_of(plain) in sent:  # before a crash
            filename = plain
        elif self.key_of(bound) in sent or not self._journal.is_only_task_at_location():
            filename = bound
        else:
            filename = plain if self._call(partial(self._has_no_manifest_or, plain), monitor) else bound
        self._put(filename, documents["side_file"].encode(), monitor)

    def put_manifest(self, documents: Documents, monitor: TaskMonitor, record_sent: Callable[[], bool]) -> None:
        """Upload the manifest, and verify that the bucket has it. First record the manifest that it replaces.

        Args:
            documents: The bundle's manifest and side file.
            monitor: Monitors the task.
            record_sent: Records that the manifest may be sent from now on; False if the task was cancelled before.

        Raises:
            BucketError: The policy or the bucket refuses the manifest.
            TaskFailure: The bucket does not have what it accepted, or has a manifest that must not be replaced.
            TaskCancelled: The task was cancelled before.
        """
        own, key = documents["manifest"].encode(), self._location.manifest_key
        self._retry_claim(lambda: self._journal.check_free(key), monitor)
        found = self._call(self._location.read_manifest, monitor)
        if found == own:  # sent before a crash, perhaps more than once
            self.claim(key, monitor)
            self._journal.record_stored(StoredBatch([StoredObject(key, len(own))]))
            return
        with failpoint("earlier-bundle-recorded"):
            self._record_earlier(found)
        if not record_sent():
            raise TaskCancelled
        self._put(manifest_filename(self.name), own, monitor)

    def has_manifest(self, documents: Documents, monitor: TaskMonitor) -> bool:
        """Whether the bucket has the manifest: then the bundle is complete, whatever failed after it was sent."""
        own = documents["manifest"].encode()
        return self._call(self._location.read_manifest, monitor) == own

    def remove_objects(self) -> None:
        """Delete every object that this task has sent or started to send; see `object_removal.remove_objects`."""
        remove_objects(self._buckets, self._location, self._journal, stall_timeout=self._stall_timeout)

    def remove_earlier(self) -> None:
        """Delete the remaining objects of the bundle that was replaced; see `object_removal.remove_earlier`."""
        earlier = self._journal.earlier()
        if earlier is None:
            return
        if not earlier.is_replaced:
            self._journal.record_earlier(replace(earlier, is_replaced=True))
        remove_earlier(self._buckets, self._location, self._journal, stall_timeout=self._stall_timeout)

    def claim(
        self, key: str, monitor: TaskMonitor, part: PartRecord | None = None, stored: StoredBatch = EMPTY_BATCH
    ) -> None:
        """Claim an object that is about to be sent; wait until it is free. See `UploadJournal.record_upload`."""
        self._retry_claim(lambda: self._journal.record_upload(key, part, stored), monitor)

    def upload(
        self, calls: CallGroup[UploadedPart] | CallGroup[StoredObject], key: str, data: memoryview
    ) -> StoredObject:
        """Upload an object that was claimed; runs as one of `calls`."""
        buckets = self._buckets.checking(calls.check_wanted)
        if not IN_FLIGHT.wait_until_free(self._bucket, key, calls.check_wanted, self._stall_timeout):
            seconds = f"{self._stall_timeout:g} seconds"
            raise TaskFailure(
                "Server.NoProgress", f"An earlier upload to '{key}' was abandoned, and has not ended for {seconds}."
            )
        with IN_FLIGHT.lock(self._bucket, key):
            calls.check_wanted()
            try:
                etag = buckets.put(self._bucket, key, data, policy=self._policy)
            finally:
                if calls.abandoned:  # its claim stays recorded, so cleanup deletes the object
                    log.warning("abandoned upload ended", bundle_id=self._journal.bundle_id, key=key)
        return StoredObject(key, data.nbytes, etag)

    @contextmanager
    def report_retries(self, monitor: TaskMonitor) -> Iterator[None]:
        """After the block, add an event that says how many calls to the store were repeated."""
        try:
            yield
        finally:
            retries, self._retries = self._retries, []
            if retries:
                monitor.add_event(
                    f"Calls to the store that were repeated: {len(retries)}, the last after {retries[-1]}"
                )

    def _record_earlier(self, found: bytes | None) -> None:
        """Record the bundle whose manifest is about to be replaced. If several are found, the first can be restored."""
        if found is None:
            return
        if self._existing_bundle == "refuse" and len(found) >= MIN_MANIFEST_SIZE:
            raise self._prefix_in_use()
        earlier = self._journal.earlier() or EarlierBundle(found, ())
        own = {item.key for item in self._journal.objects()}
        keys = {*earlier.keys, *self._location.keys_of(found)} - own
        self._journal.record_earlier(EarlierBundle(earlier.manifest, tuple(sorted(keys))))

    def _prefix_in_use(self) -> TaskFailure:
        return TaskFailure(
            "Client.PrefixInUse", f"The bucket has a bundle under this prefix: '{self._location.manifest_key}'."
        )

    def _has_no_manifest_or(self, side_file: str, buckets: ObjectStore) -> bool:
        keys = self._location.manifest_key, self.key_of(side_file)
        return all(buckets.head(self._bucket, key) is None for key in keys)

    def _is_empty(self, buckets: ObjectStore) -> bool:
        try:
            for ending in (".part.", ".manifest."):
                for _ in buckets.list(self._bucket, self.key_of(f"{self.name}{ending}")):
                    return False
        except TransientError:
            raise
        except BucketError:
            return False
        return True

    def _call(self, call: Callable[[ObjectStore], _Result], monitor: TaskMonitor) -> _Result:
        """Make one call to the store; end early if the task is stopped."""
        with CallGroup[_Result]() as calls:
            monitor.watch(calls.stop)
            calls.start(partial(call, self._buckets.checking(calls.check_wanted)))
            (result,) = calls.remaining()
        return result

    def _retry_claim(self, claim: Callable[[], None], monitor: TaskMonitor) -> None:
        """Claim an object; while another request may hit it, retry for `stall_timeout` seconds.

        Raises:
            TaskFailure: It belongs to another task, or does not become free.
        """
        until, is_logged = monotonic() + self._stall_timeout, False
        while True:
            try:
                claim()
            except ObjectInUseError as error:
                if error.seconds is None or monotonic() + error.seconds > until:
                    message = f"{error} Try again later, or choose another prefix."
                    raise TaskFailure("Client.PrefixInUse", message) from None
                if not is_logged:
                    log.warning("object in use, waiting", bundle_id=self._journal.bundle_id, error=str(error))
                is_logged = True
                monitor.pause(min(_CLAIM_INTERVAL, self._stall_timeout / 4))
            else:
                return

    def _put(self, filename: str, data: bytes, monitor: TaskMonitor) -> None:
        """Upload one file of the bundle, and verify it: nothing verifies side file and manifest later."""
        key = self.key_of(filename)
        self.claim(key, monitor)
        with CallGroup[StoredObject]() as calls:
            monitor.watch(calls.stop)
            calls.start(partial(self._upload_and_verify, calls, key, memoryview(data)))
            self._journal.record_stored(StoredBatch([*calls.remaining()]))

    def _upload_and_verify(self, calls: CallGroup[StoredObject], key: str, data: memoryview) -> StoredObject:
        stored = self.upload(calls, key, data)
        self._verify_object(calls, key, Digest.of(bytes(data)), stored.etag, new_semaphore())
        return stored

    def _verify_object(
        self,
        calls: CallGroup[None] | CallGroup[StoredObject],
        key: str,
        digest: Digest,
        md5: str | None,
        reading: Semaphore,
    ) -> None:
        """Verify that the bucket has an object of these bytes. Raises TaskFailure if not."""
        head = self._buckets.checking(calls.check_wanted).head(self._bucket, key)
        if head is None:
            raise self._object_lost(key)
        differs = head.size != digest.size
        if not differs and md5 and head.etag:
            differs = head.etag != md5
        elif not differs:
            differs = self._read_back(calls, key, digest.size, reading) != digest
        if differs:
            raise TaskFailure("Client.S3Error", f"The bucket has a different object now as '{key}'.")

    def _read_back(
        self, calls: CallGroup[None] | CallGroup[StoredObject], key: str, size: int, reading: Semaphore
    ) -> Digest:
        while not reading.acquire(timeout=_READ_PAUSE):
            if calls.stopped:
                raise StoppedError
        try:
            buckets = self._buckets.checking(calls.check_wanted)
            return Digest.of(buckets.get_range(self._bucket, key, 0, size + 1))
        except (NoSuchKey, NoSuchBucket):
            raise self._object_lost(key) from None
        finally:
            reading.release()

    def _object_lost(self, key: str) -> TaskFailure:
        return TaskFailure("Server.S3Error", f"The bucket has lost '{key}', which it had accepted.")

    def _retried(self, error: TransientError, seconds: float) -> None:
        self._retries.append(error)
        log.warning(
            "store call failed, retrying",
            bundle_id=self._journal.bundle_id,
            error=str(error),
            seconds=round(seconds, 1),
        )
