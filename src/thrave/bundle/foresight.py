"""Reads an image's data in order, and has it say ahead of time what is read next.

A kernel's own read-ahead guesses: over an image of many extents it reads the holes between them as well. Whoever reads
by the map of a member knows better.
"""

from collections.abc import Iterable, Iterator

from thrave.bundle.image import Image, Span

_WINDOW = 8 * 1024 * 1024  # bytes; keeps a disk busy while one piece is hashed
_PIECE = 1024 * 1024


class ForesightedReader:
    """Reads an image's extents from the first to the last; what stands before the first read is left out.

    Args:
        image: what is read.
        extents: in the order in which they are read.
    """

    def __init__(self, image: Image, extents: Iterable[Span]) -> None:
        self._image = image
        self._pieces = _pieces(extents)
        self._ahead = 0  # bytes that were announced and not read yet

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with what the image has from an offset on."""
        self._ahead = max(0, self._ahead - len(buffer))
        self._announce(offset + len(buffer))
        self._image.read_into(offset, buffer)

    def _announce(self, end: int) -> None:
        while self._ahead < _WINDOW and (piece := next(self._pieces, None)):
            offset, length = piece
            if offset + length > end:
                self._image.will_read(offset, length)
                self._ahead += length


def _pieces(extents: Iterable[Span]) -> Iterator[Span]:
    for offset, length in extents:
        for start in range(offset, offset + length, _PIECE):
            yield start, min(_PIECE, offset + length - start)
