"""Reads an image as the tar stream that a bundle carries, into pooled buffers.

The only place where sealing touches the volume. What is a hole costs nothing; nothing is kept between buffers.
"""

from collections.abc import Callable, Iterator
from functools import partial

from thrave.bundle.foresight import ForesightedReader
from thrave.bundle.image import Image
from thrave.bundle.tar import Member

_Fill = Callable[[int, memoryview], None]
"""Fills a buffer with a run's bytes from an offset within the run on."""


def tar_stream(
    image: Image, member: Member, free: Callable[[], memoryview], start: int = 0
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


def _runs(image: Image, member: Member) -> Iterator[tuple[_Fill, int]]:
    for block in member.header():
        yield partial(_copy, block), len(block)
    reader = ForesightedReader(image, member.extents)
    for offset, length in member.extents:
        yield partial(_read, reader, offset), length
    yield _zero, member.padding


def _copy(block: bytes, start: int, buffer: memoryview) -> None:
    buffer[:] = block[start : start + len(buffer)]


def _read(reader: ForesightedReader, offset: int, start: int, buffer: memoryview) -> None:
    reader.read_into(offset + start, buffer)


def _zero(_: int, buffer: memoryview) -> None:
    buffer[:] = bytes(len(buffer))
