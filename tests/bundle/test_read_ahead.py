"""`ReadAheadReader` announces each byte of data once, in order, within its window, and announces no hole."""

from dataclasses import dataclass, field

import pytest

from thrave.bundle.base import Span
from thrave.bundle.tar_writer import ReadAheadReader

MIB = 1 << 20
EXTENTS = [(0, 4096), (5 * MIB, 20 * MIB + 512), (1 << 40, 3 * MIB), ((1 << 40) + 4 * MIB, 512)]
DATA = sum(length for _, length in EXTENTS)


@dataclass
class RecordingImage:
    """An image without content that records the announced ranges, and the reads that were not announced."""

    size: int = 1 << 41
    announced: list[Span] = field(default_factory=list)
    unannounced_reads: list[Span] = field(default_factory=list)

    def extents(self) -> list[Span]:
        return EXTENTS

    def prefetch(self, offset: int, length: int) -> None:
        self.announced.append((offset, length))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if not any(start <= offset < start + length for start, length in self.announced):
            self.unannounced_reads.append((offset, len(buffer)))


def read_from_extent(first_extent: int, piece_size: int) -> tuple[RecordingImage, list[int]]:
    """Read all data from an extent to the end, in pieces.

    Returns:
        The image, and for each read the bytes that were announced and not yet read.
    """
    image, ahead, bytes_read = RecordingImage(), [], 0
    reader = ReadAheadReader(image, EXTENTS)
    for offset, length in EXTENTS[first_extent:]:
        for start in range(offset, offset + length, piece_size):
            size = min(piece_size, offset + length - start)
            reader.read_into(start, memoryview(bytearray(size)))
            bytes_read += size
            ahead.append(sum(length for _, length in image.announced) - bytes_read)
    return image, ahead


def total_bytes(spans: list[Span]) -> int:
    return sum(length for _, length in spans)


@pytest.mark.parametrize("piece_size", [4096 * 3, MIB // 4, MIB, 3 * MIB])
def test_read_ahead_announces_data_once_in_order(piece_size):
    image, _ = read_from_extent(0, piece_size)

    ends = [offset + length for offset, length in image.announced]
    assert all(end <= offset for end, (offset, _) in zip(ends, image.announced[1:], strict=False))
    assert all(any(o <= offset and offset + n <= o + m for o, m in EXTENTS) for offset, n in image.announced)
    assert total_bytes(image.announced) >= DATA - piece_size - MIB


def test_read_ahead_is_limited_to_window():
    _, ahead = read_from_extent(0, MIB)

    assert max(ahead) <= 9 * MIB
    assert min(ahead[:10]) >= 6 * MIB


def test_read_ahead_does_not_announce_data_before_first_read():
    image, _ = read_from_extent(2, MIB)

    assert all(offset >= 1 << 40 for offset, _ in image.announced)
    assert EXTENTS[3] in image.announced
