"""The libraries that speak deflate, fastest first, behind one shape.

ISA-L's level 2 deflates at fifteen times the speed of zlib's level 6, for 7 % more bytes; zlib-ng's level 6 makes
zlib's size at twice its speed. Where a machine has no wheel of one, the standard library's zlib stands in. All of them
let other threads run while they work. What is done with them is the business of ``deflate.py``.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

Level = Literal["fast", "small"]
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
    """A stream that is being decompressed, as ``zlib.decompressobj`` gives it."""

    @property
    def eof(self) -> bool:
        """Whether the stream has ended."""
        ...

    @property
    def unused_data(self) -> bytes:
        """What came after the end."""
        ...

    @property
    def unconsumed_tail(self) -> bytes:
        """Input that ``max_length`` left over."""
        ...

    def decompress(self, data: memoryview, /, max_length: int) -> bytes:
        """Return at most so many bytes."""
        ...


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
    inflater=lambda: zlib.decompressobj(wbits=_RAW),
    crc32=zlib.crc32,
    error=zlib.error,
)

try:
    from isal import isal_zlib
except ImportError:
    FAST = STDLIB
else:
    FAST = Library(
        deflater=lambda: isal_zlib.compressobj(level=2, wbits=_RAW),
        inflater=lambda: isal_zlib.decompressobj(wbits=_RAW),
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
        inflater=lambda: zlib_ng.decompressobj(wbits=_RAW),
        crc32=zlib_ng.crc32,
        error=zlib_ng.error,  # type: ignore[arg-type]  # its stub calls the class an instance
    )

LEVELS: dict[Level, Library] = {"fast": FAST, "small": SMALL}
