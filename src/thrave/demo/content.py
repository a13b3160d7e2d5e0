"""What stands in the demo disk's files: made from a seed, quick to make, and about as compressible as the real thing.

Bytes come from SHAKE-128 alone, so that the same seed gives the same bytes on every machine and every Python.
Programs are strings of byte sequences of which few are frequent, texts are lines of a log; that is what a
compressor sees in them. Nothing here is anybody's data.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Literal

Kind = Literal["program", "text", "random", "zeros"]

CHUNK = 1 << 20  # bytes made at once
_POOL = 4 << 20  # bytes of which programs and texts are cut; far more than a deflate window
_CHOICES = 1 << 16  # a choice is 16 random bits


class Contents:
    """The contents of all files of one disk.

    Args:
        seed: Another seed, other bytes.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def chunks(self, name: str, kind: Kind, size: int) -> Iterator[bytes]:
        """The content of one file, in pieces of at most CHUNK bytes.

        Args:
            name: The file's name; files of different names differ.
            kind: What it looks like.
            size: Bytes altogether.
        """
        make = self._makers[kind]
        for offset in range(0, size, CHUNK):
            yield make(f"{name}@{offset}", min(CHUNK, size - offset))

    @cached_property
    def _makers(self) -> dict[Kind, Callable[[str, int], bytes]]:
        return {"program": self._program, "text": self._text, "random": self._random, "zeros": _zeros}

    def _random(self, label: str, size: int) -> bytes:
        return hashlib.shake_128(f"{self._seed}:{label}".encode()).digest(size)

    def _program(self, label: str, size: int) -> bytes:
        """A piece of the pool in an alphabet of its own: as compressible, and equal to no other piece."""
        factor, summand = self._random(f"alphabet of {label}", 2)
        alphabet = bytes(((factor | 1) * byte + summand) & 0xFF for byte in range(256))
        return self._piece(self._program_pool, label, size).translate(alphabet)

    def _text(self, label: str, size: int) -> bytes:
        return self._piece(self._text_pool, label, size)

    def _piece(self, pool: bytes, label: str, size: int) -> bytes:
        start = int.from_bytes(self._random(f"place of {label}", 4), "little") % (len(pool) - size)
        return pool[start : start + size]

    @cached_property
    def _program_pool(self) -> bytes:
        lengths = self._random("lengths", 4096)
        sequences = [self._random(f"sequence {i}", 1 + length % 11) for i, length in enumerate(lengths)]
        return self._mixed("programs", sequences)

    @cached_property
    def _text_pool(self) -> bytes:
        words = [self._random(f"word {i}", 3 + i % 4).hex().translate(_LETTERS) for i in range(512)]
        lines = [f"{words[i % 512]} {words[i * 7 % 512]}: {words[i * 31 % 512]} " for i in range(1024)]
        return self._mixed("texts", [line.encode() + b"\r\n" * (i % 3 == 0) for i, line in enumerate(lines)])

    def _mixed(self, label: str, pieces: Sequence[bytes]) -> bytes:
        """A pool of pieces, the first ones far more frequent than the last ones."""
        table = [pieces[len(pieces) * choice**3 // _CHOICES**3] for choice in range(_CHOICES)]
        average = sum(map(len, table)) / _CHOICES
        choices = memoryview(self._random(label, 2 * int(_POOL / average))).cast("H")
        return b"".join(map(table.__getitem__, choices))


_LETTERS = str.maketrans("0123456789abcdef", "etaoinshrdlcumwf")


def _zeros(_label: str, size: int) -> bytes:
    return bytes(size)
