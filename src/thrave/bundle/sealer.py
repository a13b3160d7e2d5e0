"""Seals an image: reads it once, and yields encrypted parts in memory.

`Sealer` joins three stages. A thread reads the image as a tar stream and hashes it. A pool compresses chunks of the
stream. Another thread encrypts them in order, and cuts and hashes the parts. Nothing is written to a disk, and memory
holds a few chunks and parts only, whatever the size of the image. The manifest is in `thrave.bundle.manifest`.
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
    deflate,
    gzip_trailer,
    max_gzip_size,
)
from thrave.bundle.model import (
    CIPHER_BLOCK,
    PART_SIZE,
    BundleKey,
    Checkpoint,
    Part,
    ResumePoint,
    SealedBundle,
    StreamPosition,
    part_filename,
    part_width,
    validate_prefix,
)
from thrave.bundle.tar_writer import TarMember, data_extents, tar_stream
from thrave.pipeline import BoundedQueue, Pipeline, StoppedError

_CHUNKS_PER_WORKER = 4
_PIECE = CHUNK // 8  # stays in the processor's cache between reading and hashing


class Sealer:
    """Makes one bundle.

    Args:
        image: Must not change while it is read.
        prefix: Name of the image, without a folder; every file name starts with it.
        bundle_key: Key and IV; new random ones by default.
        compression: "fast" is as fast as a disk; "small" makes a smaller bundle.
        part_size: Bytes of each part but the last, a multiple of 16.
        workers: Threads that compress; one per core by default.
        resume_point: Where an interrupted sealing of the same image resumes. Key, compression, part size and series
            must be the same as before.
        series: Digits before the numbers in the names of the parts; see `thrave.bundle.model.new_series`.

    Raises:
        NamingError: The prefix may not be used.
        ImageError: The image is empty, or its extents are wrong.
    """

    def __init__(
        self,
        image: Image,
        prefix: str,
        *,
        bundle_key: BundleKey | None = None,
        compression: Compression = "fast",
        part_size: int = PART_SIZE,
        workers: int | None = None,
        resume_point: ResumePoint | None = None,
        series: str = "",
    ) -> None:
        if part_size <= 0 or part_size % CIPHER_BLOCK:
            raise ValueError("the part size must be a multiple of 16")
        self._image = image
        self._member = TarMember(validate_prefix(prefix), image.size, data_extents(image))
        self._bundle_key = bundle_key or BundleKey.generate()
        self._codec = COMPRESSIONS[compression]
        self._part_size = part_size
        self._workers = workers or os.cpu_count() or 1
        self._pipeline = Pipeline(self._workers)
        self._resume_point = resume_point
        self._series = series
        self._done = resume_point.checkpoint.chunk.offset if resume_point else 0
        self._sealed: SealedBundle | None = None

    @property
    def data_size(self) -> int:
        """Bytes to read: the image without its holes."""
        return self._member.data_size

    @property
    def progress(self) -> float:
        """Share of the image's data that is sealed, 0 to 1; never decreases. Safe from any thread."""
        return self._done / self._member.length

    @property
    def sealed(self) -> SealedBundle:
        """The records of the bundle. Raises RuntimeError before the last part has been taken."""
        if self._sealed is None:
            raise RuntimeError("the image is not sealed before its last part has been taken")
        return self._sealed

    def parts(self) -> Generator[Part, None, None]:
        """Yield the parts in order, as fast as the caller takes them. Usable once.

        A resumed sealing yields the remaining parts only. Closing the generator stops every thread before it returns.
        An error of a stage, such as one of the image's ``read_into``, is raised here.

        Raises:
            ResumeError: The image or the compressor is not the same as before the interruption.
        """
        records = list(self._resume_point.parts) if self._resume_point else []
        with self._pipeline as pipeline:
            reader = self._open_reader()
            for part in self._run_stages(pipeline, reader):
                records.append(part.record)
                yield part
            digest = reader.digest()
        self._sealed = SealedBundle(self._member.name, self._member.size, digest, self._bundle_key, tuple(records))

    def cancel(self) -> None:
        """Stop every thread; a caller that waits in `parts` gets a StoppedError. Safe from any thread."""
        self._pipeline.stop()

    def _open_reader(self) -> "ChunkReader":
        if self._resume_point is None:
            return FullReader(self._image, self._member, self._codec)
        return ResumedReader(self._image, self._member, self._codec, self._resume_point.checkpoint, self._pipeline)

    def _run_stages(self, pipeline: Pipeline, reader: "ChunkReader") -> Iterator[Part]:
        count = _CHUNKS_PER_WORKER * self._workers
        buffers: BoundedQueue[memoryview] = pipeline.queue(count)
        try:
            for _ in range(count):
                # A chunk that does not compress grows: `_compress` needs the space behind it.
                buffers.put(memoryview(bytearray(max_gzip_size(CHUNK)))[:CHUNK])
            compressed = pipeline.map(self._compress, reader.chunks(buffers), count)
            yield from pipeline.prefetch(self._encrypt_and_cut(compressed, buffers), 1)
        except StoppedError:
            # The reader stops the pipeline if the image has changed: raise that error instead.
            reader.check_unchanged()
            raise

    def _compress(self, chunk: "Chunk") -> "Chunk":
        # Copied into the chunk's own buffer: keeping what a library returned would fragment the heap (see BufferPool).
        compressed = deflate(chunk.data[: chunk.size], self._codec)
        data = memoryview(chunk.data.obj)[: len(compressed)]
        data[:] = compressed
        return replace(chunk, data=data)

    def _encrypt_and_cut(self, compressed: Iterator["Chunk"], buffers: BoundedQueue[memoryview]) -> Iterator[Part]:
        cutter = self._open_cutter()
        checkpoint = self._resume_point.checkpoint if self._resume_point else None
        if checkpoint is None:
            yield from cutter.add(GZIP_HEADER)
        crc = 0
        for chunk in compressed:
            # Stored parts already hold the beginning of the first chunk after a checkpoint.
            remaining = checkpoint.remaining_bytes(chunk.data) if checkpoint else chunk.data
            yield from self._cut_chunk(chunk, remaining, cutter)
            checkpoint, crc = None, chunk.crc
            buffers.put(memoryview(chunk.data.obj)[:CHUNK])
        yield from cutter.add(gzip_trailer(crc, self._done))
        yield from cutter.finish()

    def _open_cutter(self) -> "PartCutter":
        width = part_width(max_gzip_size(self._member.length) + CIPHER_BLOCK, self._part_size)
        key, first = self._bundle_key, 0
        if self._resume_point is not None:
            first = self._resume_point.checkpoint.parts
            key = replace(key, iv=bytes.fromhex(self._resume_point.checkpoint.last_block))
        return PartCutter(key, self._member.name, width, self._part_size, first=first, series=self._series)

    def _cut_chunk(self, chunk: "Chunk", remaining: memoryview, cutter: "PartCutter") -> Iterator[Part]:
        start = cutter.bytes_added - (len(chunk.data) - len(remaining))
        for part in cutter.add(remaining):
            head = chunk.data[: (part.index + 1) * self._part_size - start]
            yield replace(part, checkpoint=Checkpoint.at_part_end(part.index + 1, part.data, chunk.begin, head))
        self._done += chunk.size


