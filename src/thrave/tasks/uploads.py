"""The parts of one sealing on their way into the bucket: sent several at once, back in any order.

One transaction a part says both: what has come back is stored, and the next is about to be sent. The checkpoint moves
on only to the end of the longest unbroken run of stored parts. A part beyond that run is known by its record: sealed
again after a crash, but not sent again. So a crash costs the parts in flight, and a second sealing of a few more.

No part may differ from one that was sent before with the same key: that would be another disk.

One bundle's objects in its bucket: sent under the caller's upload policy, recorded and proved.

Every key is claimed before it is sent (`claims.py`), so that cleanup after a crash finds exactly what was sent and
nothing else. No object that exists is overwritten, but for the manifest of the bundle that is replaced, last of all,
after every part that the new manifest names was proved. Nobody waits within the store: calls that hang there are
abandoned (`calls.py`), and make no further attempt.

A volume sealed into a bucket, part by part, also across crashes.

What a crash cut off goes on with the same key at the end of the parts that are stored, if the disk is proved to be the
same: by the digest of all that lies before, and by those of every part that was sent beyond. If it is not, everything
begins again with another key: the same key and IV never see two states of a disk.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
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
from thrave.pipeline import StoppedError
from thrave.tasks.bundle_location import SMALLEST_MANIFEST, BundleLocation
from thrave.tasks.claims import ObjectInUseError
from thrave.tasks.errors import TaskCancelled, TaskFailure
from thrave.tasks.failpoints import failpoint
from thrave.tasks.journal import NOTHING, Documents, Earlier, ResumeState, StoredBatch, StoredObject, UploadJournal
from thrave.tasks.models import BundleTask
from thrave.tasks.monitor import TaskMonitor
from thrave.tasks.object_removal import remove_earlier, remove_objects
from thrave.tasks.store_calls import IN_FLIGHT, CallGroup
from thrave.volumes.base import Volume, WatchedVolume
from thrave.write_guard import WriteCheck, no_check

WINDOW = 4
"""Times `at_once`: how far the newest part may be beyond the first that is not stored. It is what a crash can make
sealing do again, and how much slower than the others one upload may be before they wait for it."""


@dataclass(frozen=True)
class UploadedPart:
    """A part that is in the bucket."""

    index: int
    stored: StoredObject
    checkpoint: Checkpoint | None


class PartUploader:
    """The uploads of one sealing's parts."""

    def __init__(
        self,
        calls: CallGroup[UploadedPart],
        journal: UploadJournal,
        left: ResumeState,
        upload: Callable[[str, memoryview], StoredObject],
        *,
        sending: Callable[[str, PartRecord, StoredBatch], None],
        folder: str,
        at_once: int,
        moved: Callable[[], None],
    ) -> None:
        """Begin where a sealing was cut off, or at the first part.

        Args:
            calls: Makes the uploads.
            journal: Where they are written down.
            left: What was sent before.
            upload: Sends an object, given its key and content.
            sending: As `UploadJournal.sending`.
            folder: What the keys begin with.
            at_once: Parts that may be in flight.
            moved: Told whenever one has arrived.
        """
        self._calls = calls
        self._journal = journal
        self._sent = left.sent
        self._upload = upload
        self._sending = sending
        self._folder = folder
        self._at_once = at_once
        self._moved = moved
        self._run = StoredPrefix(left.first)
        self._arrived: list[StoredObject] = []

    def store(self, sealing: Sealer) -> None:
        """Send what is not there. Raises what a call raised, and ResumeError if a part is not what was sent before."""
        with closing(sealing.parts()) as parts:
            for part in parts:
                if self._is_stored(part):
                    self._run.add(part.index, part.checkpoint)
                else:
                    self._send(part)
        for arrived in self._calls.remaining():
            self._take(arrived)
        self._write_down()

    def _is_stored(self, part: Part) -> bool:
        before = self._sent.get(part.index)
        if before is None:
            return False
        if before.record != part.record:
            raise ResumeError(f"part {part.index}, which was sent before, comes out otherwise now")
        return before.stored

    def _send(self, part: Part) -> None:
        self._make_room(part.index)
        key = self._folder + part.filename
        with failpoint("part sealed"):
            self._sending(key, part.record, self._news())
        self._calls.begin(partial(self._sent_part, key, part))

    def _sent_part(self, key: str, part: Part) -> UploadedPart:
        with failpoint("part stored"):
            stored = self._upload(key, part.data)
        return UploadedPart(part.index, stored, part.checkpoint)

    def _make_room(self, index: int) -> None:
        self._collect(wait=False)
        while self._calls.pending >= self._at_once or index >= self._run.end + WINDOW * self._at_once:
            self._write_down()
            self._collect()

    def _write_down(self) -> None:
        if self._arrived:
            with failpoint("part recorded"):
                self._journal.stored(self._news())

    def _collect(self, *, wait: bool = True) -> None:
        for arrived in self._calls.results(wait=wait):
            self._take(arrived)

    def _take(self, arrived: UploadedPart) -> None:
        self._moved()
        self._arrived.append(arrived.stored)
        self._run.add(arrived.index, arrived.checkpoint)

    def _news(self) -> StoredBatch:
        """What has come back since the last time."""
        news = StoredBatch(self._arrived, self._run.checkpoint)
        self._arrived, self._run.checkpoint = [], None
        return news


