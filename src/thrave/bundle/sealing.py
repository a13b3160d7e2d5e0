"""Seals an image: one pass from its extents to encrypted parts in memory.

``Sealing.parts`` joins the stages: a thread reads the image as a tar stream and hashes it, a pool deflates chunks
of it, a thread enciphers them in order and cuts and hashes the parts. Nothing is written to a disk, and no more
than a few chunks and parts are in memory, whatever the size of the image.
"""

import hashlib
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from thrave.bundle.crew import Channel, Crew
from thrave.bundle.cutting import CIPHER_BLOCK, PartCutter
from thrave.bundle.deflate import CHUNK, GZIP_HEADER, deflated, gzip_trailer, most_gzip
from thrave.bundle.image import Image, data_extents
from thrave.bundle.names import PART_SIZE, checked_prefix, part_width
from thrave.bundle.sealed import Part, Sealed
from thrave.bundle.secrets import BundleSecrets
from thrave.bundle.tar import Member
from thrave.bundle.tarstream import tar_stream
from thrave.bundle.zlibs import LEVELS, Level

_CHUNKS_PER_WORKER = 4


@dataclass(frozen=True)
class _Chunk:
    """A stretch of the tar stream.

    Attributes:
        data: as read (in a pooled buffer), then deflated.
        size: bytes of the tar stream that it stands for.
        crc: CRC-32 of the stream up to and with this chunk.
    """

    data: memoryview | bytes = field(repr=False)
    size: int
    crc: int


class Sealing:
    """One bundle in the making.

    Args:
        image: what is sealed; it must not change meanwhile.
        prefix: a bare name: the image's, and the stem of every file's.
        secrets: key and IV; new ones unless given.
        level: how hard to compress.
        part_size: bytes of each part but the last, a multiple of 16.
        workers: deflating threads; one a core unless given.

    Raises:
        NamingError: the prefix may not be used.
        ImageError: the image is empty or its extents are wrong.
    """

    def __init__(
        self,
        image: Image,
        prefix: str,
        *,
        secrets: BundleSecrets | None = None,
        level: Level = "fast",
        part_size: int = PART_SIZE,
        workers: int | None = None,
    ) -> None:
        if part_size <= 0 or part_size % CIPHER_BLOCK:
            raise ValueError("the part size must be a multiple of 16")
        self._image = image
        self._member = Member(checked_prefix(prefix), image.size, data_extents(image))
        self._secrets = secrets or BundleSecrets.generate()
        self._library = LEVELS[level]
        self._part_size = part_size
        self._workers = workers or os.cpu_count() or 1
        self._crew = Crew(self._workers)
        self._tar_sha1 = hashlib.sha1(usedforsecurity=False)
        self._done = 0
        self._sealed: Sealed | None = None

    @property
    def data_size(self) -> int:
        """Bytes that have to be read: the volume without its holes."""
        return self._member.data_size

    @property
    def progress(self) -> float:
        """How much of the volume's data is sealed, 0 to 1, never less than before. Any thread may ask."""
        return self._done / self._member.length

    @property
    def sealed(self) -> Sealed:
        """The bundle's records, once the last part has been taken; a RuntimeError before."""
        if self._sealed is None:
            raise RuntimeError("the image is not sealed before its last part has been taken")
        return self._sealed

    def parts(self) -> Generator[Part, None, None]:
        """Yield the parts in order, as fast as they are taken. Can be used once.

        Closing the generator stops every thread before it returns. What a stage raises (an error of the image's
        ``read_into``, say) is raised here.
        """
        records = []
        ahead = _CHUNKS_PER_WORKER * self._workers
        with self._crew as crew:
            free: Channel[memoryview] = crew.channel(ahead)
            for _ in range(ahead):
                free.put(memoryview(bytearray(CHUNK)))
            packed = crew.map(lambda chunk: self._pack(chunk, free), self._read_and_hash(free), ahead)
            for part in crew.ahead(self._encipher_and_cut(packed), 1):
                records.append(part.record)
                yield part
        digest = self._tar_sha1.hexdigest()
        self._sealed = Sealed(self._member.name, self._member.size, digest, self._secrets, tuple(records))

    def cancel(self) -> None:
        """Have whoever waits in `parts` get a StoppedError at once, and every thread stop. Any thread may call this."""
        self._crew.stop()

    def _read_and_hash(self, free: Channel[memoryview]) -> Iterator[_Chunk]:
        crc = 0
        for buffer, size in tar_stream(self._image, self._member, free.get):
            self._tar_sha1.update(buffer[:size])
            crc = self._library.crc32(buffer[:size], crc)
            yield _Chunk(buffer, size, crc)

    def _pack(self, chunk: _Chunk, free: Channel[memoryview]) -> _Chunk:
        buffer = memoryview(chunk.data)
        packed = deflated(buffer[: chunk.size], self._library)
        free.put(buffer)
        return _Chunk(packed, chunk.size, chunk.crc)

    def _encipher_and_cut(self, packed: Iterator[_Chunk]) -> Iterator[Part]:
        width = part_width(most_gzip(self._member.length) + CIPHER_BLOCK, self._part_size)
        cutter = PartCutter(self._secrets, self._member.name, width, self._part_size)
        yield from cutter.add(GZIP_HEADER)
        crc = 0
        for chunk in packed:
            yield from cutter.add(chunk.data)
            self._done += chunk.size
            crc = chunk.crc
        yield from cutter.add(gzip_trailer(crc, self._done))
        yield from cutter.finish()
