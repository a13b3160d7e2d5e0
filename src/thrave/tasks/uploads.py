"""Seals a volume and uploads its parts: resume after a crash, parallel uploads, order of the records.

After a crash, sealing resumes at the end of the unbroken run of stored parts. At most `UPLOAD_WINDOW *
upload_concurrency` parts after it are sealed again; those of them that are recorded as stored are not sent again. The
records are in `journal.py`; how one object is claimed, uploaded and verified is in `task_objects.py`.
"""

from contextlib import closing
from dataclasses import dataclass
from functools import partial

from thrave.bundle.errors import ResumeError
from thrave.bundle.gzip_stream import Compression
from thrave.bundle.model import BundleKey, Checkpoint, Part, SealedBundle, new_series
from thrave.bundle.sealer import Sealer
from thrave.pipeline import StoppedError
from thrave.tasks.failpoints import failpoint
from thrave.tasks.journal import ResumeState, StoredBatch, StoredObject, UploadJournal
from thrave.tasks.monitor import TaskMonitor
from thrave.tasks.store_calls import CallGroup
from thrave.tasks.task_objects import TaskObjects
from thrave.volumes.base import MonitoredVolume, Volume

UPLOAD_WINDOW = 4
"""The newest part may be `UPLOAD_WINDOW * upload_concurrency` parts ahead of the first part that is not stored. This
limits how many parts are sealed again after a crash, and how far other uploads may get ahead of a slow one."""


def upload_volume(
    volume: Volume, objects: TaskObjects, journal: UploadJournal, monitor: TaskMonitor, *, compression: Compression
) -> SealedBundle:
    """Seal a volume and upload its parts; resume an upload that a crash interrupted.

    An upload resumes with the same key at the end of the stored parts, if the volume is unchanged. Two checks prove
    this: the digest of all data before that point, and the digests of each later part that was sent. If the volume has
    changed, the upload restarts with another key: one key and IV never encrypt two states of a disk. It also restarts
    if the bucket has a complete bundle with parts of this sealing: no part of a complete bundle is overwritten.

    Raises:
        BucketError: The policy or the bucket refuses a part.
        TaskFailure: Another bundle is in the task's location, or the task has to stop.
        Exception: What reading the volume raises.
    """
    state = journal.resume_state()
    if state is not None and objects.can_resume(state.series, monitor):
        later = sum(part.stored for part in state.sent.values())  # stored parts after the first one that is not stored
        monitor.add_event(f"Sealing resumes after {state.first_part} parts; {later} later parts are already stored.")
        try:
            return PartUploader(volume, objects, journal, state, monitor, compression=compression).run()
        except ResumeError as error:
            monitor.add_event(f"Sealing restarts with another key: {error}.")
    # The key of a sealing that cannot be resumed is not used again, so its parts are useless.
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
    checkpoint only moves to the end of the unbroken run of stored parts. A stored part after that end is known by its
    record: after a crash the part is sealed again, but not sent again. No part may differ from a part that was sent
    with the same key.
    """

    def __init__(
        self,
        volume: Volume,
        objects: TaskObjects,
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
        self._unbroken_run = UnbrokenRun(state.first_part)
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
                            self._unbroken_run.add(part.index, part.checkpoint)
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
        while self._calls.pending >= limit or index >= self._unbroken_run.end + UPLOAD_WINDOW * limit:
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
        self._unbroken_run.add(uploaded.index, uploaded.checkpoint)

    def _take_unrecorded(self) -> StoredBatch:
        """Return what was stored since the last call."""
        batch = StoredBatch(self._unrecorded, self._unbroken_run.checkpoint)
        self._unrecorded, self._unbroken_run.checkpoint = [], None
        return batch


class UnbrokenRun:
    """The longest unbroken run of stored parts from the first part on.

    Attributes:
        end: The index of the first part that is not in it.
        checkpoint: The last checkpoint within it; None if there is none, or its owner has taken it.
    """

    def __init__(self, end: int) -> None:
        self.end = end
        self.checkpoint: Checkpoint | None = None
        self._after_end: dict[int, Checkpoint | None] = {}  # stored parts after the first part that is not stored

    def add(self, index: int, checkpoint: Checkpoint | None) -> None:
        """Add a stored part."""
        self._after_end[index] = checkpoint
        while self.end in self._after_end:
            self.checkpoint = self._after_end.pop(self.end) or self.checkpoint
            self.end += 1
