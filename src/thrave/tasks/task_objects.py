"""The objects of one task's bundle in its bucket: claim, upload, verification, side file and manifest.

Every key is claimed before its object is sent (`claims.py`), so cleanup after a crash finds exactly what was sent. A
task overwrites only its own objects (after a crash it sends the same bytes again) and the manifest of a bundle that it
replaces: last, after every part was verified. No thread of a task waits inside a call to the store (`store_calls.py`).
`uploads.py` decides which parts are uploaded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar

import structlog

from thrave.buckets.base import ObjectStore
from thrave.buckets.errors import BucketError, NoSuchBucket, NoSuchKey, TransientError
from thrave.buckets.retrying_store import RetryingStore
from thrave.buckets.upload_policy import UploadPolicy
from thrave.bundle.manifest import read_manifest
from thrave.bundle.model import (
    PartRecord,
    bound_side_filename,
    manifest_filename,
    side_filename,
)
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
    StoredBatch,
    StoredObject,
    UploadJournal,
)
from thrave.tasks.models import BundleTask
from thrave.tasks.monitor import TaskMonitor
from thrave.tasks.object_removal import remove_earlier, remove_objects
from thrave.tasks.store_calls import IN_FLIGHT, CallGroup
from thrave.write_guard import WriteCheck, no_check

ExistingBundle = Literal["refuse", "replace"]
"""What to do if the bucket has a bundle under the task's prefix."""

_MAX_CHECKS = 16  # concurrent requests while the stored parts are verified
_READ_PAUSE = 0.25  # seconds between two checks whether the calls were stopped, while waiting to read a part back
_CLAIM_INTERVAL = 1.0  # seconds between two attempts to claim an object

log = structlog.get_logger()

_Result = TypeVar("_Result")


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

    def can_resume(self, series: str, monitor: TaskMonitor) -> bool:
        """Whether parts of this series may be uploaded: no manifest in the bucket names such a part.

        If one does, this task has completed, and its database was then restored from an older backup. The volume may
        have changed since, after the point where sealing resumes.
        """
        found = self._call(self._location.read_manifest, monitor)
        start = self.key_of(f"{self.name}.part.{series}")
        return found is None or not any(key.startswith(start) for key in self._location.part_keys(found))

    def can_use_plain_names(self, monitor: TaskMonitor) -> bool:
        """Whether the plain names of parts are unused, as far as can be checked.

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
                verified = sent.get(key)
                md5 = verified.md5 if verified and verified.sha256 == sealed[name].sha256 else None
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

    def upload(self, calls: CallGroup[_Result], key: str, data: memoryview) -> StoredObject:
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
                if calls.is_abandoned:  # its claim stays recorded, so cleanup deletes the object
                    log.warning("abandoned upload ended", bundle_id=self._journal.bundle_id, key=key)
        return StoredObject(key, data.nbytes, etag)

    @contextmanager
    def report_retries(self, monitor: TaskMonitor) -> Iterator[None]:
        """After the block, add an event with the number of repeated calls to the store."""
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
        calls: CallGroup[_Result],
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

    def _read_back(self, calls: CallGroup[_Result], key: str, size: int, reading: Semaphore) -> Digest:
        while not reading.acquire(timeout=_READ_PAUSE):
            if calls.is_stopped:
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