class StoredPrefix:
    """The longest unbroken run of stored parts."""

    def __init__(self, end: int) -> None:
        self.end = end
        """The number of the first part that is not in it."""
        self.checkpoint: Checkpoint | None = None
        """The last that there is within it; None if it has been taken."""
        self._beyond: dict[int, Checkpoint | None] = {}

    def add(self, index: int, checkpoint: Checkpoint | None) -> None:
        """Take in a part that is stored."""
        self._beyond[index] = checkpoint
        while self.end in self._beyond:
            self.checkpoint = self._beyond.pop(self.end) or self.checkpoint
            self.end += 1


_HEADS_AT_ONCE = 16


_PAUSE = 0.25  # seconds


_WAIT = 1.0  # seconds between two attempts to claim an object


ExistingBundle = Literal["refuse", "replace"]
"""What is done about a bundle that is in the place of a new one."""


log = structlog.get_logger()


_Answer = TypeVar("_Answer")


class TaskObjects:
    """Where one task's bundle goes."""

    def __init__(
        self,
        buckets: ObjectStore,
        journal: UploadJournal,
        task: BundleTask,
        policy: UploadPolicy,
        *,
        upload_concurrency: int,
        patience: float,
        stall_timeout: float,
        existing: ExistingBundle = "refuse",
        before_attempt: WriteCheck = no_check,
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
            buckets, patience, self._retried, before_attempt=before_attempt, unanswered=IN_FLIGHT.unanswered
        )
        self._retries: list[TransientError] = []
        self._journal = journal
        self._place = BundleLocation.of(task)
        self._bucket, self._folder, self.name = self._place.bucket, self._place.folder, self._place.name
        self._policy = policy
        self._upload_concurrency = upload_concurrency
        self._stall_timeout = stall_timeout
        self._existing = existing

    def check_place(self, watch: TaskMonitor) -> None:
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

    def is_unused(self, watch: TaskMonitor) -> bool:
        """Whether the plain names of parts can be used: nobody has used them, as far as can be known.

        A key that may not list the bucket cannot know it.
        """
        is_first = self._journal.is_alone_in_its_place() and not self._journal.has_begun()
        return is_first and self._ask(self._is_empty, watch)

    def put_parts(self, sealing: Sealer, left: ResumeState, watch: TaskMonitor) -> None:
        """Send the parts of a sealing as they come, several at once; what is `left` of them is not sent again.

        Raises:
            BucketError: The policy or the bucket refuses one. The others are stopped.
            ResumeError: The image is not the one that was sealed before.
        """
        with self._telling(watch), CallGroup[UploadedPart](wake=sealing.cancel) as calls:
            watch.over(calls.stop, lambda: sealing.progress)
            uploads = PartUploader(
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

    def check(self, documents: Documents, watch: TaskMonitor) -> None:
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
        with CallGroup[None]() as calls:
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

    def put_side_file(self, documents: Documents, watch: TaskMonitor) -> None:
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

    def put_manifest(self, documents: Documents, watch: TaskMonitor, send: Callable[[], bool]) -> None:
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
            self._journal.stored(StoredBatch([StoredObject(key, len(own))]))
            return
        with failpoint("earlier bundle noted"):
            self._keep_earlier(found)
        if not send():
            raise TaskCancelled
        self._put(manifest_filename(self.name), own, watch)

    def has_manifest(self, documents: Documents, watch: TaskMonitor) -> bool:
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

    def _ask(self, call: Callable[[ObjectStore], _Answer], watch: TaskMonitor) -> _Answer:
        """Make one call, until it ends or the task is stopped."""
        with CallGroup[_Answer]() as calls:
            watch.over(calls.stop)
            calls.begin(partial(call, self._buckets.checking(calls.check_wanted)))
            (answer,) = calls.remaining()
        return answer

    def _sending(
        self, watch: TaskMonitor, key: str, part: PartRecord | None = None, stored: StoredBatch = NOTHING
    ) -> None:
        """Claim an object that is about to be sent, as `UploadJournal.sending`; wait until it is free."""
        self._when_free(lambda: self._journal.sending(key, part, stored), watch)

    def _when_free(self, claim: Callable[[], None], watch: TaskMonitor) -> None:
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

    def _put(self, filename: str, data: bytes, watch: TaskMonitor) -> None:
        """Send one file of the bundle, whole, and prove that it is there: nobody else will, of the last one."""
        key = self._folder + filename
        self._sending(watch, key)
        with CallGroup[StoredObject]() as calls:
            watch.over(calls.stop)
            calls.begin(partial(self._upload_surely, calls, key, memoryview(data)))
            self._journal.stored(StoredBatch([*calls.remaining()]))

    def _upload(
        self, calls: CallGroup[UploadedPart] | CallGroup[StoredObject], key: str, data: memoryview
    ) -> StoredObject:
        buckets = self._buckets.checking(calls.check_wanted)
        if not IN_FLIGHT.wait_until_free(self._bucket, key, calls.check_wanted, self._stall_timeout):
            raise _hangs(key, self._stall_timeout)
        with IN_FLIGHT.alone(self._bucket, key):
            calls.check_wanted()
            try:
                etag = buckets.put(self._bucket, key, data, grant=self._policy)
            finally:
                if calls.left:  # it stays recorded: whoever cleans up deletes it
                    log.warning("an abandoned upload ended", bundle_id=self._journal.bundle_id, key=key)
        return StoredObject(key, data.nbytes, etag)

    def _upload_surely(self, calls: CallGroup[StoredObject], key: str, data: memoryview) -> StoredObject:
        stored = self._upload(calls, key, data)
        self._prove(calls, key, Digest.of(bytes(data)), stored.etag, threading.BoundedSemaphore())
        return stored

    def _prove(
        self,
        calls: CallGroup[None] | CallGroup[StoredObject],
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
        self, calls: CallGroup[None] | CallGroup[StoredObject], key: str, size: int, reading: threading.BoundedSemaphore
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
    def _telling(self, watch: TaskMonitor) -> Iterator[None]:
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


class VolumeSealer:
    """Seals one task's volume into its bucket."""

    def __init__(self, store: TaskObjects, journal: UploadJournal, compression: Compression) -> None:
        """Send parts to `store`, with this compression; keep in `journal` what going on takes."""
        self._store = store
        self._journal = journal
        self._compression = compression

    def seal(self, volume: Volume, watch: TaskMonitor) -> SealedBundle:
        """Have every part in the bucket. Raises what reading the volume and storing the parts raise."""
        return self._go_on(volume, watch) or self._begin(volume, watch)

    def _go_on(self, volume: Volume, watch: TaskMonitor) -> SealedBundle | None:
        """Finish what a crash cut off; None if there is nothing, or the disk is another one now."""
        left = self._journal.left()
        if left is None:
            return None
        watch.tell(f"Sealing goes on after {left.first} parts; {_number_stored(left)} beyond them are stored.")
        try:
            return self._send(left, volume, watch)
        except ResumeError as reason:
            watch.tell(f"Sealing begins again with another key: {reason}.")
            return None

    def _begin(self, volume: Volume, watch: TaskMonitor) -> SealedBundle:
        """Start with another key, and names that no other sealing has used.

        A request of an earlier sealing that is still under way, in this process or in a proxy, hits none of its parts.
        """
        self._store.remove()  # parts of a sealing that cannot be resumed are of no use: their key is not used again
        self._store.check_place(watch)
        secrets, series = BundleKey.generate(), "" if self._store.is_unused(watch) else new_series()
        with failpoint("sealing begun"):
            self._journal.begin(secrets, series)
        return self._send(ResumeState(secrets, series), volume, watch)

    def _send(self, left: ResumeState, volume: Volume, watch: TaskMonitor) -> SealedBundle:
        sealing = Sealer(
            WatchedVolume(volume, watch.moved),
            self._store.name,
            secrets=left.secrets,
            compression=self._compression,
            cut_off=left.cut_off,
            series=left.series,
        )
        self._store.put_parts(sealing, left, watch)
        return sealing.sealed


def _number_stored(left: ResumeState) -> int:
    return sum(part.stored for part in left.sent.values())
