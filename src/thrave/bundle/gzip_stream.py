"""A stream that comes in pieces of any size, taken in the sizes that a format wants.

It knows no format and keeps no more than the piece in hand.

The libraries that speak deflate, fastest first, behind one shape.

ISA-L's level 2 deflates at fifteen times the speed of zlib's level 6, for 7 % more bytes; zlib-ng's level 6 makes
zlib's size at twice its speed. Where a machine has no wheel of one, the standard codec's zlib stands in. All of them
let other threads run while they work. What is done with them is the business of ``deflate.py``.

Gzip in both directions: independent chunks of one member out, any gzip in.

Chunks are deflated each for itself and end on a byte boundary, so that any number of threads can make one single
gzip member, as pigz does; several members are read short by Ruby's and Perl's readers, which old tools use. No thread
is started here.
"""

import struct
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from thrave.bundle.errors import ContentError

_SKIPPED = 16 * 1024


class PieceReader:
    """The stream.

    Args:
        pieces: its bytes in order; some of them may be empty.
        what: its name in error messages.
    """

    def __init__(self, pieces: Iterable[bytes | memoryview], what: str) -> None:
        self._pieces: Iterator[bytes | memoryview] = filter(None, pieces)
        self._what = what
        self._piece = memoryview(b"")
        self._at = 0

    def read_some(self, most: int) -> memoryview:
        """Return at most so many bytes, none only at the end of the stream."""
        if self.at_end:
            return self._piece[self._at :]
        taken = self._piece[self._at : self._at + most]
        self._at += len(taken)
        return taken

    def read_exactly(self, size: int) -> bytes:
        """Return just so many bytes.

        Raises:
            ContentError: the stream ends before.
        """
        found = bytearray()
        while len(found) < size:
            piece = self.read_some(size - len(found))
            if not piece:
                raise ContentError(f"the {self._what} ends early")
            found += piece
        return bytes(found)

    def skip_past(self, end: bytes, most: int) -> None:
        """Skip everything up to and including the first byte `end`.

        Args:
            end: One byte.
            most: Bytes that may stand before it.

        Raises:
            ContentError: The stream ends before, or more than `most` bytes precede it.
        """
        while piece := bytes(self.read_some(_SKIPPED)):
            at = piece.find(end)
            if at > most or (at < 0 and len(piece) > most):
                break
            if at >= 0:
                self._at -= len(piece) - at - 1
                return
            most -= len(piece)
        raise ContentError(f"the {self._what} ends early, or a text in it is too long")

    def put_back(self, data: bytes) -> None:
        """Give back the bytes that were taken last."""
        if len(data) <= self._at:
            self._at -= len(data)
        else:
            self._piece, self._at = memoryview(data + bytes(self._piece[self._at :])), 0

    @property
    def at_end(self) -> bool:
        """Whether nothing is left."""
        if self._at == len(self._piece):
            self._piece, self._at = memoryview(next(self._pieces, b"")), 0
        return not self._piece


Compression = Literal["fast", "small"]
"""How hard to compress."""


_RAW = -15


class Deflater(Protocol):
    """A stream that is being compressed, as ``zlib.compressobj`` gives it."""

    def compress(self, data: memoryview, /) -> bytes:
        """Take data; return what is finished."""
        ...

    def flush(self, mode: int, /) -> bytes:
        """Return the rest, ended as the mode says."""
        ...


class Inflater(Protocol):
    """A stream that is being decompressed, in the shape of ``bz2.BZ2Decompressor``: it keeps its input itself."""

    @property
    def eof(self) -> bool:
        """Whether the stream has ended."""
        ...

    @property
    def needs_input(self) -> bool:
        """Whether it has come to the end of what it was given."""
        ...

    @property
    def unused_data(self) -> bytes:
        """What came after the end."""
        ...

    def decompress(self, data: memoryview, /, max_length: int) -> bytes:
        """Return at most so many bytes; take no data unless it needs some."""
        ...


class _ZlibInflater:
    """What ``zlib.decompressobj`` gives, as an `Inflater`."""

    def __init__(self, stream: Any) -> None:  # noqa: ANN401 - zlib's class has no name, and zlib-ng's no base
        self._stream = stream

    @property
    def eof(self) -> bool:
        return bool(self._stream.eof)

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return bytes(self._stream.unused_data)

    def decompress(self, data: memoryview, /, max_length: int) -> bytes:
        return bytes(self._stream.decompress(self._stream.unconsumed_tail or data, max_length=max_length))


@dataclass(frozen=True)
class Codec:
    """One of them.

    Attributes:
        deflater: begins a raw deflate stream.
        inflater: begins to read one.
        crc32: continues a CRC-32.
        error: what the inflater raises about a damaged stream.
    """

    deflater: Callable[[], Deflater]
    inflater: Callable[[], Inflater]
    crc32: Callable[[memoryview, int], int]
    error: type[Exception]


STDLIB = Codec(
    deflater=lambda: zlib.compressobj(level=6, wbits=_RAW),
    inflater=lambda: _ZlibInflater(zlib.decompressobj(wbits=_RAW)),
    crc32=zlib.crc32,
    error=zlib.error,
)


try:
    from isal import igzip_lib, isal_zlib
except ImportError:
    FAST = STDLIB
else:
    FAST = Codec(
        deflater=lambda: isal_zlib.compressobj(level=2, wbits=_RAW),
        inflater=lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE),  # 8 % faster than its zlib's
        crc32=isal_zlib.crc32,
        error=isal_zlib.error,  # type: ignore[arg-type]  # its stub calls the class an instance
    )


try:
    from zlib_ng import zlib_ng
except ImportError:
    SMALL = STDLIB
