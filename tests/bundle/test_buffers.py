"""Buffers that are used over and over: nothing is lost in them, and there are never more."""

from collections.abc import Iterator
from itertools import islice

import pytest

from thrave.pipeline import BufferPool, Pipeline

SIZE = 8


def through(pieces: list[bytes], count: int = 2) -> bytes:
    """What comes out of so few buffers that each is used again and again."""
    with Pipeline(1) as pipeline:
        buffers = BufferPool(pipeline, count, SIZE)
        return b"".join(bytes(piece) for piece in buffers.release_each(pipeline.prefetch(buffers.fill(pieces), 1)))


@pytest.mark.parametrize(
    "lengths",
    [[], [0], [8, 8, 8, 8], [1] * 100, [8, 0, 0, 1, 8, 7, 1], [3, 3, 3, 3, 3]],
    ids=["nothing", "one empty piece", "full", "tiny", "mixed", "none that fills a buffer"],
)
def test_buffers_return_what_was_written(lengths: list[int]) -> None:
    pieces = [bytes([number % 256]) * length for number, length in enumerate(lengths)]

    assert through(pieces) == b"".join(pieces)


def test_buffers_join_small_pieces() -> None:
    with Pipeline(1) as pipeline:
        buffers = BufferPool(pipeline, 2, SIZE)

        assert [len(piece) for piece in islice(buffers.fill(iter([b"abc"] * 5)), 2)] == [6, 6]


def test_writer_waits_for_a_free_buffer() -> None:
    taken: list[int] = []

    def pieces() -> Iterator[bytes]:
        for number in range(100):
            taken.append(number)
            yield bytes(SIZE)

    with Pipeline(1) as pipeline:
        buffers = BufferPool(pipeline, 3, SIZE)
        stream = buffers.release_each(pipeline.prefetch(buffers.fill(pieces()), 100))
        for done, _ in enumerate(stream):
            # Three in buffers, and the one that waits for its own.
            assert len(taken) <= done + 4