@dataclass(frozen=True)
class Chunk:
    """A section of the tar stream that is compressed independently.

    Attributes:
        data: As read (in a pooled buffer), then compressed.
        size: Bytes before compression.
        begin: Position of the first byte.
        crc: CRC-32 of the stream up to the end of the chunk.
    """

    data: memoryview = field(repr=False)
    size: int
    begin: StreamPosition
    crc: int


class ChunkReader(Protocol):
    """Reads the tar stream once."""

    def chunks(self, buffers: BoundedQueue[memoryview]) -> Iterator[Chunk]:
        """Read the stream in chunks, into buffers of `CHUNK` bytes taken from `buffers`."""
        ...

    def check_unchanged(self) -> None:
        """Raise ResumeError if the image differs from the one of the first run."""
        ...

    def digest(self) -> str:
        """Return the SHA-1 of the whole stream in lower-case hex, after the last chunk has been taken.

        Raises:
            ResumeError: The image differs from the one of the first run.
        """
        ...


class FullReader:
    """Reads the stream from its beginning and hashes it."""

    def __init__(self, image: Image, member: TarMember, codec: Codec) -> None:
        self._image, self._member, self._codec = image, member, codec
        self._sha1 = hashlib.sha1(usedforsecurity=False)

    def chunks(self, buffers: BoundedQueue[memoryview]) -> Iterator[Chunk]:
        """See `ChunkReader`."""
        offset = crc = 0
        for buffer, size in tar_stream(self._image, self._member, buffers.get):
            begin = StreamPosition(offset, crc, offset, self._sha1.hexdigest())
            self._sha1.update(buffer[:size])
            crc = self._codec.crc32(buffer[:size], crc)
            yield Chunk(buffer, size, begin, crc)
            offset += size

    def check_unchanged(self) -> None:
        """See `ChunkReader`: there was no earlier run."""

    def digest(self) -> str:
        """See `ChunkReader`."""
        return self._sha1.hexdigest()


