"""Seals an image: one pass from its extents to encrypted parts in memory.

``Sealing`` joins the stages: a thread reads the image as a tar stream and hashes it, a pool deflates chunks of it, a
thread enciphers them in order and cuts and hashes the parts. Nothing is written to a disk, and no more
than a few chunks and parts are in memory, whatever the size of the image.
"""

import os
from collections.abc import Generator, Iterator
from dataclasses import replace

from thrave.bundle.checkpoint import Checkpoint
from thrave.bundle.chunks import Chunk, FirstReading, Reading, SecondReading
from thrave.bundle.crew import Channel, Crew, StoppedError
from thrave.bundle.cutting import CIPHER_BLOCK, PartCutter
from thrave.bundle.deflate import CHUNK, GZIP_HEADER, deflated, gzip_trailer, most_gzip
from thrave.bundle.image import Image, data_extents
from thrave.bundle.names import PART_SIZE, checked_prefix, part_width
from thrave.bundle.sealed import CutOff, Part, Sealed
from thrave.bundle.secrets import BundleSecrets
from thrave.bundle.tar import Member
from thrave.bundle.zlibs import COMPRESSIONS, Compression

_CHUNKS_PER_WORKER = 4


class Sealing:
    """One bundle in the making.

    Args:
        image: what is sealed; it must not change meanwhile.
        prefix: a bare name: the image's, and the stem of every file's.
        secrets: key and IV; new ones unless given.
        compression: at the speed of the disk, or smaller.
        part_size: bytes of each part but the last, a multiple of 16.
        workers: deflating threads; one a core unless given.
        cut_off: resumes where a sealing of the same image was cut off. Secrets, compression, part size and series
            must be the same.
        series: digits in the names of the parts, before their numbers; see ``names.new_series``.

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
        compression: Compression = "fast",
        part_size: int = PART_SIZE,
        workers: int | None = None,
        cut_off: CutOff | None = None,
        series: str = "",
    ) -> None:
        if part_size <= 0 or part_size % CIPHER_BLOCK:
            raise ValueError("the part size must be a multiple of 16")
        self._image = image
        self._member = Member(checked_prefix(prefix), image.size, data_extents(image))
        self._secrets = secrets or BundleSecrets.generate()
        self._library = COMPRESSIONS[compression]
        self._part_size = part_size
        self._workers = workers or os.cpu_count() or 1
        self._crew = Crew(self._workers)
        self._cut_off = cut_off
        self._series = series
        self._done = cut_off.checkpoint.chunk.offset if cut_off else 0
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
        """Yield the parts in order, as fast as they are taken; only the new ones, if it was cut off. Can be used once.

        Closing the generator stops every thread before it returns. What a stage raises (an error of the image's
        ``read_into``, say) is raised here.

        Raises:
            ResumeError: it was cut off, and the image or the compressor is another one now.
        """
        records = list(self._cut_off.parts) if self._cut_off else []
        with self._crew as crew:
            reading = self._reading()
            for part in self._stages(crew, reading):
                records.append(part.record)
                yield part
            digest = reading.digest()
        self._sealed = Sealed(self._member.name, self._member.size, digest, self._secrets, tuple(records))

    def cancel(self) -> None:
        """Have whoever waits in `parts` get a StoppedError at once, and every thread stop. Any thread may call this."""
        self._crew.stop()

    def _reading(self) -> Reading:
        if self._cut_off is None:
            return FirstReading(self._image, self._member, self._library)
        return SecondReading(self._image, self._member, self._library, self._cut_off.checkpoint, self._crew)

    def _stages(self, crew: Crew, reading: Reading) -> Iterator[Part]:
        ahead = _CHUNKS_PER_WORKER * self._workers
        free: Channel[memoryview] = crew.channel(ahead)
        try:
            for _ in range(ahead):
                free.put(memoryview(bytearray(most_gzip(CHUNK)))[:CHUNK])
            packed = crew.map(self._pack, reading.chunks(free), ahead)
            yield from crew.ahead(self._encipher_and_cut(packed, free), 1)
        except StoppedError:
            reading.check()
            raise

    def _pack(self, chunk: Chunk) -> Chunk:
        """Deflate a chunk into its own buffer: what a library returns, kept for a while, would tear the heap."""
        packed = deflated(chunk.data[: chunk.size], self._library)
        data = memoryview(chunk.data.obj)[: len(packed)]
        data[:] = packed
        return replace(chunk, data=data)

    def _encipher_and_cut(self, packed: Iterator[Chunk], free: Channel[memoryview]) -> Iterator[Part]:
        cutter = self._cutter()
        checkpoint = self._cut_off.checkpoint if self._cut_off else None
        if checkpoint is None:
            yield from cutter.add(GZIP_HEADER)
        crc = 0
        for chunk in packed:
            rest = checkpoint.rest_of(chunk.data) if checkpoint else chunk.data
            yield from self._cut(chunk, rest, cutter)
            checkpoint, crc = None, chunk.crc
            free.put(memoryview(chunk.data.obj)[:CHUNK])
        yield from cutter.add(gzip_trailer(crc, self._done))
        yield from cutter.finish()

    def _cutter(self) -> PartCutter:
        width = part_width(most_gzip(self._member.length) + CIPHER_BLOCK, self._part_size)
        secrets, first = self._secrets, 0
        if self._cut_off is not None:
            first = self._cut_off.checkpoint.parts
            secrets = replace(secrets, iv=bytes.fromhex(self._cut_off.checkpoint.last_block))
        return PartCutter(secrets, self._member.name, width, self._part_size, first=first, series=self._series)

    def _cut(self, chunk: Chunk, rest: memoryview, cutter: PartCutter) -> Iterator[Part]:
        begin = cutter.taken - (len(chunk.data) - len(rest))
        for part in cutter.add(rest):
            begun = chunk.data[: (part.index + 1) * self._part_size - begin]
            yield replace(part, checkpoint=Checkpoint.at(part.index + 1, part.data, chunk.begin, begun))
        self._done += chunk.size
