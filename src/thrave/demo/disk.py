"""What stands in the demo disk's files: made from a seed, quick to make, and about as compressible as the real thing.

Bytes come from SHAKE-128 alone, so that the same seed gives the same bytes on every machine and every Python.
Programs are strings of byte sequences of which few are frequent, texts are lines of a log; that is what a
compressor sees in them. Nothing here is anybody's data.

NTFS volumes without their files' contents: what mkntfs and ntfs-3g wrote, kept as package data.

A template is one xz stream: a line of JSON, then the bytes of the file system itself (boot sectors, MFT, bitmap,
log, folders), run after run. Templates are made by scripts/make_demo_templates.py, once, and read here; nothing is
mounted and no tool is needed.

A Windows-like root disk, made on the spot without root or any tool: an MBR and one NTFS volume with its files.

The file system comes from a template (see `template.py`), the files' contents from a seed. About half of the disk
is data, some of it written zeros and some of it deleted files, whose clusters are free and still hold what they
held; the rest are holes. It does not boot. Beside it an ephemeral disk, all of one recognisable mark, that must
never be found in a bundle.
"""

import hashlib
import json
import lzma
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import IO, Literal, NamedTuple

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


class Run(NamedTuple):
    """Bytes that stand together; the offset counts from the volume's beginning."""

    offset: int
    length: int


@dataclass(frozen=True)
class TemplateFile:
    """A file of the volume whose content is to be filled in.

    Attributes:
        path: From the volume's root, with slashes.
        kind: What its content looks like.
        size: Bytes; the last run may be longer, up to a whole cluster.
        deleted: Whether it was deleted: its record and its clusters are free, and hold what they held.
        runs: Where its content lies, in the order of the file.
    """

    path: str
    kind: Kind
    size: int
    deleted: bool
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Template:
    """A volume of `size` bytes: its files, and where the file system's own bytes stand."""

    size: int
    metadata: tuple[Run, ...]
    files: tuple[TemplateFile, ...]

    def document(self) -> dict[str, object]:
        """As it is written into the stream's first line."""
        rows = [[file.path, file.kind, file.size, file.deleted, file.runs] for file in self.files]
        return {"size": self.size, "metadata": self.metadata, "files": rows}


class TemplateReader:
    """A template's stream while it is read: first `template`, then its bytes in the order of `template.metadata`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        document = json.loads(stream.readline())
        self.template = Template(
            document["size"],
            _runs(document["metadata"]),
            tuple(
                TemplateFile(path, kind, size, deleted, _runs(runs))
                for path, kind, size, deleted, runs in document["files"]
            ),
        )

    def metadata(self) -> Iterator[tuple[Run, bytes]]:
        """Each run of the file system's own bytes; once."""
        for run in self.template.metadata:
            yield run, self._stream.read(run.length)


@contextmanager
def open_template(name: str) -> Iterator[TemplateReader]:
    """Open one of the package's templates by its file name."""
    with files("thrave.demo").joinpath("templates", name).open("rb") as packed, lzma.open(packed) as stream:
        yield TemplateReader(stream)


def _runs(pairs: Sequence[Sequence[int]]) -> tuple[Run, ...]:
    return tuple(Run(offset, length) for offset, length in pairs)


TEMPLATE_SIZES = (64 << 20, 256 << 20, 1 << 30, 4 << 30)
"""Bytes of the disks that there is a template for."""


PARTITION_OFFSET = 1 << 20
"""Bytes; where Windows since Vista puts the first partition."""


EPHEMERAL_MARK = b"THRAVE EPHEMERAL DISK: this must never be found in a bundle.\r\n\r\n"
"""Stands in every 512 bytes of the ephemeral disk."""


DEFAULT_SEED = 2007_10_10


SECTOR = 512


_NTFS = 0x07


_HEADS, _SECTORS = 255, 63  # the geometry that everybody gives to a large disk


class DemoDiskError(ValueError):
    """A disk of this size cannot be made."""


