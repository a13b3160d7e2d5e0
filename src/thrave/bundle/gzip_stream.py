"""Gzip: compresses independent chunks of one member, and decompresses any gzip stream. Starts no thread.

Each chunk is compressed independently and ends on a byte boundary, so that several threads can make a single gzip
member, as pigz does. The gzip readers of Ruby and Perl, which old tools use, read only the first of several members.
The libraries: ISA-L level 2 compresses 15 times as fast as zlib level 6, into 7 % more bytes; zlib-ng level 6 makes the
size of zlib at twice its speed. zlib replaces a library that is not installed. All of them release the GIL.
"""

import struct
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from thrave.bundle.errors import ContentError

_SKIP_PIECE = 16 * 1024


class PieceReader:
    """Reads a stream that arrives in pieces of any size. Holds only the current piece.

    Args:
        pieces: Bytes of the stream in order; pieces may be empty.
        name: Name of the stream in error messages.
    """

    def __init__(self, pieces: Iterable[bytes | memoryview], name: str) -> None:
        self._pieces: Iterator[bytes | memoryview] = filter(None, pieces)
        self._name = name
        self._piece = memoryview(b"")
        self._at = 0

    def read_some(self, max_bytes: int) -> memoryview:
        """Return at most `max_bytes` bytes; no bytes only at the end of the stream."""
        if self.at_end:
            return self._piece[self._at :]
        data = self._piece[self._at : self._at + max_bytes]
        self._at += len(data)
        return data

    def read_exactly(self, size: int) -> bytes:
        """Return exactly `size` bytes.

        Raises:
            ContentError: The stream ends before.
        """
        found = bytearray()
        while len(found) < size:
            piece = self.read_some(size - len(found))
            if not piece:
                raise ContentError(f"the {self._name} ends early")
            found += piece
        return bytes(found)

    def skip_past(self, end: bytes, max_bytes: int) -> None:
        """Skip everything up to and including the first byte `end`.

        Args:
            end: One byte.
            max_bytes: Bytes that may precede it.

        Raises:
            ContentError: The stream ends before, or more than `max_bytes` bytes precede it.
        """
        while piece := bytes(self.read_some(_SKIP_PIECE)):
            at = piece.find(end)
            if at > max_bytes or (at < 0 and len(piece) > max_bytes):
                break
            if at >= 0:
                self._at -= len(piece) - at - 1
                return
            max_bytes -= len(piece)
        raise ContentError(f"the {self._name} ends early, or a text in it is too long")

    def put_back(self, data: bytes) -> None:
        """Return the bytes that were read last to the stream."""
        if len(data) <= self._at:
            self._at -= len(data)
        else:
            self._piece, self._at = memoryview(data + bytes(self._piece[self._at :])), 0

    @property
    def at_end(self) -> bool:
        """Whether the stream has ended."""
        if self._at == len(self._piece):
            self._piece, self._at = memoryview(next(self._pieces, b"")), 0
        return not self._piece


Compression = Literal["fast", "small"]
"""Compress fast, or into fewer bytes."""


_RAW = -15  # zlib's window bits for raw deflate


class Deflater(Protocol):
    """A stream that is being compressed; the interface of ``zlib.compressobj``."""

    def compress(self, data: memoryview, /) -> bytes:
        """Add data; return the bytes that are complete."""
        ...

    def flush(self, mode: int, /) -> bytes:
        """Return the remaining bytes, ended according to the mode."""
        ...


class Inflater(Protocol):
    """A stream that is being decompressed; the interface of ``bz2.BZ2Decompressor``, which buffers its input."""

    @property
    def eof(self) -> bool:
        """Whether the stream has ended."""
        ...

    @property
    def needs_input(self) -> bool:
        """Whether all input has been processed."""
        ...

    @property
    def unused_data(self) -> bytes:
        """Input after the end of the stream."""
        ...

    def decompress(self, data: memoryview, /, max_length: int) -> bytes:
        """Return at most `max_length` bytes. Pass data only if `needs_input`."""
        ...


class _ZlibInflater:
    """Adapts ``zlib.decompressobj`` to `Inflater`."""

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
    """A library that compresses and decompresses.

    Attributes:
        deflater: Starts a raw deflate stream.
        inflater: Starts to read a raw deflate stream.
        crc32: Continues a CRC-32.
        error: Raised by the inflater for a damaged stream.
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
"""Bytes of the tar stream that are compressed at once. Smaller chunks cost too much time between threads."""


PIECE = 256 * 1024
"""Maximum bytes of a decompressed piece. For larger ones, an inflater grows its output by copying."""


GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\x03"
"""Method deflate, no time, no name, Unix."""


_MAX_STORED_BLOCK = 65535


# An inflater copies unprocessed input, so give it small pieces.
_INPUT_PIECE = 64 * 1024


_HEADER_CRC, _EXTRA, _NAME, _COMMENT = 2, 4, 8, 16


_MAX_TEXT = 64 * 1024
"""Maximum bytes of a file name or comment. Known bundlers write neither. The extra field has at most 65,535."""


_ALLOWED_MEMBERS = 1000


_MIN_MEMBER = 16 * 1024
"""Minimum average size of further members, decompressed, so that opening members never costs more than their data.

