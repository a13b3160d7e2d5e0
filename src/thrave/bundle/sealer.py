"""The tar stream in chunks, for the first time or again.

The first reading hashes what it reads. A second one, after a sealing was cut off, begins at the checkpoint at once,
while a thread beside it reads and hashes all of the stream: that proves that the image is the one of the first time,
and makes the digest that the manifest needs. Nothing here compresses or keeps a byte.

Enciphers a stream and cuts the ciphertext into hashed parts.

The one strictly serial stage of sealing, since in CBC each block needs the one before. The ciphertext is written
straight into the part's own buffer and hashed while it is still in the processor's cache; it goes nowhere from here.

Seals an image: one pass from its extents to encrypted parts in memory.

``Sealer`` joins the stages: a thread reads the image as a tar stream and hashes it, a pool deflates chunks of it, a
thread enciphers them in order and cuts and hashes the parts. Nothing is written to a disk, and no more
than a few chunks and parts are in memory, whatever the size of the image.
"""

import hashlib
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from thrave.bundle.base import Image
from thrave.bundle.errors import ResumeError
from thrave.bundle.gzip_stream import (
    CHUNK,
    COMPRESSIONS,
    GZIP_HEADER,
    Codec,
    Compression,
    deflated,
    gzip_trailer,
    most_gzip,
)
from thrave.bundle.model import (
    CIPHER_BLOCK,
    PART_SIZE,
    BundleKey,
    Checkpoint,
    CutOff,
    Part,
    SealedBundle,
    StreamPosition,
    part_filename,
    part_width,
    validate_prefix,
)
from thrave.bundle.tar_writer import TarMember, data_extents, tar_stream
from thrave.pipeline import BoundedQueue, Pipeline, StoppedError

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
    begin: StreamPosition
    crc: int


class Reading(Protocol):
    """One way through the tar stream."""

    def chunks(self, free: BoundedQueue[memoryview]) -> Iterator[Chunk]:
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


class FullReader:
    """Reads the stream from its beginning and hashes what it reads."""

    def __init__(self, image: Image, member: TarMember, library: Codec) -> None:
        self._image, self._member, self._library = image, member, library
        self._sha1 = hashlib.sha1(usedforsecurity=False)

    def chunks(self, free: BoundedQueue[memoryview]) -> Iterator[Chunk]:
        """See `Reading`."""
        offset = crc = 0
        for buffer, size in tar_stream(self._image, self._member, free.get):
            begin = StreamPosition(offset, crc, offset, self._sha1.hexdigest())
            self._sha1.update(buffer[:size])
            crc = self._library.crc32(buffer[:size], crc)
            yield Chunk(buffer, size, begin, crc)
            offset += size

    def check(self) -> None:
        """See `Reading`: there was no other time."""

    def digest(self) -> str:
        """See `Reading`."""
        return self._sha1.hexdigest()


class ResumedReader:
    """Reads the stream from a checkpoint on, and all of it once more beside that.

    If the image is another one now, it stops the crew at once: whoever waits for a part gets a StoppedError, and
    `check` says why.
    """

    def __init__(self, image: Image, member: TarMember, library: Codec, checkpoint: Checkpoint, crew: Pipeline) -> None:
        self._image, self._member, self._library = image, member, library
        self._begin = checkpoint.chunk
        self._crew = crew
        self._changed = False
        self._proof = crew.ahead(self._prove(), 1)

    def chunks(self, free: BoundedQueue[memoryview]) -> Iterator[Chunk]:
        """See `Reading`."""
        begin = self._begin
        for buffer, size in tar_stream(self._image, self._member, free.get, begin.offset):
            crc = self._library.crc32(buffer[:size], begin.crc)
            yield Chunk(buffer, size, begin, crc)
            begin = StreamPosition(begin.offset + size, crc, begin.proven, begin.sha1)

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
        buffers: BoundedQueue[memoryview] = self._crew.channel(1)
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


