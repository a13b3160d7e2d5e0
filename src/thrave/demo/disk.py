"""The disks of `thrave demo`: a Windows-like root disk with an NTFS volume, and an ephemeral disk.

The file system comes from a template: an NTFS volume of mkntfs and ntfs-3g without the contents of its files, stored as
package data by scripts/make_demo_templates.py. The contents come from a seed, so the same seed gives the same bytes on
every machine. Creating a disk needs neither root nor a program. The disk does not boot.
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


CHUNK = 1 << 20  # bytes that are generated at once
_POOL_SIZE = 4 << 20  # bytes from which programs and texts are cut; far more than a deflate window
_CHOICES = 1 << 16  # a choice is 16 random bits


class Contents:
    """The contents of all files of one disk, generated with SHAKE-128, about as compressible as those of real files.

    A program consists of byte sequences of which few are frequent, a text of lines like those of a log. No content
    comes from a real machine.

    Args:
        seed: Another seed gives other bytes.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def chunks(self, name: str, kind: Kind, size: int) -> Iterator[bytes]:
        """Yield the content of one file, in pieces of at most CHUNK bytes.

        Args:
            name: Path of the file; files with different paths have different contents.
            kind: Kind of content, which decides how well it compresses.
            size: Bytes of the file.
        """
        make = self._generators[kind]
        for offset in range(0, size, CHUNK):
            yield make(f"{name}@{offset}", min(CHUNK, size - offset))

    @cached_property
    def _generators(self) -> dict[Kind, Callable[[str, int], bytes]]:
        return {"program": self._program, "text": self._text, "random": self._random, "zeros": _zeros}

    def _random(self, label: str, size: int) -> bytes:
        return hashlib.shake_128(f"{self._seed}:{label}".encode()).digest(size)

    def _program(self, label: str, size: int) -> bytes:
        """Return a piece of the pool in its own alphabet: as compressible as the pool, but equal to no other piece."""
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
        """Return a pool of pieces in which the first ones are far more frequent than the last ones."""
        table = [pieces[len(pieces) * choice**3 // _CHOICES**3] for choice in range(_CHOICES)]
        average = sum(map(len, table)) / _CHOICES
        choices = memoryview(self._random(label, 2 * int(_POOL_SIZE / average))).cast("H")
        return b"".join(map(table.__getitem__, choices))


_LETTERS = str.maketrans("0123456789abcdef", "etaoinshrdlcumwf")


def _zeros(_label: str, size: int) -> bytes:
    return bytes(size)


class Run(NamedTuple):
    """A range of bytes; the offset counts from the start of the volume."""

    offset: int
    length: int


@dataclass(frozen=True)
class TemplateFile:
    """A file of the volume whose content is not in the template.

    Attributes:
        path: From the root of the volume, with slashes.
        kind: Kind of content.
        size: Bytes; the last run may be longer, up to a whole cluster.
        deleted: Whether the file was deleted: its record and clusters are free, but still contain its data.
        runs: Where the content is, in the order of the file.
    """

    path: str
    kind: Kind
    size: int
    deleted: bool
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Template:
    """A volume of `size` bytes: its files, and the ranges of the file system's own data."""

    size: int
    metadata: tuple[Run, ...]
    files: tuple[TemplateFile, ...]

    def document(self) -> dict[str, object]:
        """Return the JSON document that is the first line of the stream."""
        rows = [[file.path, file.kind, file.size, file.deleted, file.runs] for file in self.files]
        return {"size": self.size, "metadata": self.metadata, "files": rows}


class TemplateReader:
    """Reads a template: a line of JSON, then the bytes of the file system in the order of `template.metadata`."""

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
        """Yield each range of the file system's own data. Can be called once."""
        for run in self.template.metadata:
            yield run, self._stream.read(run.length)


@contextmanager
def open_template(name: str) -> Iterator[TemplateReader]:
    """Open a template of the package by its file name."""
    with files("thrave.demo").joinpath("templates", name).open("rb") as packed, lzma.open(packed) as stream:
        yield TemplateReader(stream)


def _runs(pairs: Sequence[Sequence[int]]) -> tuple[Run, ...]:
    return tuple(Run(offset, length) for offset, length in pairs)


TEMPLATE_SIZES = (64 << 20, 256 << 20, 1 << 30, 4 << 30)
"""Sizes in bytes of the disks for which a template exists."""
PARTITION_OFFSET = 1 << 20
"""Bytes; where Windows since Vista creates the first partition."""
EPHEMERAL_MARK = b"THRAVE EPHEMERAL DISK: this must never be found in a bundle.\r\n\r\n"
"""Start of every sector of the ephemeral disk."""
DEFAULT_SEED = 2007_10_10
SECTOR = 512
_PARTITION_TYPE_NTFS = 0x07
_HEADS, _SECTORS = 255, 63  # the usual geometry of large disks in an MBR


class DemoDiskError(ValueError):
    """A disk of this size cannot be made."""


@dataclass(frozen=True)
class DemoDisk:
    """A demo disk that was created.

    Attributes:
        path: The raw image.
        size: Bytes of the disk; space after the volume is not partitioned.
        volume_size: Bytes of the NTFS volume, which starts at PARTITION_OFFSET.
        files: Its files with generated contents, including deleted ones.
        contents: Generates these contents.
    """

    path: Path
    size: int
    volume_size: int
    files: tuple[TemplateFile, ...]
    contents: Contents

    def content(self, file: TemplateFile) -> Iterator[bytes]:
        """Yield the content of a file, in pieces."""
        return self.contents.chunks(file.path, file.kind, file.size)


def make_demo_disk(path: Path, size: int, seed: int = DEFAULT_SEED) -> DemoDisk:
    """Create the root disk of a Windows-like machine: an MBR and one NTFS volume with its files.

    About half of the disk is data; some of this data is zeros, and some belongs to deleted files. The rest are holes.

    Args:
        path: The raw image; an existing file is replaced.
        size: Bytes of the disk. The volume has the size of the largest template that fits.
        seed: Seed of the file contents.

    Raises:
        DemoDiskError: `size` is too small, or not a multiple of 512.
        OSError: The image cannot be written.
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
    """Raise DemoDiskError if a disk cannot have `size` bytes."""
    if size < TEMPLATE_SIZES[0] or size % SECTOR:
        raise DemoDiskError(
            f"a demo disk needs a multiple of {SECTOR} bytes, at least {TEMPLATE_SIZES[0] >> 20} MiB, not {size} bytes"
        )


def make_ephemeral_disk(path: Path, size: int = 16 << 20) -> None:
    """Create a disk of `size` bytes in which every sector starts with EPHEMERAL_MARK.

    Raises:
        DemoDiskError: `size` is not a multiple of 512.
        OSError: The image cannot be written.
    """
    if size % SECTOR:
        raise DemoDiskError(f"a disk needs a multiple of {SECTOR} bytes, not {size} bytes")
    sector = EPHEMERAL_MARK.ljust(SECTOR, b".")
    with _new_image(path, size) as image:
        os.pwrite(image, sector * (size // SECTOR), 0)


def template_name(disk_size: int) -> str:
    """Return the file name of the template for a disk size of TEMPLATE_SIZES."""
    return f"windows-{disk_size >> 20}MiB.xz"


@contextmanager
def _new_image(path: Path, size: int) -> Iterator[int]:
    """Create a file that is one hole, and yield its descriptor."""
    with path.open("wb") as file:
        file.truncate(size)
        yield file.fileno()


def _fill(image: int, file: TemplateFile, chunks: Iterator[bytes]) -> None:
    """Write the content of a file into its runs, in their order."""
    chunk = memoryview(b"")
    for run in file.runs:
        offset, end = PARTITION_OFFSET + run.offset, PARTITION_OFFSET + run.offset + run.length
        while offset < end and (chunk := chunk or memoryview(next(chunks, b""))):
            written = os.pwrite(image, chunk[: end - offset], offset)
            offset, chunk = offset + written, chunk[written:]


def _master_boot_record(volume_size: int, seed: int) -> bytes:
    """Return an MBR with one active NTFS partition and without boot code."""
    first, count = PARTITION_OFFSET // SECTOR, volume_size // SECTOR
    ends = _cylinder_head_sector(first), _cylinder_head_sector(first + count - 1)
    entry = struct.pack("<B3sB3sII", 0x80, ends[0], _PARTITION_TYPE_NTFS, ends[1], first, count)
    signature = struct.pack("<I", seed & 0xFFFFFFFF)
    return bytes(440) + signature + bytes(2) + entry + bytes(48) + b"\x55\xaa"


def _cylinder_head_sector(lba: int) -> bytes:
    """Return the CHS address of a sector; the largest address for every sector beyond cylinder 1023."""
    cylinder, rest = divmod(lba, _HEADS * _SECTORS)
    if cylinder > 1023:
        return b"\xfe\xff\xff"
    head, sector = divmod(rest, _SECTORS)
    return bytes((head, (sector + 1) | (cylinder >> 2 & 0xC0), cylinder & 0xFF))
