"""The contract of a volume: the disk of a machine as extents and bytes, whatever the format of its file.

The docstrings of the Protocol are the contract; tests/volumes/test_volume_contract.py runs on every driver. A volume is
only read. It has no owner, and it does not check that the machine is off: the caller must make sure that nothing
writes to the disk (`compute`: `HypervisorDriver.hold_stopped`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from thrave.concurrency import new_lock


class Interruption:
    """Releases what an open volume holds, from another thread, while a read of the volume hangs. Thread-safe.

    A read that the disk does not answer cannot be interrupted. But what would keep the machine from starting can be
    released: the locks on the image, and the programs that have it open. File descriptors stay open until the read
    returns; otherwise another file could get their numbers while the read still uses them.
    """

    def __init__(self) -> None:
        self._lock = new_lock()
        self._actions: list[Callable[[], object]] = []
        self.is_requested = False
        """Whether the volume is no longer needed."""

    def add(self, action: Callable[[], object]) -> None:
        """Register an action for `request`. Runs it at once if the interruption was requested already."""
        with self._lock:
            if not self.is_requested:
                self._actions.append(action)
                return
        action()

    def request(self) -> None:
        """Run the registered actions, the last one first. May be called again."""
        with self._lock:
            self.is_requested = True
            actions, self._actions = self._actions, []
        while actions:
            actions.pop()()


class Extent(NamedTuple):
    """A range of data. Offset and length in bytes, counted from the beginning of the volume."""

    offset: int
    length: int


class Volume(Protocol):
    """A disk that can be read while it is open. Every driver can be read from several threads at once."""

    @property
    def size(self) -> int:
        """Size of the disk as its guest sees it, in bytes; not the size of the file.

        Does not change while the volume is open. A format that counts in cylinders (vpc) may show a little more than
        was written to it; the rest is a hole.
        """

    def extents(self) -> Sequence[Extent]:
        """Return where the data is. May be called any number of times.

        Between two extents is a hole: it reads as zeros and need not be read. An extent may contain zeros: a driver
        reports its metadata and never reads the content to find zeros.

        Returns:
            Extents in ascending order, within `size`. None is empty; none overlaps or touches another.

        Raises:
            VolumeError: The metadata cannot be read.
        """

    def prefetch(self, offset: int, length: int) -> None:
        """Announce that these bytes will be read soon, so that the driver can load them. In bytes.

        Never waits and never raises. A driver that cannot prefetch does nothing.
        """

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer with the content from `offset` on; holes are zeros.

        Args:
            offset: In bytes; need not be a multiple of a sector.
            buffer: One-dimensional, of bytes, writable; its length is the number of bytes to read. Its content is
                undefined after an error.

        Raises:
            VolumeUnreadableError: With the file and the offset in bytes. Also for a read beyond `size`.
        """

    def close(self) -> None:
        """Close the file and stop every helper process. May be called again; call no other method afterwards."""


class MonitoredVolume:
    """A volume that reports each finished read, so that a disk that does not answer is detected.

    Args:
        inside: The volume; it is closed together with this one.
        on_read: Called after each read.
    """

    def __init__(self, inside: Volume, on_read: Callable[[], None]) -> None:
        self._inside = inside
        self._on_read = on_read
        self.extents = inside.extents
        self.prefetch = inside.prefetch
        self.close = inside.close

    @property
    def size(self) -> int:
        """Size of the volume inside, in bytes."""
        return self._inside.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read the volume inside, then report it."""
        self._inside.read_into(offset, buffer)
        self._on_read()


def merge_extents(runs: Sequence[tuple[int, int]]) -> list[Extent]:
    """Turn runs into extents: join runs that touch, drop empty ones.

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
