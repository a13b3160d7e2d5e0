"""What stands in the benchmark's files: programs, text and random bytes, from a seed, as hard to compress as real ones.

Nothing of the machine's own files is in it, and nothing of Thrave's: a change of the product cannot change what it is
measured on. Programs are made of few frequent opcodes with operands of few frequent values, and of tables. That gives
deflate what real ones do: many short matches, long chains to search (gzip -9 needs about 65 times the CPU of ISA-L's
level 2, gzip -6 about 18 times; 69 and 12 for a Linux system's own programs), and about half the size. All choices come
from an AES-CTR keystream, so the same seed gives the same bytes on every machine.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Literal, TypeVar

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Kind = Literal["program", "random", "text", "zeros"]

PIECE = 1 << 20  # bytes made at once
_POOL = 8 << 20  # bytes that programs and texts are cut from: far more than deflate's window of 32 KiB
_STRETCH = 64 << 10  # bytes of a table between twice as much code
_RECORD = struct.Struct("<QQQ")
_CHOICES = 1 << 16  # a choice is 16 random bits

T = TypeVar("T")


class Contents:
    """The contents of all files of one seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def pieces(self, name: str, kind: Kind, size: int) -> Iterator[bytes]:
        """Yield a file's content, at most PIECE bytes at a time; files of other names have others."""
        make = self._makers[kind]
        for offset in range(0, size, PIECE):
            yield make(f"{name}@{offset}", min(PIECE, size - offset))

    @cached_property
    def _makers(self) -> dict[Kind, Callable[[str, int], bytes]]:
        return {"program": self._program, "text": self._text, "random": self._random, "zeros": _zeros}

    def _random(self, label: str, size: int) -> bytes:
        key = hashlib.sha256(f"{self._seed}:{label}".encode()).digest()
        return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(size))

    def _numbers(self, label: str, count: int) -> memoryview:
        return memoryview(self._random(label, 2 * count)).cast("H")

    def _program(self, label: str, size: int) -> bytes:
        """A stretch of the pool in an alphabet of its own: as compressible, and equal to no other stretch."""
        factor, summand = self._random(f"alphabet of {label}", 2)
        alphabet = bytes(((factor | 1) * byte + summand) & 0xFF for byte in range(256))
        return self._stretch(self._program_pool, label, size).translate(alphabet)

    def _text(self, label: str, size: int) -> bytes:
        return self._stretch(self._text_pool, label, size)

    def _stretch(self, pool: bytes, label: str, size: int) -> bytes:
        start = int.from_bytes(self._random(f"place of {label}", 4), "little") % (len(pool) - size)
        return pool[start : start + size]

    @cached_property
    def _program_pool(self) -> bytes:
        """Two thirds code, one third tables, by turns."""
        code, table = self._code, self._relocations
        return b"".join(
            code[2 * start : 2 * (start + _STRETCH)] + table[start : start + _STRETCH]
            for start in range(0, len(table), _STRETCH)
        )

    @cached_property
    def _code(self) -> bytes:
        opcodes = _favouring_first([self._random(f"opcode {i}", 1 + i % 4) for i in range(64)], 2)
        draws = self._numbers("instructions", 4 * 12288)
        instructions = [opcodes[draws[i]] + _operand(*draws[i + 1 : i + 4]) for i in range(0, len(draws), 4)]
        return self._pool("code", _favouring_first(instructions, 3), lambda number: number.to_bytes(2, "little"))

    @cached_property
    def _relocations(self) -> bytes:
        """Records of 24 bytes as ELF has them: a place, each a little further on, a type, an address."""
        draws = self._numbers("relocations", _POOL // 3 // _RECORD.size)
        places = accumulate(8 * (1 + draw % 16 if draw % 8 == 0 else 1) for draw in draws)
        return b"".join(
            _RECORD.pack(place, 8, 0x140000 + (16 * draw if draw & 32 else 3 * place & ~15))
            for place, draw in zip(places, draws, strict=True)
        )

    @cached_property
    def _text_pool(self) -> bytes:
        words = _favouring_first(
            [self._random(f"word {i}", 1 + i % 5).hex().translate(_LETTERS) for i in range(2048)], 3
        )
        draws = self._numbers("phrases", 4 * 1024)
        phrases = [" ".join(words[draw] for draw in draws[i : i + 4]) + ", " for i in range(0, len(draws), 4)]
        table = _favouring_first([phrase.encode() for phrase in phrases], 3)
        return self._pool("texts", table, lambda number: b"%d\r\n" % number)

    def _pool(self, label: str, table: Sequence[bytes], unique: Callable[[int], bytes]) -> bytes:
        """Choices from the table, with a `unique` piece after each seven: an address, the time of a line."""
        average = sum(map(len, table)) / len(table)
        choices = self._numbers(label, int(1.2 * _POOL / average) // 8 * 8)
        pieces = [table[choice] for choice in choices]
        pieces[7::8] = [unique(choice) for choice in choices[7::8]]
        return b"".join(pieces)


_LETTERS = str.maketrans("0123456789abcdef", "etaoinshrdlcumwf")


def _favouring_first(items: Sequence[T], power: int) -> list[T]:
    """A table to choose from with 16 bits, in which the first items stand far more often than the last."""
    return [items[len(items) * choice**power // _CHOICES**power] for choice in range(_CHOICES)]


def _operand(kind: int, value: int, other: int) -> bytes:
    """None, the offset of a local variable, or a distance to code near by, forwards or back."""
    match kind % 8:
        case 0 | 1 | 2:
            return b""
        case 3 | 4 | 5:
            return bytes([value % (1 + other % 32) * 8])
        case 6:
            return value.to_bytes(2, "little") + bytes([other % 8, 0])
        case _:
            return value.to_bytes(2, "little") + bytes([255 - other % 8, 255])


def _zeros(_label: str, size: int) -> bytes:
    return bytes(size)
