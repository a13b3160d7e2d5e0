"""The tar member that a bundle carries, as GNU tar 1.34 writes it.

``tar -cS --owner=root:0 --group=root:0 --mode=0644 --mtime=@0`` is the model, byte for byte: a plain ustar member
with GNU magic, or an old-GNU sparse one (type ``S``) where the image has holes, which is what ec2-ami-tools makes.
This module knows the numbers and the blocks; it never reads an image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from thrave.bundle.image import Span

BLOCK = 512
RECORD = 20 * BLOCK
MAP_IN_HEADER = 4
MAP_IN_BLOCK = 21
_MAGIC = b"ustar  \0"
_NAME_FIELD = 100


@dataclass(frozen=True)
class Member:
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
