"""One bundle's objects in its bucket: sent under the caller's upload policy, recorded and proved.

Every key is claimed before it is sent (`claims.py`), so that cleanup after a crash finds exactly what was sent and
nothing else. No object that exists is overwritten, but for the manifest of the bundle that is replaced, last of all,
after every part that the new manifest names was proved. Nobody waits within the store: calls that hang there are
abandoned (`calls.py`), and make no further attempt.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Literal, TypeVar

import structlog

from thrave.buckets.attempts import Check, no_check
from thrave.buckets.base import ObjectStore
from thrave.buckets.errors import BucketError, NoSuchBucket, NoSuchKey, TransientError
from thrave.buckets.retrying_store import RetryingStore
from thrave.buckets.upload_policy import UploadPolicy
from thrave.bundle.manifest import read_manifest
from thrave.bundle.model import PartRecord, bound_side_filename, manifest_filename, side_filename
from thrave.bundle.sealer import Sealer
from thrave.bundle.side_file import Digest, read_side_file
from thrave.pipeline import StoppedError
from thrave.tasks.calls import PLACES, Calls
from thrave.tasks.claims import ObjectInUseError
from thrave.tasks.crash_points import durable
from thrave.tasks.failures import Cancelled, TaskFailure
from thrave.tasks.journal import NOTHING, Documents, Earlier, Journal, Left, Stored, StoredObject
from thrave.tasks.places import SMALLEST_MANIFEST, Place
from thrave.tasks.removal import remove_earlier, remove_objects
from thrave.tasks.task import BundleTask
from thrave.tasks.uploads import Arrived, PartUploads
from thrave.tasks.watch import Watch

_HEADS_AT_ONCE = 16
_PAUSE = 0.25  # seconds
_WAIT = 1.0  # seconds between two attempts to claim an object

ExistingBundle = Literal["refuse", "replace"]
"""What is done about a bundle that is in the place of a new one."""

log = structlog.get_logger()
_Answer = TypeVar("_Answer")


class BundleStore:
    """Where one task's bundle goes."""

    def __init__(
        self,
        buckets: ObjectStore,
        journal: Journal,
        task: BundleTask,
        policy: UploadPolicy,
        *,
        upload_concurrency: int,
        patience: float,
        stall_timeout: float,
        existing: ExistingBundle = "refuse",
        before_attempt: Check = no_check,
    ) -> None:
        """Send to the task's bucket, under its prefix, what the caller's upload policy allows.

        Args:
            buckets: The store.
            journal: Where what is sent is written down.
            task: Whose bundle it is.
            policy: The caller's.
            upload_concurrency: Parts that are sent at the same time; each is in memory.
            patience: Seconds for which a call is made again that fails in a way that may pass.
            stall_timeout: Seconds without an answer after which removing is given up.
            existing: What is done about a bundle that is in the task's place.
            before_attempt: Made before each attempt of each call; see `RetryingStore`.
        """
        self._buckets = RetryingStore(
            buckets, patience, self._retried, before_attempt=before_attempt, unanswered=PLACES.unanswered
        )
        self._retries: list[TransientError] = []
        self._journal = journal
        self._place = Place.of(task)
        self._bucket, self._folder, self.name = self._place.bucket, self._place.folder, self._place.name
        self._policy = policy
        self._upload_concurrency = upload_concurrency
        self._stall_timeout = stall_timeout
        self._existing = existing

    def check_place(self, watch: Watch) -> None:
        """Look, before anything is sent, whether the bundle may go to its place.

        Raises:
            BucketError: The policy does not allow the manifest.
            TaskFailure: A bundle is there that must not be replaced, or requests of an earlier task may be under way.
        """
        key = self._place.manifest_key
        self._policy.check_upload(self._bucket, key, content_length=None, now=datetime.now(UTC))
        self._when_free(lambda: self._journal.check_free(key), watch)
        if self._existing == "refuse" and self._ask(self._place.has_bundle, watch):
            raise self._in_use()

    def is_unused(self, watch: Watch) -> bool:
        """Whether the plain names of parts can be used: nobody has used them, as far as can be known.

        A key that may not list the bucket cannot know it.
        """
        is_first = self._journal.is_alone_in_its_place() and not self._journal.has_begun()
        return is_first and self._ask(self._is_empty, watch)

    def put_parts(self, sealing: Sealer, left: Left, watch: Watch) -> None:
        """Send the parts of a sealing as they come, several at once; what is `left` of them is not sent again.

        Raises:
            BucketError: The policy or the bucket refuses one. The others are stopped.
            ResumeError: The image is not the one that was sealed before.
        """
        with self._telling(watch), Calls[Arrived](wake=sealing.cancel) as calls:
            watch.over(calls.stop, lambda: sealing.progress)
            uploads = PartUploads(
                calls,
                self._journal,
                left,
                partial(self._upload, calls),
                sending=partial(self._sending, watch),
                folder=self._folder,
                at_once=self._upload_concurrency,
                moved=watch.moved,
            )
            try:
                uploads.store(sealing)
            except StoppedError:
                calls.check()  # a failed upload has stopped the sealing
                raise

    def check(self, documents: Documents, watch: Watch) -> None:
        """Prove that the bucket has every part that the manifest names, with the size and digest that were sealed.

        Where the store keeps an MD5, and proved it when it took the part, that is compared; else the part is read back.

        Raises:
            TaskFailure: A part is missing or is another one.
            BucketError: The store refuses to let a part be looked at.
        """
        sealed = read_side_file(documents["side_file"].encode()).parts
        names = [part.filename for part in read_manifest(documents["manifest"].encode()).parts]
        sent = self._journal.digests()
        reading = threading.BoundedSemaphore(self._upload_concurrency)  # as many parts are in memory at a time
        done = 0
        with Calls[None]() as calls:
            watch.over(calls.stop, lambda: done / len(names))
            for name in names:
                if calls.pending >= _HEADS_AT_ONCE:
                    done += len(calls.results())
                    watch.moved()
                proof = sent.get(self._folder + name)
                md5 = proof.md5 if proof and proof.sha256 == sealed[name].sha256 else None
                calls.begin(partial(self._prove, calls, self._folder + name, sealed[name], md5, reading))
            for _ in calls.remaining():
                done += 1
                watch.moved()

    def put_side_file(self, documents: Documents, watch: Watch) -> None:
        """Send the side file, and prove that the bucket has it.

        Where another bundle is, or may have been, it has a name of its own: an earlier manifest must never be read with
        a later side file, nor the other way round.

        Raises:
            BucketError, TaskFailure: As `put_manifest`.
        """
        plain, bound = side_filename(self.name), bound_side_filename(self.name, documents["manifest"].encode())
        sent = {item.key for item in self._journal.objects()}
        if self._folder + plain in sent:  # before a crash
            filename = plain
        elif self._folder + bound in sent or not self._journal.is_alone_in_its_place():
            filename = bound
        else:
            filename = plain if self._ask(partial(self._has_none_of, plain), watch) else bound
        self._put(filename, documents["side_file"].encode(), watch)

    def put_manifest(self, documents: Documents, watch: Watch, send: Callable[[], bool]) -> None:
        """Send the manifest, and prove that the bucket has it. An earlier bundle's is recorded before it is replaced.

        Args:
            documents: The bundle's.
            watch: Of the task.
            send: Records that it may be sent from now on; False if the task was cancelled before.

        Raises:
            BucketError: The policy or the bucket refuses it.
            TaskFailure: The bucket has not got what it took, or has another manifest that must not be replaced.
            Cancelled: The task was cancelled before.
        """
        own, key = documents["manifest"].encode(), self._place.manifest_key
        self._when_free(lambda: self._journal.check_free(key), watch)
        found = self._ask(self._place.read_manifest, watch)
        if found == own:  # sent before a crash, perhaps more than once
            self._sending(watch, key)
            self._journal.stored(Stored([StoredObject(key, len(own))]))
            return
        with durable("earlier bundle noted"):
            self._keep_earlier(found)
        if not send():
            raise Cancelled
        self._put(manifest_filename(self.name), own, watch)

    def has_manifest(self, documents: Documents, watch: Watch) -> bool:
        """Whether the bucket has the manifest: then the bundle is complete, whatever has failed since it was sent."""
        own = documents["manifest"].encode()
        return self._ask(self._place.read_manifest, watch) == own

    def remove(self) -> None:
        """Delete every object that this task has sent or begun to send; as `remove_objects`."""
        remove_objects(self._buckets, self._place, self._journal, stall_timeout=self._stall_timeout)

    def remove_earlier(self) -> None:
        """Delete what is left of the bundle that this one has replaced; as `removal.remove_earlier`."""
        earlier = self._journal.earlier()
        if earlier is None:
            return
        if not earlier.is_replaced:
            self._journal.replace(replace(earlier, is_replaced=True))
        remove_earlier(self._buckets, self._place, self._journal, stall_timeout=self._stall_timeout)

    def _keep_earlier(self, found: bytes | None) -> None:
        """Record the bundle whose manifest is about to be replaced. Of several that are found the first is put back."""
        if found is None:
            return
        if self._existing == "refuse" and len(found) >= SMALLEST_MANIFEST:
            raise self._in_use()
        earlier = self._journal.earlier() or Earlier(found, ())
        mine = {item.key for item in self._journal.objects()}
        keys = {*earlier.keys, *self._place.keys_of(found)} - mine
        self._journal.replace(Earlier(earlier.manifest, tuple(sorted(keys))))

    def _in_use(self) -> TaskFailure:
        return TaskFailure(
            "Client.PrefixInUse", f"The bucket has a bundle under this prefix: '{self._place.manifest_key}'."
        )

    def _has_none_of(self, side_file: str, buckets: ObjectStore) -> bool:
        keys = self._place.manifest_key, self._folder + side_file
        return all(buckets.head(self._bucket, key) is None for key in keys)

    def _is_empty(self, buckets: ObjectStore) -> bool:
        try:
            for ending in (".part.", ".manifest."):
                for _ in buckets.list(self._bucket, f"{self._folder}{self.name}{ending}"):
                    return False
        except TransientError:
            raise
        except BucketError:
            return False
        return True

    def _ask(self, call: Callable[[ObjectStore], _Answer], watch: Watch) -> _Answer:
        """Make one call, until it ends or the task is stopped."""
        with Calls[_Answer]() as calls:
            watch.over(calls.stop)
            calls.begin(partial(call, self._buckets.checking(calls.check_wanted)))
            (answer,) = calls.remaining()
        return answer

    def _sending(self, watch: Watch, key: str, part: PartRecord | None = None, stored: Stored = NOTHING) -> None:
        """Claim an object that is about to be sent, as `Journal.sending`; wait until it is free."""
        self._when_free(lambda: self._journal.sending(key, part, stored), watch)

    def _when_free(self, claim: Callable[[], None], watch: Watch) -> None:
        """Claim an object. What may be under way to it may end, or may be cleaned up, within `stall_timeout`.

        Raises:
            TaskFailure: It is another task's, or does not become free.
        """
        until, is_told = time.monotonic() + self._stall_timeout, False
        while True:
            try:
                claim()
            except ObjectInUseError as error:
                if error.seconds is None or time.monotonic() + error.seconds > until:
                    words = f"{error} Try again later, or choose another prefix."
                    raise TaskFailure("Client.PrefixInUse", words) from None
                if not is_told:
                    log.warning("an object is in use; waiting", bundle_id=self._journal.bundle_id, error=str(error))
                is_told = True
                watch.pause(min(_WAIT, self._stall_timeout / 4))
            else:
                return

    def _put(self, filename: str, data: bytes, watch: Watch) -> None:
        """Send one file of the bundle, whole, and prove that it is there: nobody else will, of the last one."""
        key = self._folder + filename
        self._sending(watch, key)
        with Calls[StoredObject]() as calls:
            watch.over(calls.stop)
            calls.begin(partial(self._upload_surely, calls, key, memoryview(data)))
            self._journal.stored(Stored([*calls.remaining()]))

    def _upload(self, calls: Calls[Arrived] | Calls[StoredObject], key: str, data: memoryview) -> StoredObject:
        buckets = self._buckets.checking(calls.check_wanted)
        if not PLACES.wait_until_free(self._bucket, key, calls.check_wanted, self._stall_timeout):
            raise _hangs(key, self._stall_timeout)
        with PLACES.alone(self._bucket, key):
            calls.check_wanted()
            try:
                etag = buckets.put(self._bucket, key, data, grant=self._policy)
            finally:
                if calls.left:  # it stays recorded: whoever cleans up deletes it
                    log.warning("an abandoned upload ended", bundle_id=self._journal.bundle_id, key=key)
        return StoredObject(key, data.nbytes, etag)

    def _upload_surely(self, calls: Calls[StoredObject], key: str, data: memoryview) -> StoredObject:
        stored = self._upload(calls, key, data)
        self._prove(calls, key, Digest.of(bytes(data)), stored.etag, threading.BoundedSemaphore())
        return stored

    def _prove(
        self,
        calls: Calls[None] | Calls[StoredObject],
        key: str,
        digest: Digest,
        md5: str | None,
        reading: threading.BoundedSemaphore,
    ) -> None:
        """Make sure that the bucket has an object of these bytes. Raises TaskFailure if it has not."""
        head = self._buckets.checking(calls.check_wanted).head(self._bucket, key)
        if head is None:
            raise self._lost(key)
        is_other = head.size != digest.size
        if not is_other and md5 and head.etag:
            is_other = head.etag != md5
        elif not is_other:
            is_other = self._read_back(calls, key, digest.size, reading) != digest
        if is_other:
            raise TaskFailure("Client.S3Error", f"The bucket has something else now as '{key}'.")

    def _read_back(
        self, calls: Calls[None] | Calls[StoredObject], key: str, size: int, reading: threading.BoundedSemaphore
    ) -> Digest:
        while not reading.acquire(timeout=_PAUSE):
            if calls.stopped:
                raise StoppedError
        try:
            buckets = self._buckets.checking(calls.check_wanted)
            return Digest.of(buckets.get_range(self._bucket, key, 0, size + 1))
        except (NoSuchKey, NoSuchBucket):
            raise self._lost(key) from None
        finally:
            reading.release()

    def _lost(self, key: str) -> TaskFailure:
        return TaskFailure("Server.S3Error", f"The bucket has lost '{key}', which it had taken.")

    @contextmanager
    def _telling(self, watch: Watch) -> Iterator[None]:
        """Tell afterwards how often the store had to be asked again."""
        try:
            yield
        finally:
            retries, self._retries = self._retries, []
            if retries:
                watch.tell(f"Calls to the store that were made again: {len(retries)}, the last after {retries[-1]}")

    def _retried(self, reason: TransientError, seconds: float) -> None:
        self._retries.append(reason)
        log.warning(
            "the store failed; trying again",
            bundle_id=self._journal.bundle_id,
            error=str(reason),
            seconds=round(seconds, 1),
        )


def _hangs(key: str, seconds: float) -> TaskFailure:
    return TaskFailure(
        "Server.NoProgress", f"An earlier upload to '{key}' was abandoned, and has not ended for {seconds:g} seconds."
    )
