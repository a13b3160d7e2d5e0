"""The tar stream in chunks, for the first time or again.

The first reading hashes what it reads. A second one, after a sealing was cut off, begins at the checkpoint at once,
while a thread beside it reads and hashes all of the stream: that proves that the image is the one of the first time,
and makes the digest that the manifest needs. Nothing here compresses or keeps a byte.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from thrave.bundle.checkpoint import Checkpoint, StreamPoint
from thrave.bundle.crew import Channel, Crew, StoppedError
from thrave.bundle.deflate import CHUNK
from thrave.bundle.errors import ResumeError
from thrave.bundle.image import Image
from thrave.bundle.tar import Member
from thrave.bundle.tarstream import tar_stream
from thrave.bundle.zlibs import Library

_PIECE = CHUNK // 8  # stays in the processor's cache from reading to hashing


@dataclass(frozen=True)
class Chunk:
    """A stretch of the tar stream.

    Attributes:
        data: as read (in a pooled buffer), then deflated.
        size: bytes of the tar stream that it stands for.
        begin: where it begins.
        crc: CRC-32 of the stream up to and with this chunk.
    """

    data: memoryview = field(repr=False)
    size: int
    begin: StreamPoint
    crc: int


class Reading(Protocol):
    """One way through the tar stream."""

    def chunks(self, free: Channel[memoryview]) -> Iterator[Chunk]:
        """Read the stream in chunks into buffers of `CHUNK` bytes taken from `free`."""
        ...

    def check(self) -> None:
        """Raise ResumeError if the image was found not to be the one of the first time."""
        ...

    def digest(self) -> str:
        """Lower-case hex SHA-1 of the whole stream, once the last chunk has been taken.

        Raises:
            ResumeError: the image is not the one of the first time.
        """
        ...


class FirstReading:
    """Reads the stream from its beginning and hashes what it reads."""

    def __init__(self, image: Image, member: Member, library: Library) -> None:
        self._image, self._member, self._library = image, member, library
        self._sha1 = hashlib.sha1(usedforsecurity=False)

    def chunks(self, free: Channel[memoryview]) -> Iterator[Chunk]:
        """See `Reading`."""
        offset = crc = 0
        for buffer, size in tar_stream(self._image, self._member, free.get):
            begin = StreamPoint(offset, crc, offset, self._sha1.hexdigest())
            self._sha1.update(buffer[:size])
            crc = self._library.crc32(buffer[:size], crc)
            yield Chunk(buffer, size, begin, crc)
            offset += size

    def check(self) -> None:
        """See `Reading`: there was no other time."""

    def digest(self) -> str:
        """See `Reading`."""
        return self._sha1.hexdigest()


class SecondReading:
    """Reads the stream from a checkpoint on, and all of it once more beside that.

    If the image is another one now, it stops the crew at once: whoever waits for a part gets a StoppedError, and
    `check` says why.
    """

    def __init__(self, image: Image, member: Member, library: Library, checkpoint: Checkpoint, crew: Crew) -> None:
        self._image, self._member, self._library = image, member, library
        self._begin = checkpoint.chunk
        self._crew = crew
        self._changed = False
        self._proof = crew.ahead(self._prove(), 1)

    def chunks(self, free: Channel[memoryview]) -> Iterator[Chunk]:
        """See `Reading`."""
        begin = self._begin
        for buffer, size in tar_stream(self._image, self._member, free.get, begin.offset):
            crc = self._library.crc32(buffer[:size], begin.crc)
            yield Chunk(buffer, size, begin, crc)
            begin = StreamPoint(begin.offset + size, crc, begin.proven, begin.sha1)

    def check(self) -> None:
        """See `Reading`."""
        if self._changed:
            raise ResumeError("the image has changed since its sealing was cut off")

    def digest(self) -> str:
        """See `Reading`."""
        try:
            return next(self._proof)
        except StoppedError:
            self.check()
            raise

    def _prove(self) -> Iterator[str]:
        sha1, crc, offset = hashlib.sha1(usedforsecurity=False), 0, 0
        buffers: Channel[memoryview] = self._crew.channel(1)
        buffers.put(memoryview(bytearray(_PIECE)))
        for buffer, size in tar_stream(self._image, self._member, buffers.get):
            if not self._agrees(offset, crc, sha1.hexdigest()):
                self._changed = True
                self._crew.stop()
            sha1.update(buffer[:size])
            if self._begin.proven < self._begin.offset:  # else the SHA-1 says it all
                crc = self._library.crc32(buffer[:size], crc)
            offset += size
            buffers.put(buffer)
        yield sha1.hexdigest()

    def _agrees(self, offset: int, crc: int, sha1: str) -> bool:
        if offset == self._begin.proven:
            return sha1 == self._begin.sha1
        return offset != self._begin.offset or crc == self._begin.crc
