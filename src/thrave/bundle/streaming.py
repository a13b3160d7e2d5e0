"""The image that opening a bundle gives to a pipe, from which nothing can be taken back.

Every byte is released only after the digest of its part (and with a certificate the signature) is known to hold; what
is left for the end is the digest of the whole. So the last of the image is held back until that has been checked, too:
a stream that failed is always short, whoever reads it and whether or not the exit status is looked at.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from thrave.bundle.errors import OutputError

_ZEROS = bytes(1024 * 1024)


class ImageStream:
    """An image that is being written from its beginning to its end; holes are written as zeros."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._at = 0
        self._room = memoryview(bytearray())  # used over and over, as in `buffers.py`
        self._held_at, self._held = 0, self._room

    def write(self, offset: int, data: memoryview) -> None:
        """Hold data back, and write what was held back before."""
        self._release()
        if len(data) > len(self._room):
            self._room = memoryview(bytearray(len(data)))
        self._held_at, self._held = offset, self._room[: len(data)]
        self._held[:] = data

    def finish(self, size: int) -> None:
        """Write what was held back, and zeros up to the image's size (bytes)."""
        self._release()
        self._write_zeros(size)

    def _release(self) -> None:
        if self._held:
            self._write_zeros(self._held_at)
            self._write_all(self._held)

    def _write_zeros(self, end: int) -> None:
        while self._at < end:
            self._write_all(memoryview(_ZEROS)[: end - self._at])

    def _write_all(self, data: memoryview) -> None:
        while data:
            written = os.write(self._descriptor, data)
            self._at, data = self._at + written, data[written:]


@contextmanager
def image_stream(descriptor: int, size: int) -> Iterator[ImageStream]:
    """Give what writes an image of `size` bytes to an open pipe, socket or file; its end comes if the block ends well.

    Raises:
        OutputError: it cannot be written, or nobody reads it any more.
    """
    stream = ImageStream(descriptor)
    try:
        yield stream
        stream.finish(size)
    except OSError as error:
        raise OutputError(f"cannot write the image: {os.strerror(error.errno or 0)}") from error
