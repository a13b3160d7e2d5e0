"""What is bundled: anything with a size, extents and bytes.

A volume of ``thrave.volumes`` fits this protocol without either room knowing the other. Nothing here reads data;
it only looks at the extents with the distrust that a tar header needs.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from thrave.bundle.errors import ImageError

SECTOR = 512
MOST_EXTENTS = 1 << 20
"""More than these are merged across their smallest holes: the map is all that sealing keeps in memory of an image."""

Span = tuple[int, int]
"""Offset and length in bytes."""


class Image(Protocol):
    """A disk image that nobody writes while it is being read."""

    @property
    def size(self) -> int:
        """Apparent size in bytes."""
        ...

    def extents(self) -> Sequence[Span]:
        """Return (offset, length) of the data in bytes: ascending, not overlapping, within the size."""
        ...

    def will_read(self, offset: int, length: int) -> None:
        """Hear what is read soon, to have it ready by then; never waits, never raises."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer from the offset on, or raise."""
        ...


def data_extents(image: Image, most: int = MOST_EXTENTS) -> list[Span]:
    """Return the image's extents widened to whole sectors, merged where they touch, at most ``most`` of them.

    A sparse tar member can only describe whole blocks, except at the end of the file.

    Raises:
        ImageError: the image is empty, or its extents are unordered, overlap or leave it.
    """
    if image.size <= 0:
        raise ImageError("the image is empty")
    extents = image.extents()
    grain = SECTOR
    found = list(_merged(extents, image.size, grain))
    while len(found) > most:
        grain *= 2
        found = list(_merged(found, image.size, grain))
    return found


def _merged(extents: Sequence[Span], size: int, grain: int) -> Iterator[Span]:
    start = end = last = 0
    for offset, length in extents:
        if offset < last or length <= 0 or offset + length > size:
            raise ImageError(f"the extent of {length} bytes at {offset} does not fit an image of {size} bytes")
        last = offset + length
        first, beyond = offset // grain * grain, min(-(-last // grain) * grain, size)
        if first > end or start == end:
            if start < end:
                yield start, end - start
            start = first
        end = beyond
    if start < end:
        yield start, end - start
