"""`BufferPool` reuses a fixed number of buffers and keeps every byte of the stream."""

from collections.abc import Iterator
from itertools import islice

import pytest

from thrave.pipeline import BufferPool, Pipeline

SIZE = 8


def copy_through_pool(pieces: list[bytes], count: int = 2) -> bytes:
    """Copy the pieces through so few buffers that each is reused, and return all bytes."""
    with Pipeline(1) as pipeline:
        buffers = BufferPool(pipeline, count, SIZE)
        return b"".join(bytes(piece) for piece in buffers.release_each(pipeline.prefetch(buffers.fill(pieces), 1)))


@pytest.mark.parametrize(
    "lengths",
    [[], [0], [8, 8, 8, 8], [1] * 100, [8, 0, 0, 1, 8, 7, 1], [3, 3, 3, 3, 3]],
    ids=["nothing", "one empty piece", "full", "tiny", "mixed", "no full buffer"],
)
def test_buffer_pool_returns_all_bytes(lengths: list[int]) -> None:
    pieces = [bytes([number % 256]) * length for number, length in enumerate(lengths)]

    assert copy_through_pool(pieces) == b"".join(pieces)


def test_fill_joins_small_pieces() -> None:
    with Pipeline(1) as pipeline:
        buffers = BufferPool(pipeline, 2, SIZE)

        assert [len(piece) for piece in islice(buffers.fill(iter([b"abc"] * 5)), 2)] == [6, 6]


def test_fill_waits_for_unused_buffer() -> None:
    pieces_read: list[int] = []

    def pieces() -> Iterator[bytes]:
        for number in range(100):
            pieces_read.append(number)
            yield bytes(SIZE)

    with Pipeline(1) as pipeline:
        buffers = BufferPool(pipeline, 3, SIZE)
        stream = buffers.release_each(pipeline.prefetch(buffers.fill(pieces()), 100))
        for consumed, _ in enumerate(stream):
            # Three pieces are in buffers, and one waits for a buffer.
            assert len(pieces_read) <= consumed + 4
