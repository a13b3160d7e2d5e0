"""What is bundled: anything with a size, extents and bytes.

A volume of ``thrave.volumes`` fits this protocol without either room knowing the other. Nothing here reads data;
it only looks at the extents with the distrust that a tar header needs.

Reads an image's data in order, and has it say ahead of time what is read next.

A kernel's own read-ahead guesses: over an image of many extents it reads the holes between them as well. Whoever reads
by the map of a member knows better.

The tar member that a bundle carries, as GNU tar 1.34 writes it.

``tar -cS --owner=root:0 --group=root:0 --mode=0644 --mtime=@0`` is the model, byte for byte: a plain ustar member
with GNU magic, or an old-GNU sparse one (type ``S``) where the image has holes, which is what ec2-ami-tools makes.
This module knows the numbers and the blocks; it never reads an image.

Reads an image as the tar stream that a bundle carries, into pooled buffers.

The only place where sealing touches the volume. What is a hole costs nothing; nothing is kept between buffers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from thrave.bundle.base import Image, Span
from thrave.bundle.errors import ImageError

SECTOR = 512


MAX_EXTENTS = 1 << 20
"""More than these are merged across their smallest holes: the map is all that sealing keeps in memory of an image."""


def data_extents(image: Image, most: int = MAX_EXTENTS) -> list[Span]:
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


_WINDOW = 8 * 1024 * 1024  # bytes; keeps a disk busy while one piece is hashed


_PIECE = 1024 * 1024


class ReadAheadReader:
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


BLOCK = 512


RECORD = 20 * BLOCK


MAP_IN_HEADER = 4


MAP_IN_BLOCK = 21


_MAGIC = b"ustar  \0"


_NAME_FIELD = 100


@dataclass(frozen=True)
class TarMember:
    """One disk image as a tar member.

    Attributes:
        name: the member's name.
        size: bytes of the image, holes included.
        extents: (offset, length) of the data in bytes, ascending, whole blocks but for the image's end.
    """

    name: str
    size: int
    extents: Sequence[Span] = field(repr=False)

    @property
    def is_sparse(self) -> bool:
        """Whether the image has holes, and so needs a map."""
        return len(self.extents) != 1 or tuple(self.extents[0]) != (0, self.size)

    @cached_property
    def data_size(self) -> int:
        """Bytes of data in the archive, holes and padding not counted."""
        return sum(length for _, length in self.extents)

    @property
    def length(self) -> int:
        """Bytes of the whole archive, headers, padding and end included."""
        end = self._header_size + self.data_size
        return -(-(_whole_blocks(end) + 2 * BLOCK) // RECORD) * RECORD

    @property
    def padding(self) -> int:
        """Zero bytes from the end of the data to the end of the archive."""
        return self.length - self._header_size - self.data_size

    @property
    def _header_size(self) -> int:
        entries = len(self.extents) + 1 - MAP_IN_HEADER if self.is_sparse else 0
        map_blocks = max(0, -(-entries // MAP_IN_BLOCK))
        return self._long_name_size + BLOCK * (1 + map_blocks)

    @property
    def _long_name_size(self) -> int:
        return BLOCK + _whole_blocks(len(self.name) + 1) if len(self.name) > _NAME_FIELD else 0

    def header(self) -> Iterator[bytes]:
        """Yield everything that stands before the data, in blocks of 512 bytes."""
        name = self.name.encode("ascii")
        if self._long_name_size:
            yield _header(b"././@LongLink", len(name) + 1, b"L")
            yield name.ljust(_whole_blocks(len(name) + 1), b"\0")
        if self.is_sparse:
            yield from self._sparse_header(name[:_NAME_FIELD])
        else:
            yield _header(name[:_NAME_FIELD], self.size, b"0")

    def _sparse_header(self, name: bytes) -> Iterator[bytes]:
        # GNU tar ends each map that it found by seeking with an empty extent at the end of the file.
        entries = [*self.extents, (self.size, 0)]
        extended = bytes([len(entries) > MAP_IN_HEADER])
        sparse = _map(entries[:MAP_IN_HEADER]).ljust(24 * MAP_IN_HEADER, b"\0") + extended + _number(self.size)
        yield _header(name, self.data_size, b"S", sparse)
        for first in range(MAP_IN_HEADER, len(entries), MAP_IN_BLOCK):
            block = _map(entries[first : first + MAP_IN_BLOCK]).ljust(24 * MAP_IN_BLOCK, b"\0")
            yield (block + bytes([first + MAP_IN_BLOCK < len(entries)])).ljust(BLOCK, b"\0")


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _map(entries: Sequence[Span]) -> bytes:
    return b"".join(_number(offset) + _number(length) for offset, length in entries)


def _number(value: int) -> bytes:
    """Return a 12 byte field: octal, or base-256 from 8 GiB on."""
    if value < 8**11:
        return b"%011o\0" % value
    return b"\x80" + value.to_bytes(11, "big")


def _header(name: bytes, size: int, kind: bytes, sparse: bytes = b"") -> bytes:
    owner = b"0000644\0" + b"0000000\0" * 2
    root = b"root".ljust(32, b"\0")
    head = name.ljust(_NAME_FIELD, b"\0") + owner + _number(size) + _number(0)
    tail = kind + bytes(100) + _MAGIC + root * 2 + bytes(16 + 41) + sparse
    checksum = sum(head) + sum(tail) + 8 * ord(" ")
    return (head + b"%06o\0 " % checksum + tail).ljust(BLOCK, b"\0")


_Fill = Callable[[int, memoryview], None]
"""Fills a buffer with a run's bytes from an offset within the run on."""


def tar_stream(
    image: Image, member: TarMember, free: Callable[[], memoryview], start: int = 0
) -> Iterator[tuple[memoryview, int]]:
    """Yield the archive in buffers, each full but the last, with the bytes that it holds.

    Args:
        image: what the member's extents are read from.
        member: its headers and map.
        free: gives the next buffer to fill.
        start: bytes of the archive to leave out at its beginning.
    """
    buffer, filled = free(), 0
    for fill, length in _runs(image, member):
        done = min(start, length)
        start -= done
        while done < length:
            size = min(len(buffer) - filled, length - done)
            fill(done, buffer[filled : filled + size])
            done, filled = done + size, filled + size
            if filled == len(buffer):
                yield buffer, filled
                buffer, filled = free(), 0
    if filled:
        yield buffer, filled


def _runs(image: Image, member: TarMember) -> Iterator[tuple[_Fill, int]]:
    for block in member.header():
        yield partial(_copy, block), len(block)
    reader = ReadAheadReader(image, member.extents)
    for offset, length in member.extents:
        yield partial(_read, reader, offset), length
    yield _zero, member.padding


def _copy(block: bytes, start: int, buffer: memoryview) -> None:
    buffer[:] = block[start : start + len(buffer)]


def _read(reader: ReadAheadReader, offset: int, start: int, buffer: memoryview) -> None:
    reader.read_into(offset + start, buffer)


def _zero(_: int, buffer: memoryview) -> None:
    buffer[:] = bytes(len(buffer))
