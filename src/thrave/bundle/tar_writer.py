"""Writes the tar stream of a bundle: one member, the image, as GNU tar 1.34 writes it.

The model, byte for byte, is ``tar -cS --owner=root:0 --group=root:0 --mode=0644 --mtime=@0``: a plain ustar member with
GNU magic, or an old-GNU sparse one (type ``S``) if the image has holes, which is what ec2-ami-tools makes. This is the
only module of sealing that reads the image. Holes are not read; no data is kept between buffers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from thrave.bundle.base import Image, Span
from thrave.bundle.errors import ImageError

SECTOR = 512


MAX_EXTENTS = 1 << 20
"""Maximum number of extents. More are merged across their smallest holes, since the map is kept in memory."""


def data_extents(image: Image, max_extents: int = MAX_EXTENTS) -> list[Span]:
    """Return at most `max_extents` extents of the image, extended to whole sectors and merged where they touch.

    A sparse tar member can only describe whole blocks, except at the end of the file.

    Raises:
        ImageError: The image is empty, or its extents are unordered, overlap or exceed its size.
    """
    if image.size <= 0:
        raise ImageError("the image is empty")
    extents = image.extents()
    grain = SECTOR
    found = list(_merge(extents, image.size, grain))
    while len(found) > max_extents:
        grain *= 2
        found = list(_merge(found, image.size, grain))
    return found


def _merge(extents: Sequence[Span], size: int, grain: int) -> Iterator[Span]:
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


_WINDOW = 8 * 1024 * 1024  # bytes that are announced ahead: keeps a disk busy while a piece is hashed


_PIECE = 1024 * 1024


class ReadAheadReader:
    """Reads the extents of an image in order, and announces to the image which bytes are read next.

    The read-ahead of a kernel guesses: in an image of many extents it also reads the holes between them. Bytes before
    the first read are not announced.

    Args:
        image: The image to read.
        extents: In the order in which they are read.
    """

    def __init__(self, image: Image, extents: Iterable[Span]) -> None:
        self._image = image
        self._pieces = _pieces(extents)
        self._announced = 0  # bytes that were announced and not yet read

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes of the image at an offset."""
        self._announced = max(0, self._announced - len(buffer))
        self._announce(offset + len(buffer))
        self._image.read_into(offset, buffer)

    def _announce(self, end: int) -> None:
        while self._announced < _WINDOW and (piece := next(self._pieces, None)):
            offset, length = piece
            if offset + length > end:
                self._image.prefetch(offset, length)
                self._announced += length


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
        name: Name of the member.
        size: Bytes of the image, including holes.
        extents: (offset, length) of the data in bytes, ascending; whole blocks except at the end of the image.
    """

    name: str
    size: int
    extents: Sequence[Span] = field(repr=False)

    @property
    def is_sparse(self) -> bool:
        """Whether the image has holes, which need a map."""
        return len(self.extents) != 1 or tuple(self.extents[0]) != (0, self.size)

    @cached_property
    def data_size(self) -> int:
        """Bytes of data in the archive, without holes and padding."""
        return sum(length for _, length in self.extents)

    @property
    def length(self) -> int:
        """Bytes of the whole archive, including headers, padding and end."""
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
        """Yield all blocks of 512 bytes before the data."""
        name = self.name.encode("ascii")
        if self._long_name_size:
            yield _header(b"././@LongLink", len(name) + 1, b"L")
            yield name.ljust(_whole_blocks(len(name) + 1), b"\0")
        if self.is_sparse:
            yield from self._sparse_header(name[:_NAME_FIELD])
        else:
            yield _header(name[:_NAME_FIELD], self.size, b"0")

    def _sparse_header(self, name: bytes) -> Iterator[bytes]:
        # GNU tar ends a map that it found by seeking with an empty extent at the end of the file.
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
    """Return a 12-byte field: octal, or base-256 from 8 GiB."""
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
"""Fills a buffer with the bytes at an offset within a section of the archive."""


def tar_stream(
    image: Image, member: TarMember, acquire: Callable[[], memoryview], start: int = 0
) -> Iterator[tuple[memoryview, int]]:
    """Yield buffers with the archive, and the number of bytes in each. All but the last are full.

    Args:
        image: The image from which the extents are read.
        member: Its headers and map.
        acquire: Returns the next buffer to fill.
        start: Bytes to skip at the beginning of the archive.
    """
    buffer, filled = acquire(), 0
    for fill, length in _sections(image, member):
        done = min(start, length)
        start -= done
        while done < length:
            size = min(len(buffer) - filled, length - done)
            fill(done, buffer[filled : filled + size])
            done, filled = done + size, filled + size
            if filled == len(buffer):
                yield buffer, filled
                buffer, filled = acquire(), 0
    if filled:
        yield buffer, filled


def _sections(image: Image, member: TarMember) -> Iterator[tuple[_Fill, int]]:
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