else:
    SMALL = Codec(
        deflater=lambda: zlib_ng.compressobj(level=6, wbits=_RAW),
        inflater=lambda: _ZlibInflater(zlib_ng.decompressobj(wbits=_RAW)),
        crc32=zlib_ng.crc32,
        error=zlib_ng.error,  # type: ignore[arg-type]  # its stub calls the class an instance
    )


COMPRESSIONS: dict[Compression, Codec] = {"fast": FAST, "small": SMALL}


CHUNK = 2 * 1024 * 1024
"""Bytes of the tar stream that are deflated at a time: of smaller ones the threads' handing over takes too much."""


PIECE = 256 * 1024
"""Bytes that are inflated at a time, at the most: of more, an inflater's output grows by being copied."""


GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\x03"
"""Deflate, no time, no name, made on Unix."""


_MAX_STORED_BLOCK = 65535


# An inflater copies the input that it has not come to: of small bites that is little.
_INPUT_PIECE = 64 * 1024


_HEADER_CRC, _EXTRA, _NAME, _COMMENT = 2, 4, 8, 16


_MAX_TEXT = 64 * 1024
"""Bytes of a member's file name or comment. Known bundlers write neither; the extra field has at most 65,535."""


_FREE_MEMBERS = 1000


_MIN_MEMBER = 16 * 1024
"""Bytes that each further member must inflate to on average, so that opening members never costs more than their data.

Known bundlers write one member; ``bgzip`` writes one for each 64 KiB.
"""


def deflate(chunk: memoryview, codec: Codec) -> bytes:
    """Turn a chunk into raw deflate blocks that end on a byte boundary.

    What does not get smaller is stored, so that a chunk never grows by more than ``max_gzip_size`` says; stored blocks
    are also inflated three times as fast.
    """
    stream = codec.deflater()
    packed = stream.compress(chunk) + stream.flush(zlib.Z_SYNC_FLUSH)
    return packed if len(packed) < len(chunk) else _stored(chunk)


def max_gzip_size(size: int) -> int:
    """Return the most bytes of gzip that ``size`` bytes in chunks can become, header and trailer included."""
    blocks_per_chunk = -(-CHUNK // _MAX_STORED_BLOCK)
    return len(GZIP_HEADER) + size + 5 * blocks_per_chunk * -(-size // CHUNK) + len(gzip_trailer(0, 0))


def gzip_trailer(crc: int, size: int) -> bytes:
    """Return what closes the member: an empty last block, the CRC-32 and the size modulo 2**32."""
    return b"\x03\0" + _checksum(crc, size)


def inflate(pieces: Iterable[memoryview], codec: Codec = FAST) -> Iterator[bytes]:
    """Inflate a gzip stream of any number of members into pieces of at most `PIECE` bytes, some of them empty.

    Headers and trailers are read here rather than by the codec: ISA-L misreads a header with several optional fields
    if it comes in two pieces.

    Raises:
        ContentError: it is no gzip, its checksum is wrong, it ends early, something follows it, or it consists of
            too many small members.
    """
    stream = PieceReader(pieces, "gzip stream")
    members = size = 0
    while not members or not stream.at_end:
        if members > _FREE_MEMBERS + size // _MIN_MEMBER:
            raise ContentError(f"the gzip stream has more than {members} members in its first {size} bytes")
        _skip_header(stream)
        size += yield from _member(stream, codec)
        members += 1


def _skip_header(stream: PieceReader) -> None:
    """Read a member's header (RFC 1952, 2.3); nothing in it matters here."""
    magic, flags = stream.read_exactly(3), stream.read_exactly(7)[0]
    if magic != GZIP_HEADER[:3] or flags & 0xE0:
        raise ContentError("what stands in the parts, or follows in them, is no gzip stream")
    if flags & _EXTRA:
        stream.read_exactly(int.from_bytes(stream.read_exactly(2), "little"))
    for text in (_NAME, _COMMENT):
        if flags & text:
            stream.skip_past(b"\0", _MAX_TEXT)
    if flags & _HEADER_CRC:
        stream.read_exactly(2)


def _member(stream: PieceReader, codec: Codec) -> Generator[bytes, None, int]:
    """Inflate the rest of a member, and return the number of bytes that it holds."""
    inflater = codec.inflater()
    crc = size = 0
    while not inflater.eof:
        hungry = inflater.needs_input
        piece_in = stream.read_some(_INPUT_PIECE) if hungry else memoryview(b"")
        piece = _inflate(inflater, piece_in, codec)
        if hungry and not (piece_in or piece or inflater.eof):
            raise ContentError("the gzip stream ends early")
        crc, size = codec.crc32(memoryview(piece), crc), size + len(piece)
        yield piece
    stream.put_back(inflater.unused_data)
    if stream.read_exactly(8) != _checksum(crc, size):
        raise ContentError("the gzip stream is damaged: its checksum or size is wrong")
    return size


def _inflate(inflater: Inflater, data: memoryview, codec: Codec) -> bytes:
    try:
        return inflater.decompress(data, max_length=PIECE)
    except codec.error as error:
        raise ContentError(f"the gzip stream is damaged: {error}") from error


def _checksum(crc: int, size: int) -> bytes:
    return struct.pack("<II", crc, size & 0xFFFFFFFF)


def _stored(chunk: memoryview) -> bytes:
    blocks: list[bytes | memoryview] = []
    for start in range(0, len(chunk), _MAX_STORED_BLOCK):
        block = chunk[start : start + _MAX_STORED_BLOCK]
        blocks += [struct.pack("<BHH", 0, len(block), len(block) ^ 0xFFFF), block]
    return b"".join(blocks)
