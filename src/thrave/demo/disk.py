"""A Windows-like root disk, made on the spot without root or any tool: an MBR and one NTFS volume with its files.

The file system comes from a template (see `template.py`), the files' contents from a seed. About half of the disk
is data, some of it written zeros and some of it deleted files, whose clusters are free and still hold what they
held; the rest are holes. It does not boot. Beside it an ephemeral disk, all of one recognisable mark, that must
never be found in a bundle.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from thrave.demo.content import Contents
from thrave.demo.template import TemplateFile, open_template

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