@dataclass(frozen=True)
class DemoDisk:
    """A disk that was made.

    Attributes:
        path: The raw image.
        size: Bytes of the disk; what the volume leaves over at the end is not partitioned.
        volume_size: Bytes of the NTFS volume, which begins at PARTITION_OFFSET.
        files: Those of its files that have a content of their own, the deleted ones among them.
        contents: What stands in them.
    """

    path: Path
    size: int
    volume_size: int
    files: tuple[TemplateFile, ...]
    contents: Contents

    def content(self, file: TemplateFile) -> Iterator[bytes]:
        """The content that a file was given, piece by piece."""
        return self.contents.chunks(file.path, file.kind, file.size)


def make_demo_disk(path: Path, size: int, seed: int = DEFAULT_SEED) -> DemoDisk:
    """Make the root disk of a Windows-like machine.

    Args:
        path: The raw image to make; a file that is there is replaced.
        size: Bytes of the disk. Its volume is the largest that there is a template for.
        seed: Another seed, other contents; the same seed, the same bytes.

    Raises:
        DemoDiskError: `size` is not a number of sectors, or too small.
        OSError: The disk refused.
    """
    check_size(size)
    fitting = [known for known in TEMPLATE_SIZES if known <= size]
    contents = Contents(seed)
    with open_template(template_name(fitting[-1])) as source, _new_image(path, size) as image:
        template = source.template
        os.pwrite(image, _master_boot_record(template.size, seed), 0)
        for run, block in source.metadata():
            os.pwrite(image, block, PARTITION_OFFSET + run.offset)
        for file in template.files:
            _fill(image, file, contents.chunks(file.path, file.kind, file.size))
    return DemoDisk(path, size, template.size, template.files, contents)


def check_size(size: int) -> None:
    """Raise DemoDiskError if no disk of `size` bytes can be made."""
    if size < TEMPLATE_SIZES[0] or size % SECTOR:
        raise DemoDiskError(
            f"a demo disk has whole sectors and at least {TEMPLATE_SIZES[0] >> 20} MiB, not {size} bytes"
        )


def make_ephemeral_disk(path: Path, size: int = 16 << 20) -> None:
    """Make a disk of `size` bytes that is full of EPHEMERAL_MARK, as an instance has beside its root disk.

    Raises:
        DemoDiskError: `size` is not a number of sectors.
        OSError: The disk refused.
    """
    if size % SECTOR:
        raise DemoDiskError(f"a disk has whole sectors, not {size} bytes")
    sector = EPHEMERAL_MARK.ljust(SECTOR, b".")
    with _new_image(path, size) as image:
        os.pwrite(image, sector * (size // SECTOR), 0)


def template_name(disk_size: int) -> str:
    """The package data for a disk of one of TEMPLATE_SIZES."""
    return f"windows-{disk_size >> 20}MiB.xz"


@contextmanager
def _new_image(path: Path, size: int) -> Iterator[int]:
    """A new file of holes, open for writing."""
    with path.open("wb") as file:
        file.truncate(size)
        yield file.fileno()


def _fill(image: int, file: TemplateFile, chunks: Iterator[bytes]) -> None:
    """Write a file's content into its runs, one after the other."""
    chunk = memoryview(b"")
    for run in file.runs:
        offset, end = PARTITION_OFFSET + run.offset, PARTITION_OFFSET + run.offset + run.length
        while offset < end and (chunk := chunk or memoryview(next(chunks, b""))):
            written = os.pwrite(image, chunk[: end - offset], offset)
            offset, chunk = offset + written, chunk[written:]


def _master_boot_record(volume_size: int, seed: int) -> bytes:
    """A classic MBR: no code, one active NTFS partition."""
    first, count = PARTITION_OFFSET // SECTOR, volume_size // SECTOR
    ends = _cylinder_head_sector(first), _cylinder_head_sector(first + count - 1)
    entry = struct.pack("<B3sB3sII", 0x80, ends[0], _NTFS, ends[1], first, count)
    signature = struct.pack("<I", seed & 0xFFFFFFFF)
    return bytes(440) + signature + bytes(2) + entry + bytes(48) + b"\x55\xaa"


def _cylinder_head_sector(lba: int) -> bytes:
    """A sector's address as the BIOS counted; the largest one for all that lie beyond cylinder 1023."""
    cylinder, rest = divmod(lba, _HEADS * _SECTORS)
    if cylinder > 1023:
        return b"\xfe\xff\xff"
    head, sector = divmod(rest, _SECTORS)
    return bytes((head, (sector + 1) | (cylinder >> 2 & 0xC0), cylinder & 0xFF))
