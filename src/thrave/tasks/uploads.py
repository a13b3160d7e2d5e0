"""The parts of one sealing on their way into the bucket: sent several at once, back in any order.

One transaction a part says both: what has come back is stored, and the next is about to be sent. The checkpoint moves
on only to the end of the longest unbroken run of stored parts. A part beyond that run is known by its record: sealed
again after a crash, but not sent again. So a crash costs the parts in flight, and a second sealing of a few more.

No part may differ from one that was sent before with the same key: that would be another disk.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from thrave.bundle.errors import ResumeError
from thrave.bundle.model import Checkpoint, Part, PartRecord
from thrave.bundle.sealer import Sealer
from thrave.tasks.calls import Calls
from thrave.tasks.crash_points import durable
from thrave.tasks.journal import Journal, Left, Stored, StoredObject

WINDOW = 4
"""Times `at_once`: how far the newest part may be beyond the first that is not stored. It is what a crash can make
sealing do again, and how much slower than the others one upload may be before they wait for it."""


@dataclass(frozen=True)
class Arrived:
    """A part that is in the bucket."""

    index: int
    stored: StoredObject
    checkpoint: Checkpoint | None


class PartUploads:
    """The uploads of one sealing's parts."""

    def __init__(
        self,
        calls: Calls[Arrived],
        journal: Journal,
        left: Left,
        upload: Callable[[str, memoryview], StoredObject],
        *,
        sending: Callable[[str, PartRecord, Stored], None],
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
            sending: As `Journal.sending`.
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
        self._run = _Run(left.first)
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
        with durable("part sealed"):
            self._sending(key, part.record, self._news())
        self._calls.begin(partial(self._sent_part, key, part))

    def _sent_part(self, key: str, part: Part) -> Arrived:
        with durable("part stored"):
            stored = self._upload(key, part.data)
        return Arrived(part.index, stored, part.checkpoint)

    def _make_room(self, index: int) -> None:
        self._collect(wait=False)
        while self._calls.pending >= self._at_once or index >= self._run.end + WINDOW * self._at_once:
            self._write_down()
            self._collect()

    def _write_down(self) -> None:
        if self._arrived:
            with durable("part recorded"):
                self._journal.stored(self._news())

    def _collect(self, *, wait: bool = True) -> None:
        for arrived in self._calls.results(wait=wait):
            self._take(arrived)

    def _take(self, arrived: Arrived) -> None:
        self._moved()
        self._arrived.append(arrived.stored)
        self._run.add(arrived.index, arrived.checkpoint)

    def _news(self) -> Stored:
        """What has come back since the last time."""
        news = Stored(self._arrived, self._run.checkpoint)
        self._arrived, self._run.checkpoint = [], None
        return news


class _Run:
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