Known bundlers write one member; ``bgzip`` writes one for each 64 KiB.
"""


def deflate(chunk: memoryview, codec: Codec) -> bytes:
    """Compress a chunk into raw deflate blocks that end on a byte boundary.

    A chunk that does not get smaller is stored, so that its size is limited (see `max_gzip_size`). Stored blocks are
    also decompressed three times as fast.
    """
    stream = codec.deflater()
    compressed = stream.compress(chunk) + stream.flush(zlib.Z_SYNC_FLUSH)
    return compressed if len(compressed) < len(chunk) else _store(chunk)


def max_gzip_size(size: int) -> int:
    """Return the maximum bytes of gzip for `size` bytes in chunks, including header and trailer."""
    blocks_per_chunk = -(-CHUNK // _MAX_STORED_BLOCK)
    return len(GZIP_HEADER) + size + 5 * blocks_per_chunk * -(-size // CHUNK) + len(gzip_trailer(0, 0))


def gzip_trailer(crc: int, size: int) -> bytes:
    """Return the end of the member: an empty last block, the CRC-32 and the size modulo 2**32."""
    return b"\x03\0" + _checksum(crc, size)


def inflate(pieces: Iterable[memoryview], codec: Codec = FAST) -> Iterator[bytes]:
    """Decompress a gzip stream of any number of members into pieces of at most `PIECE` bytes; pieces may be empty.

    Headers and trailers are read here and not by the library, since ISA-L misreads a header with several optional
    fields that arrives in two pieces.

    Raises:
        ContentError: Not gzip, a wrong checksum, an early end, bytes after the end, or too many small members.
    """
    stream = PieceReader(pieces, "gzip stream")
    members = size = 0
    while not members or not stream.at_end:
        if members > _ALLOWED_MEMBERS + size // _MIN_MEMBER:
            raise ContentError(f"the gzip stream has more than {members} members in its first {size} bytes")
        _skip_header(stream)
        size += yield from _inflate_member(stream, codec)
        members += 1


def _skip_header(stream: PieceReader) -> None:
    """Read the header of a member (RFC 1952, 2.3) and ignore its contents."""
    magic, flags = stream.read_exactly(3), stream.read_exactly(7)[0]
    if magic != GZIP_HEADER[:3] or flags & 0xE0:
        raise ContentError("the parts contain no gzip stream, or something else after it")
    if flags & _EXTRA:
        stream.read_exactly(int.from_bytes(stream.read_exactly(2), "little"))
    for text in (_NAME, _COMMENT):
        if flags & text:
            stream.skip_past(b"\0", _MAX_TEXT)
    if flags & _HEADER_CRC:
        stream.read_exactly(2)


def _inflate_member(stream: PieceReader, codec: Codec) -> Generator[bytes, None, int]:
    """Decompress the rest of a member; return its size in bytes."""
    inflater = codec.inflater()
    crc = size = 0
    while not inflater.eof:
        needs_input = inflater.needs_input
        piece_in = stream.read_some(_INPUT_PIECE) if needs_input else memoryview(b"")
        piece = _inflate_piece(inflater, piece_in, codec)
        if needs_input and not (piece_in or piece or inflater.eof):
            raise ContentError("the gzip stream ends early")
        crc, size = codec.crc32(memoryview(piece), crc), size + len(piece)
        yield piece
    stream.put_back(inflater.unused_data)
    if stream.read_exactly(8) != _checksum(crc, size):
        raise ContentError("the gzip stream is damaged: its checksum or size is wrong")
    return size


def _inflate_piece(inflater: Inflater, data: memoryview, codec: Codec) -> bytes:
    try:
        return inflater.decompress(data, max_length=PIECE)
    except codec.error as error:
        raise ContentError(f"the gzip stream is damaged: {error}") from error


def _checksum(crc: int, size: int) -> bytes:
    return struct.pack("<II", crc, size & 0xFFFFFFFF)


def _store(chunk: memoryview) -> bytes:
    blocks: list[bytes | memoryview] = []
    for start in range(0, len(chunk), _MAX_STORED_BLOCK):
        block = chunk[start : start + _MAX_STORED_BLOCK]
        blocks += [struct.pack("<BHH", 0, len(block), len(block) ^ 0xFFFF), block]
    return b"".join(blocks)
