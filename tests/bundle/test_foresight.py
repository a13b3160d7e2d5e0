"""What is read soon is announced: all of it, in order, once, not too early, and never a hole."""

from dataclasses import dataclass, field

import pytest

from thrave.bundle.base import Span
from thrave.bundle.tar_writer import ReadAheadReader

MIB = 1 << 20
EXTENTS = [(0, 4096), (5 * MIB, 20 * MIB + 512), (1 << 40, 3 * MIB), ((1 << 40) + 4 * MIB, 512)]
DATA = sum(length for _, length in EXTENTS)


@dataclass
class Listener:
    """An image that notes what it hears before each read; its bytes are of no matter."""

    size: int = 1 << 41
    heard: list[Span] = field(default_factory=list)
    late: list[Span] = field(default_factory=list)

    def extents(self) -> list[Span]:
        return EXTENTS

    def prefetch(self, offset: int, length: int) -> None:
        self.heard.append((offset, length))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.late += [] if any(start <= offset < start + length for start, length in self.heard) else [(offset, 0)]


def read_from(first: int, piece: int) -> tuple[Listener, list[int]]:
    """Read all data from an extent on in pieces; also how far ahead it was announced, at each read, in bytes."""
    image, ahead, done = Listener(), [], 0
    reader = ReadAheadReader(image, EXTENTS)
    for offset, length in EXTENTS[first:]:
        for start in range(offset, offset + length, piece):
            size = min(piece, offset + length - start)
            reader.read_into(start, memoryview(bytearray(size)))
            done += size
            ahead.append(sum(length for _, length in image.heard) - done)
    return image, ahead


def covered(spans: list[Span]) -> int:
    return sum(length for _, length in spans)


@pytest.mark.parametrize("piece", [4096 * 3, MIB // 4, MIB, 3 * MIB])
def test_readahead_announces_data_once_and_in_order(piece):
    image, _ = read_from(0, piece)

    ends = [offset + length for offset, length in image.heard]
    assert all(end <= offset for end, (offset, _) in zip(ends, image.heard[1:], strict=False))
    assert all(any(o <= offset and offset + n <= o + m for o, m in EXTENTS) for offset, n in image.heard)
    assert covered(image.heard) >= DATA - piece - MIB


def test_readahead_is_limited():
    _, ahead = read_from(0, MIB)

    assert max(ahead) <= 9 * MIB
    assert min(ahead[:10]) >= 6 * MIB


def test_readahead_skips_what_was_sealed_before():
    image, _ = read_from(2, MIB)

    assert all(offset >= 1 << 40 for offset, _ in image.heard)
    assert (EXTENTS[3]) in image.heard
