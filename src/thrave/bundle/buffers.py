"""A stream's bytes in memory that is used over and over.

What a library returns is new memory each time, and of every size. Kept for a while by other threads, such pieces
tear holes into the allocator's heap, which then grows with the length of the stream (glibc 2.36: from 130 to 210 MiB
over 8 GiB). Copied at once, they are freed where they were made, and what is kept is as large as it was at first.
"""

from collections.abc import Iterable, Iterator

from thrave.bundle.crew import Channel, Crew


class Buffers:
    """A fixed number of buffers, each with one piece of the stream.

    Args:
        crew: whose stages wait for them.
        count: how many; the stage that fills them waits while all are in use.
        size: bytes of each, as many as the largest piece has.
    """

    def __init__(self, crew: Crew, count: int, size: int) -> None:
        self._unused: Channel[memoryview] = crew.channel(count)
        for _ in range(count):
            self._unused.put(memoryview(bytearray(size)))

    def free(self) -> memoryview:
        """Wait for a buffer that nobody uses."""
        return self._unused.get()

    def filled(self, pieces: Iterable[bytes]) -> Iterator[memoryview]:
        """Copy the pieces into buffers, as many into each as it has room for; none is larger than a buffer."""
        buffer, used = self.free(), 0
        for piece in pieces:
            if used + len(piece) > len(buffer):
                yield buffer[:used]
                buffer, used = self.free(), 0
            buffer[used : used + len(piece)] = piece
            used += len(piece)
        yield buffer[:used]

    def freed(self, pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        """Hand on pieces, each of which is somebody else's memory as soon as the next is asked for."""
        for piece in pieces:
            yield piece
            self._unused.put(memoryview(piece.obj))
