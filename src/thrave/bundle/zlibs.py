"""The libraries that speak deflate, fastest first, behind one shape.

ISA-L's level 2 deflates at fifteen times the speed of zlib's level 6, for 7 % more bytes; zlib-ng's level 6 makes
zlib's size at twice its speed. Where a machine has no wheel of one, the standard library's zlib stands in. All of them
let other threads run while they work. What is done with them is the business of ``deflate.py``.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

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
class Library:
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


STDLIB = Library(
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
    FAST = Library(
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
    SMALL = Library(
        deflater=lambda: zlib_ng.compressobj(level=6, wbits=_RAW),
        inflater=lambda: _ZlibInflater(zlib_ng.decompressobj(wbits=_RAW)),
        crc32=zlib_ng.crc32,
        error=zlib_ng.error,  # type: ignore[arg-type]  # its stub calls the class an instance
    )

COMPRESSIONS: dict[Compression, Library] = {"fast": FAST, "small": SMALL}