class PartCutter:
    """AES-128-CBC with PKCS#7 padding over everything that is added, in parts of one size.

    Args:
        secrets: key and IV of this one stream.
        prefix: stem of the parts' names.
        width: digits of their numbers.
        part_size: bytes of each part but the last, a multiple of 16.
        first: number of the first part; the IV is then the last block of the one before.
        series: digits before the number; see ``names.new_series``.
    """

    def __init__(
        self, secrets: BundleKey, prefix: str, width: int, part_size: int, *, first: int = 0, series: str = ""
    ) -> None:
        self._encryptor = Cipher(algorithms.AES(secrets.key), modes.CBC(secrets.iv)).encryptor()
        self._prefix, self._width, self._part_size, self._series = prefix, width, part_size, series
        self._index = first
        self._taken = first * part_size
        self._begin_part()

    @property
    def taken(self) -> int:
        """Bytes of the stream that were added, those in the parts before the first one included."""
        return self._taken

    def add(self, data: bytes | memoryview) -> Iterator[Part]:
        """Encipher more of the stream; yield each part that it fills."""
        view = memoryview(data)
        while view:
            room = self._part_size - self._filled
            yield from self._encipher(view[:room])
            view = view[room:]

    def finish(self) -> Iterator[Part]:
        """Pad and encipher the rest; yield the last part. No part is ever empty: padding is at least one byte."""
        padding = CIPHER_BLOCK - self._taken % CIPHER_BLOCK
        yield from self._encipher(memoryview(bytes([padding]) * padding))
        if self._filled:
            yield self._cut()

    def _encipher(self, data: memoryview) -> Iterator[Part]:
        # The cipher holds back an incomplete block, so what fits as input fits as output, too.
        written = self._encryptor.update_into(data, self._buffer[self._filled :])
        fresh = self._buffer[self._filled : self._filled + written]
        self._sha1.update(fresh)
        self._sha256.update(fresh)
        self._taken += len(data)
        self._filled += written
        if self._filled == self._part_size:
            yield self._cut()

    def _cut(self) -> Part:
        part = Part(
            index=self._index,
            filename=part_filename(self._prefix, self._index, self._width, self._series),
            size=self._filled,
            sha1=self._sha1.hexdigest(),
            sha256=self._sha256.hexdigest(),
            data=self._buffer[: self._filled].toreadonly(),
        )
        self._index += 1
        self._begin_part()
        return part

    def _begin_part(self) -> None:
        # update_into asks for room for one block more than it writes.
        self._buffer = memoryview(bytearray(self._part_size + CIPHER_BLOCK))
        self._filled = 0
        self._sha1 = hashlib.sha1(usedforsecurity=False)
        self._sha256 = hashlib.sha256()


_CHUNKS_PER_WORKER = 4


class Sealer:
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
        secrets: BundleKey | None = None,
        compression: Compression = "fast",
        part_size: int = PART_SIZE,
        workers: int | None = None,
        cut_off: CutOff | None = None,
        series: str = "",
    ) -> None:
        if part_size <= 0 or part_size % CIPHER_BLOCK:
            raise ValueError("the part size must be a multiple of 16")
        self._image = image
        self._member = TarMember(validate_prefix(prefix), image.size, data_extents(image))
        self._secrets = secrets or BundleKey.generate()
        self._library = COMPRESSIONS[compression]
        self._part_size = part_size
        self._workers = workers or os.cpu_count() or 1
        self._crew = Pipeline(self._workers)
        self._cut_off = cut_off
        self._series = series
        self._done = cut_off.checkpoint.chunk.offset if cut_off else 0
        self._sealed: SealedBundle | None = None

    @property
    def data_size(self) -> int:
        """Bytes that have to be read: the volume without its holes."""
        return self._member.data_size

    @property
    def progress(self) -> float:
        """How much of the volume's data is sealed, 0 to 1, never less than before. Any thread may ask."""
        return self._done / self._member.length

    @property
    def sealed(self) -> SealedBundle:
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
        self._sealed = SealedBundle(self._member.name, self._member.size, digest, self._secrets, tuple(records))

    def cancel(self) -> None:
        """Have whoever waits in `parts` get a StoppedError at once, and every thread stop. Any thread may call this."""
        self._crew.stop()

    def _reading(self) -> Reading:
        if self._cut_off is None:
            return FullReader(self._image, self._member, self._library)
        return ResumedReader(self._image, self._member, self._library, self._cut_off.checkpoint, self._crew)

    def _stages(self, crew: Pipeline, reading: Reading) -> Iterator[Part]:
        ahead = _CHUNKS_PER_WORKER * self._workers
        free: BoundedQueue[memoryview] = crew.channel(ahead)
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

    def _encipher_and_cut(self, packed: Iterator[Chunk], free: BoundedQueue[memoryview]) -> Iterator[Part]:
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
