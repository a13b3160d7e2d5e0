"""Ends, from another thread, what reading a volume has started or locked while a read of it hangs.

A read that a disk does not answer cannot be interrupted. What would keep the machine from being started meanwhile can
be: the locks on the image, and the programs that have it open. Descriptors stay open until the read returns, since
their numbers must not be given to other files before.

The contract of a volume: a machine's disk as extents and bytes, whatever its file looks like.

The docstrings of the Protocol are the contract, and one suite (tests/volumes/test_contract.py) holds every driver to
it. A volume is only ever read. It does not know whose it is, nor whether the machine is off: who opens a volume has
made sure that nobody writes to it (compute: ``HypervisorDriver.hold``).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from thrave.concurrency import new_lock


class Interruption:
    """What an open volume would be in the way with; nothing at first. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._actions: list[Callable[[], object]] = []
        self.is_requested = False
        """Whether nobody waits for the volume any more."""

    def add(self, action: Callable[[], object]) -> None:
        """Have something done when the interruption is requested; at once if it was."""
        with self._lock:
            if not self.is_requested:
                self._actions.append(action)
                return
        action()

    def request(self) -> None:
        """Do what was added, the last first. May be called again."""
        with self._lock:
            self.is_requested = True
            actions, self._actions = self._actions, []
        while actions:
            actions.pop()()


class Extent(NamedTuple):
    """A run of data. Offset and length in bytes, from the volume's beginning."""

    offset: int
    length: int


class Volume(Protocol):
    """A disk that can be read while it is open. All drivers may be read from several threads at once."""

    @property
    def size(self) -> int:
        """The size of the disk as its guest sees it, in bytes: not of the file that holds it.

        It does not change while the volume is open. A format that counts in cylinders (vpc) may show a little more
        than was once put in; the rest is a hole.
        """

    def extents(self) -> Sequence[Extent]:
        """Where the data lies: ascending, none empty, none overlapping or touching another, all within `size`.

        What lies between them is a hole: it reads as zeros and need not be read. Data may be zeros too: a driver says
        what its metadata says and never reads the content to find out. May be asked for any number of times.

        Raises:
            VolumeError: The metadata cannot be read.
        """

    def will_read(self, offset: int, length: int) -> None:
        """Hear that these bytes will be read soon, so as to have them ready by then.

        It never waits and never raises; a driver that cannot do anything about it does nothing.
        """

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer with what stands from `offset` (bytes) on; holes are zeros.

        It returns with the buffer full or not at all. Reading beyond `size` is an error.

        Args:
            offset: Where in the volume to begin, in bytes; any number, not only multiples of a sector.
            buffer: One-dimensional, of bytes, writable; its length says how much is read.

        Raises:
            VolumeUnreadableError: With the file and the offset in bytes.
        """

    def close(self) -> None:
        """Let go of the file and of every helper process. May be said again; nothing else may be called after it."""


class WatchedVolume:
    """A volume whose every read is reported, so that a disk that does not answer is noticed.

    Args:
        inside: The volume; closing this one closes it.
        moved: Called after each read.
    """

    def __init__(self, inside: Volume, moved: Callable[[], None]) -> None:
        self._inside = inside
        self._moved = moved

    @property
    def size(self) -> int:
        """That of the volume inside, in bytes."""
        return self._inside.size

    def extents(self) -> Sequence[Extent]:
        """Those of the volume inside."""
        return self._inside.extents()

    def will_read(self, offset: int, length: int) -> None:
        """Tell the volume inside."""
        self._inside.will_read(offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read the volume inside."""
        self._inside.read_into(offset, buffer)
        self._moved()

    def close(self) -> None:
        """Close the volume inside."""
        self._inside.close()


def merge_extents(runs: Sequence[tuple[int, int]]) -> list[Extent]:
    """Turn ascending runs into extents: touching ones become one, empty ones vanish.

    Args:
        runs: (offset, length) in bytes, ascending and not overlapping.
    """
    extents: list[Extent] = []
    for offset, length in runs:
        if extents and extents[-1].offset + extents[-1].length == offset:
            extents[-1] = Extent(extents[-1].offset, extents[-1].length + length)
        elif length:
            extents.append(Extent(offset, length))
    return extents
