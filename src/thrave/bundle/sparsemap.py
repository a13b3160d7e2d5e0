"""The map of a sparse tar member: which bytes of the file the archive holds, in whatever format that is written.

Each extent is checked when it is read, so a map that is wrong is refused at the first wrong entry.
"""

from array import array
from collections.abc import Iterable, Iterator

from thrave.bundle.errors import ContentError
from thrave.bundle.tar import BLOCK

MOST_EXTENTS = 1 << 22
"""In memory they have 16 bytes each. An image of 10 GiB, the most that ec2-ami-tools takes, can have 1.3 million."""

_MOST_EMPTY = 16  # GNU tar and bsdtar write one, at the end of the file


class SparseMap:
    """Extents of data in ascending order.

    Args:
        size: Bytes of the file, holes included.

    Attributes:
        size: The same.
        data_size: Bytes of all extents together.
        entries: Extents that were read, empty ones included.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.data_size = 0
        self.entries = 0
        self._flat = array("Q")
        self._end = 0
        self._empty = 0

    def extend(self, numbers: Iterable[int]) -> None:
        """Add extents, given as offset and length by turns, in bytes.

        An empty extent is not kept.

        Raises:
            ContentError: One overlaps or precedes the one before it, or ends beyond the file; a length is not a whole
                number of blocks, though the file does not end there; there are too many extents, or too many empty
                ones.
        """
        turns = iter(numbers)
        for offset, length in zip(turns, turns, strict=True):
            end = offset + length
            # GNU tar begins each extent on a block of its own, other readers do not: only the file's end may be odd.
            if offset < self._end or end > self.size or (length % BLOCK and end != self.size):
                raise ContentError(f"the tar member's map is wrong at offset {offset}")
            self.entries += 1
            if not length:
                self._empty += 1
            else:
                self._flat.append(offset)
                self._flat.append(length)
                self._end = end
                self.data_size += length
            if self._empty > _MOST_EMPTY or self.entries > MOST_EXTENTS:
                raise ContentError(f"the tar member's map has more than {self.entries - 1} extents, or empty ones")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield offset and length of each extent."""
        numbers = iter(self._flat)
        return zip(numbers, numbers, strict=True)
