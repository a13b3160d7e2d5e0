"""Gzip in both directions: independent chunks of one member out, any gzip in.

Chunks are deflated each for itself and end on a byte boundary, so that any number of threads can make one single
gzip member, as pigz does; several members are read short by Ruby's and Perl's readers, which old tools use. No thread
is started here.
"""

import struct
import zlib
from collections.abc import Generator, Iterable, Iterator

from thrave.bundle.errors import ContentError
from thrave.bundle.pieces import Pieces
from thrave.bundle.zlibs import FAST, Inflater, Library

CHUNK = 2 * 1024 * 1024
"""Bytes of the tar stream that are deflated at a time: of smaller ones the threads' handing over takes too much."""

PIECE = 256 * 1024
"""Bytes that are inflated at a time, at the most: of more, an inflater's output grows by being copied."""

GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\x03"
"""Deflate, no time, no name, made on Unix."""

_LONGEST_STORED = 65535
# An inflater copies the input that it has not come to: of small bites that is little.
_BITE = 64 * 1024
_HEADER_CRC, _EXTRA, _NAME, _COMMENT = 2, 4, 8, 16

_MOST_TEXT = 64 * 1024
"""Bytes of a member's file name or comment. Known bundlers write neither; the extra field has at most 65,535."""

_FREE_MEMBERS = 1000
_LEAST_MEMBER = 16 * 1024
"""Bytes that each further member must inflate to on average, so that opening members never costs more than their data.

Known bundlers write one member; ``bgzip`` writes one for each 64 KiB.
"""


def deflated(chunk: memoryview, library: Library) -> bytes:
    """Turn a chunk into raw deflate blocks that end on a byte boundary.

    What does not get smaller is stored, so that a chunk never grows by more than ``most_gzip`` says; stored blocks
    are also inflated three times as fast.
    """
    stream = library.deflater()
    packed = stream.compress(chunk) + stream.flush(zlib.Z_SYNC_FLUSH)
    return packed if len(packed) < len(chunk) else _stored(chunk)


def most_gzip(size: int) -> int:
    """Return the most bytes of gzip that ``size`` bytes in chunks can become, header and trailer included."""
    blocks_per_chunk = -(-CHUNK // _LONGEST_STORED)
    return len(GZIP_HEADER) + size + 5 * blocks_per_chunk * -(-size // CHUNK) + len(gzip_trailer(0, 0))


def gzip_trailer(crc: int, size: int) -> bytes:
    """Return what closes the member: an empty last block, the CRC-32 and the size modulo 2**32."""
    return b"\x03\0" + _checksum(crc, size)


def inflated(pieces: Iterable[memoryview], library: Library = FAST) -> Iterator[bytes]:
    """Inflate a gzip stream of any number of members into pieces of at most `PIECE` bytes, some of them empty.

    Headers and trailers are read here rather than by the library: ISA-L misreads a header with several optional fields
    if it comes in two pieces.

    Raises:
        ContentError: it is no gzip, its checksum is wrong, it ends early, something follows it, or it consists of
            too many small members.
    """
    stream = Pieces(pieces, "gzip stream")
    members = size = 0
    while not members or not stream.at_end:
        if members > _FREE_MEMBERS + size // _LEAST_MEMBER:
            raise ContentError(f"the gzip stream has more than {members} members in its first {size} bytes")
        _skip_header(stream)
        size += yield from _member(stream, library)
        members += 1


def _skip_header(stream: Pieces) -> None:
    """Read a member's header (RFC 1952, 2.3); nothing in it matters here."""
    magic, flags = stream.exactly(3), stream.exactly(7)[0]
    if magic != GZIP_HEADER[:3] or flags & 0xE0:
        raise ContentError("what stands in the parts, or follows in them, is no gzip stream")
    if flags & _EXTRA:
        stream.exactly(int.from_bytes(stream.exactly(2), "little"))
    for text in (_NAME, _COMMENT):
        if flags & text:
            stream.skip_past(b"\0", _MOST_TEXT)
    if flags & _HEADER_CRC:
        stream.exactly(2)


def _member(stream: Pieces, library: Library) -> Generator[bytes, None, int]:
    """Inflate the rest of a member, and return the number of bytes that it holds."""
    inflater = library.inflater()
    crc = size = 0
    while not inflater.eof:
        hungry = inflater.needs_input
        bite = stream.some(_BITE) if hungry else memoryview(b"")
        piece = _inflate(inflater, bite, library)
        if hungry and not (bite or piece or inflater.eof):
            raise ContentError("the gzip stream ends early")
        crc, size = library.crc32(memoryview(piece), crc), size + len(piece)
        yield piece
    stream.put_back(inflater.unused_data)
    if stream.exactly(8) != _checksum(crc, size):
        raise ContentError("the gzip stream is damaged: its checksum or size is wrong")
    return size


def _inflate(inflater: Inflater, data: memoryview, library: Library) -> bytes:
    try:
        return inflater.decompress(data, max_length=PIECE)
    except library.error as error:
        raise ContentError(f"the gzip stream is damaged: {error}") from error


def _checksum(crc: int, size: int) -> bytes:
    return struct.pack("<II", crc, size & 0xFFFFFFFF)


def _stored(chunk: memoryview) -> bytes:
    blocks: list[bytes | memoryview] = []
    for start in range(0, len(chunk), _LONGEST_STORED):
        block = chunk[start : start + _LONGEST_STORED]
        blocks += [struct.pack("<BHH", 0, len(block), len(block) ^ 0xFFFF), block]
    return b"".join(blocks)