class ResumedReader:
    """Reads the stream from a checkpoint, and in another thread the whole stream to hash it.

    The second pass proves that the image is the same as in the first run, and computes the digest for the manifest. If
    the image has changed, the pass stops the pipeline at once: the consumer gets a StoppedError, and `check_unchanged`
    raises the reason.
    """

    def __init__(
        self, image: Image, member: TarMember, codec: Codec, checkpoint: Checkpoint, pipeline: Pipeline
    ) -> None:
        self._image, self._member, self._codec = image, member, codec
        self._begin = checkpoint.chunk
        self._pipeline = pipeline
        self._changed = False
        self._digest = pipeline.prefetch(self._hash_stream(), 1)

    def chunks(self, buffers: BoundedQueue[memoryview]) -> Iterator[Chunk]:
        """See `ChunkReader`."""
        begin = self._begin
        for buffer, size in tar_stream(self._image, self._member, buffers.get, begin.offset):
            crc = self._codec.crc32(buffer[:size], begin.crc)
            yield Chunk(buffer, size, begin, crc)
            begin = StreamPosition(begin.offset + size, crc, begin.hashed_size, begin.sha1)

    def check_unchanged(self) -> None:
        """See `ChunkReader`."""
        if self._changed:
            raise ResumeError("cannot resume: the image has changed since sealing was interrupted")

    def digest(self) -> str:
        """See `ChunkReader`."""
        try:
            return next(self._digest)
        except StoppedError:
            self.check_unchanged()
            raise

    def _hash_stream(self) -> Iterator[str]:
        sha1, crc, offset = hashlib.sha1(usedforsecurity=False), 0, 0
        buffers: BoundedQueue[memoryview] = self._pipeline.queue(1)
        buffers.put(memoryview(bytearray(_PIECE)))
        for buffer, size in tar_stream(self._image, self._member, buffers.get):
            if not self._matches(offset, crc, sha1.hexdigest()):
                self._changed = True
                self._pipeline.stop()
            sha1.update(buffer[:size])
            # The CRC is needed only if the known SHA-1 does not cover all bytes before the checkpoint.
            if self._begin.hashed_size < self._begin.offset:
                crc = self._codec.crc32(buffer[:size], crc)
            offset += size
            buffers.put(buffer)
        yield sha1.hexdigest()

    def _matches(self, offset: int, crc: int, sha1: str) -> bool:
        if offset == self._begin.hashed_size:
            return sha1 == self._begin.sha1
        return offset != self._begin.offset or crc == self._begin.crc


class PartCutter:
    """Encrypts a stream with AES-128-CBC and PKCS#7 padding, and cuts it into hashed parts of one size.

    This is the only serial stage of sealing, since each CBC block needs the one before. The ciphertext is written
    directly into the part's buffer, and hashed while it is still in the processor's cache.

    Args:
        key: Key and IV of this one stream.
        prefix: First part of the names of the parts.
        width: Digits of the part numbers.
        part_size: Bytes of each part but the last, a multiple of 16.
        first: Number of the first part. If not 0, the IV is the last block of the part before.
        series: Digits before the number; see `thrave.bundle.model.new_series`.
    """

    def __init__(
        self, key: BundleKey, prefix: str, width: int, part_size: int, *, first: int = 0, series: str = ""
    ) -> None:
        self._encryptor = Cipher(algorithms.AES(key.key), modes.CBC(key.iv)).encryptor()
        self._prefix, self._width, self._part_size, self._series = prefix, width, part_size, series
        self._index = first
        self._bytes_added = first * part_size
        self._begin_part()

    @property
    def bytes_added(self) -> int:
        """Bytes of the stream added so far, including those in the parts before the first one."""
        return self._bytes_added

    def add(self, data: bytes | memoryview) -> Iterator[Part]:
        """Encrypt more of the stream; yield each part that becomes full."""
        view = memoryview(data)
        while view:
            space = self._part_size - self._filled
            yield from self._encrypt(view[:space])
            view = view[space:]

    def finish(self) -> Iterator[Part]:
        """Add the padding and yield the last part. No part is empty, since the padding has at least one byte."""
        padding = CIPHER_BLOCK - self._bytes_added % CIPHER_BLOCK
        yield from self._encrypt(memoryview(bytes([padding]) * padding))
        if self._filled:
            yield self._cut()

    def _encrypt(self, data: memoryview) -> Iterator[Part]:
        # The cipher holds an incomplete block back, so data that fits as input also fits as output.
        written = self._encryptor.update_into(data, self._buffer[self._filled :])
        ciphertext = self._buffer[self._filled : self._filled + written]
        self._sha1.update(ciphertext)
        self._sha256.update(ciphertext)
        self._bytes_added += len(data)
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
        # update_into requires space for one block more than it writes.
        self._buffer = memoryview(bytearray(self._part_size + CIPHER_BLOCK))
        self._filled = 0
        self._sha1 = hashlib.sha1(usedforsecurity=False)
        self._sha256 = hashlib.sha256()
