"""A stream that comes in pieces of any size, taken in the sizes that a format wants.

It knows no format and keeps no more than the piece in hand.
"""

from collections.abc import Iterable, Iterator

from thrave.bundle.errors import ContentError

_SKIPPED = 16 * 1024


class Pieces:
    """The stream.

    Args:
        pieces: its bytes in order; some of them may be empty.
        what: its name in error messages.
    """

    def __init__(self, pieces: Iterable[bytes | memoryview], what: str) -> None:
        self._pieces: Iterator[bytes | memoryview] = filter(None, pieces)
        self._what = what
        self._piece = memoryview(b"")
        self._at = 0

    def some(self, most: int) -> memoryview:
        """Return at most so many bytes, none only at the end of the stream."""
        if self.at_end:
            return self._piece[self._at :]
        taken = self._piece[self._at : self._at + most]
        self._at += len(taken)
        return taken

    def exactly(self, size: int) -> bytes:
        """Return just so many bytes.

        Raises:
            ContentError: the stream ends before.
        """
        found = bytearray()
        while len(found) < size:
            piece = self.some(size - len(found))
            if not piece:
                raise ContentError(f"the {self._what} ends early")
            found += piece
        return bytes(found)

    def skip_past(self, end: bytes, most: int) -> None:
        """Skip everything up to and including the first byte `end`.

        Args:
            end: One byte.
            most: Bytes that may stand before it.

        Raises:
            ContentError: The stream ends before, or more than `most` bytes precede it.
        """
        while piece := bytes(self.some(_SKIPPED)):
            at = piece.find(end)
            if at > most or (at < 0 and len(piece) > most):
                break
            if at >= 0:
                self._at -= len(piece) - at - 1
                return
            most -= len(piece)
        raise ContentError(f"the {self._what} ends early, or a text in it is too long")

    def put_back(self, data: bytes) -> None:
        """Give back the bytes that were taken last."""
        if len(data) <= self._at:
            self._at -= len(data)
        else:
            self._piece, self._at = memoryview(data + bytes(self._piece[self._at :])), 0

    @property
    def at_end(self) -> bool:
        """Whether nothing is left."""
        if self._at == len(self._piece):
            self._piece, self._at = memoryview(next(self._pieces, b"")), 0
        return not self._piece
