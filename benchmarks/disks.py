"""The disks that the benchmarks bundle: what is in them, how they are made, stored, compared and kept in memory.

Every disk is made from a seed, never from files of this machine, and is stored outside the checkout. A disk is found
again by a digest of its description and of the code that makes it; it can be deleted at any time.
"""

import hashlib
import mmap
import os
import random
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import TypeVar

import psutil
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from thrave.demo import disk as content
from thrave.demo.disk import Contents, Kind

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
SEED = 20071010
SHARES: dict[Kind, float] = {"program": 0.5, "random": 0.2, "text": 0.1, "zeros": 0.2}
"""Shares of a mixed disk's bytes. Zeros are written: a file system stores them, unlike holes."""

DEFAULT_FOLDER = Path.home() / ".cache" / "thrave-bench"

_BLOCK = 4096  # bytes
_READ_SIZE = MIB
_MIN_FREE = 4 * GIB  # that remain free on the file system of the disks
_MAX_FILE = 8 * MIB

T = TypeVar("T")


class CannotMakeError(Exception):
    """Something that is needed to make a disk is missing: a program, a right, or space."""


# Contents of files.


class RealisticContents(Contents):
    """Contents that are as hard to compress as real files; those of the demo are easier.

    Programs consist of a few frequent opcodes whose operands have a few frequent values, and of tables. For deflate
    this is like real programs: many short matches and long chains to search. gzip -9 needs about 65 times the CPU of
    ISA-L's level 2, gzip -6 about 18 times (69 and 12 for the programs of a Linux system); the result has about half
    the size. All choices come from an AES-CTR keystream. A test compares the bytes with digests, so that a change of
    the demo cannot change what is measured.
    """

    _POOL_SIZE = 8 * MIB  # far more than deflate's window of 32 KiB
    _TABLE_PIECE = 64 * KIB  # of a table, after twice as much code

    def _random(self, label: str, size: int) -> bytes:
        key = hashlib.sha256(f"{self._seed}:{label}".encode()).digest()
        return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(size))

    def _numbers(self, label: str, count: int) -> memoryview:
        """Random numbers of 16 bits."""
        return memoryview(self._random(label, 2 * count)).cast("H")

    @cached_property
    def _program_pool(self) -> bytes:
        """Two thirds code, one third tables, alternating."""
        code, table, piece = self._code(), self._relocations(), self._TABLE_PIECE
        return b"".join(
            code[2 * start : 2 * (start + piece)] + table[start : start + piece]
            for start in range(0, len(table), piece)
        )

    def _code(self) -> bytes:
        opcodes = _weight_first([self._random(f"opcode {i}", 1 + i % 4) for i in range(64)], 2)
        draws = self._numbers("instructions", 4 * 12288)
        instructions = [opcodes[draws[i]] + _operand(*draws[i + 1 : i + 4]) for i in range(0, len(draws), 4)]
        return self._pool("code", _weight_first(instructions, 3), lambda number: number.to_bytes(2, "little"))

    def _relocations(self) -> bytes:
        """Records of 24 bytes as in ELF: an increasing offset, a type, an address."""
        record = struct.Struct("<QQQ")
        draws = self._numbers("relocations", self._POOL_SIZE // 3 // record.size)
        offsets = accumulate(8 * (1 + draw % 16 if draw % 8 == 0 else 1) for draw in draws)
        return b"".join(
            record.pack(offset, 8, 0x140000 + (16 * draw if draw & 32 else 3 * offset & ~15))
            for offset, draw in zip(offsets, draws, strict=True)
        )

    @cached_property
    def _text_pool(self) -> bytes:
        letters = str.maketrans("0123456789abcdef", "etaoinshrdlcumwf")
        words = _weight_first([self._random(f"word {i}", 1 + i % 5).hex().translate(letters) for i in range(2048)], 3)
        draws = self._numbers("phrases", 4 * 1024)
        phrases = [" ".join(words[draw] for draw in draws[i : i + 4]) + ", " for i in range(0, len(draws), 4)]
        table = _weight_first([phrase.encode() for phrase in phrases], 3)
        return self._pool("texts", table, lambda number: b"%d\r\n" % number)

    def _pool(self, label: str, table: Sequence[bytes], unique: Callable[[int], bytes]) -> bytes:
        """Choose pieces from a table; after each seven comes a `unique` one, such as an address or a time."""
        average = sum(map(len, table)) / len(table)
        choices = self._numbers(label, int(1.2 * self._POOL_SIZE / average) // 8 * 8)
        pieces = [table[choice] for choice in choices]
        pieces[7::8] = [unique(choice) for choice in choices[7::8]]
        return b"".join(pieces)


def _weight_first(items: Sequence[T], power: int) -> list[T]:
    """Make a table for choices of 16 bits, in which the first items are far more frequent than the last."""
    choices = 1 << 16
    return [items[len(items) * choice**power // choices**power] for choice in range(choices)]


def _operand(kind: int, value: int, other: int) -> bytes:
    """Make no operand, the offset of a local variable, or a short distance to other code, forwards or backwards."""
    match kind % 8:
        case 0 | 1 | 2:
            return b""
        case 3 | 4 | 5:
            return bytes([value % (1 + other % 32) * 8])
        case 6:
            return value.to_bytes(2, "little") + bytes([other % 8, 0])
        case _:
            return value.to_bytes(2, "little") + bytes([255 - other % 8, 255])


# Descriptions of disks.


@dataclass(frozen=True)
class Disk:
    """Description of one disk.

    Attributes:
        name: Of its file.
        make: Writes the file.
        stored: About how many bytes it takes on the file system.
    """

    name: str
    make: "Callable[[Path, DiskFolder], None]"
    stored: int


class DiskFolder:
    """Makes disks, and keeps them.

    Args:
        folder: On a real file system with holes, not on tmpfs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, disk: Disk) -> Path:
        """Return the file of a disk; make it if it does not exist.

        Raises:
            CannotMakeError: Too little free space, or a program or right is missing.
        """
        path = self._folder / f"{disk.name}-{_digest(disk)}.raw"
        if not path.exists():
            print(f"making {path} …", flush=True)
            for outdated in self._folder.glob(f"{disk.name}-*"):
                outdated.unlink()
            if shutil.disk_usage(self._folder).free < disk.stored + _MIN_FREE:
                raise CannotMakeError(f"not enough free space: {path} needs {disk.stored / GIB:.0f} GiB")
            unfinished = path.with_suffix(".unfinished")
            disk.make(unfinished, self)
            unfinished.rename(path)
        return path


def mixed(size: int) -> Disk:
    """Files of all kinds in a shuffled order, at whole blocks; no holes."""

    def make(path: Path, _: DiskFolder) -> None:
        _write_files(path, _mixed_files(size))

    return Disk(f"mixed-{size // MIB}MiB", make, size)


def incompressible(size: int) -> Disk:
    """Random bytes."""

    def make(path: Path, _: DiskFolder) -> None:
        _write_files(path, [("random", "random", size)])

    return Disk(f"incompressible-{size // MIB}MiB", make, size)


def sparse(virtual: int, data: int, extents: int) -> Disk:
    """The bytes of the mixed disk of size `data`, in extents all over a larger disk."""

    def make(path: Path, folder: DiskFolder) -> None:
        with folder.path(mixed(data)).open("rb") as source, path.open("wb") as disk:
            disk.truncate(virtual)
            for target, start, length in _scatter(virtual, data, extents):
                os.pwrite(disk.fileno(), os.pread(source.fileno(), length, start), target)

    return Disk(f"sparse-{virtual // GIB}GiB-with-{data // MIB}MiB", make, data)


def empty(virtual: int) -> Disk:
    """One hole."""

    def make(path: Path, _: DiskFolder) -> None:
        with path.open("wb") as disk:
            disk.truncate(virtual)

    return Disk(f"empty-{virtual // GIB}GiB", make, 0)


def windows(scale: float) -> Disk:
    """An NTFS disk in use, of 8 GiB times `scale`; see `make_windows_disk`."""

    def make(path: Path, _: DiskFolder) -> None:
        make_windows_disk(path, scale)

    return Disk(f"windows-{int(8192 * scale)}MiB", make, int(8192 * scale) * MIB)


def _mixed_files(size: int) -> list[tuple[str, Kind, int]]:
    """Name, kind and size in bytes of files that have `size` bytes in total, in their order on the disk."""
    rng = random.Random(f"{SEED}:{size}")
    files = [file for kind, share in SHARES.items() for file in _files_of(kind, int(size * share), rng)]
    rng.shuffle(files)
    missing = size - sum(length for *_, length in files)
    return [*files, ("rest", "random", missing)]


def _files_of(kind: Kind, budget: int, rng: random.Random) -> Iterator[tuple[str, Kind, int]]:
    number = 0
    while budget >= _BLOCK:
        blocks = int(rng.lognormvariate(4, 1.5)) + 1
        length = min(blocks * _BLOCK, _MAX_FILE, budget // _BLOCK * _BLOCK)
        yield f"{kind} {number}", kind, length
        budget, number = budget - length, number + 1


def _scatter(virtual: int, data: int, extents: int) -> Iterator[tuple[int, int, int]]:
    """Offset on the disk, offset in the data, and length of each extent; holes between all of them."""
    rng = random.Random(f"{SEED}:{virtual}:{data}")
    cuts = sorted(rng.sample(range(1, data // _BLOCK), extents - 1))
    gaps = sorted(rng.sample(range(1, (virtual - data) // _BLOCK), extents))
    bounds = [0, *cuts, data // _BLOCK]
    for gap, start, end in zip(gaps, bounds[:-1], bounds[1:], strict=True):
        yield (gap + start) * _BLOCK, start * _BLOCK, (end - start) * _BLOCK


def _write_files(path: Path, files: Iterable[tuple[str, Kind, int]]) -> None:
    contents = RealisticContents(SEED)
    with path.open("wb") as disk:
        for name, kind, size in files:
            for chunk in contents.chunks(name, kind, size):
                disk.write(chunk)


def _digest(disk: Disk) -> str:
    code = b"".join(Path(source).read_bytes() for source in (__file__, content.__file__))
    return hashlib.sha256(f"{disk.name}:{SEED}".encode() + code).hexdigest()[:12]


# The NTFS disk.

_PARTITION_OFFSET = MIB  # where Windows puts the first partition
_KINDS: tuple[Kind, ...] = (
    "program", "program", "program", "program", "program", "text", "random", "random", "zeros", "zeros",
)  # fmt: skip
_SYSTEM_FILES = {"pagefile.sys": 512, "hiberfil.sys": 320, "swapfile.sys": 16}  # MiB
_WRITTEN, _DELETED, _REWRITTEN = 550, 240, 70  # files of 4 MiB


@dataclass(frozen=True)
class _File:
    """A file that is written: path from the root of the volume, kind, bytes, and whether it is not deleted again."""

    path: str
    kind: Kind
    size: int
    stays: bool = True


def make_windows_disk(path: Path, scale: float) -> None:
    """Make an NTFS disk with files, deleted files, files written over their clusters, and a page file.

    mkntfs makes the volume and ntfs-3g fills it, so every structure on it is theirs. With `scale` 1 the disk has 8
    GiB: 2.3 GB are written, 1.0 GB of them deleted, 0.3 GB written again; a page, a hibernation and a swap file have
    848 MiB, and are not empty.

    Raises:
        CannotMakeError: mkntfs or ntfs-3g is missing, or FUSE, or the right to mount.
    """
    volume = path.with_suffix(".volume")
    try:
        size = int(8192 * scale) * MIB - 2 * _PARTITION_OFFSET
        with volume.open("wb") as file:
            file.truncate(size)
        geometry = ("-p", str(_PARTITION_OFFSET // 512), "-H", "255", "-S", "63", "-s", "512")
        _run_program("mkntfs", "-F", "-Q", "-q", *geometry, str(volume))
        with _mounted(volume) as root:
            _fill_volume(root, scale)
        with path.open("wb") as file:
            file.truncate(size + 2 * _PARTITION_OFFSET)
        table = f"label: dos\nstart={_PARTITION_OFFSET // 512}, size={size // 512}, type=7, bootable\n"
        _run_program("sfdisk", "--quiet", str(path), stdin=table)
        copy_data(volume, path, _PARTITION_OFFSET)
    finally:
        volume.unlink(missing_ok=True)


def has_windows_files(disk: Path, scale: float) -> bool:
    """Whether a disk can be mounted and has all files of `make_windows_disk`, except for the system's."""
    volume, contents = disk.with_suffix(".volume"), RealisticContents(SEED)
    with volume.open("wb") as file:
        file.truncate(disk.stat().st_size - 2 * _PARTITION_OFFSET)
    copy_data(disk, volume, -_PARTITION_OFFSET)
    with _mounted(volume, "-o", "ro") as root:
        found = {path.name for path in (root / "Windows").iterdir()}
        expected = [file for file in (*_first_files(scale), *_later_files(scale)) if file.stays]
        return found == {Path(file.path).name for file in expected} and all(
            (root / file.path).read_bytes() == b"".join(contents.chunks(file.path, file.kind, file.size))
            for file in expected
        )


def _fill_volume(root: Path, scale: float) -> None:
    contents = RealisticContents(SEED)

    def write(file: _File) -> None:
        with (root / file.path).open("wb") as output:
            for chunk in contents.chunks(file.path, file.kind, file.size):
                output.write(chunk)

    (root / "Windows").mkdir()
    system_files = (_File(name, "program", int(size * scale) * MIB) for name, size in _SYSTEM_FILES.items())
    for file in (*system_files, *_first_files(scale)):
        write(file)
    os.sync()
    for file in _first_files(scale):
        if not file.stays:
            (root / file.path).unlink()
    for file in _later_files(scale):
        write(file)


def _first_files(scale: float) -> Iterator[_File]:
    for number in range(_WRITTEN):
        stays = number % 2 != 0 or number >= 2 * _DELETED
        yield _File(f"Windows/first{number:03}.bin", _KINDS[number % len(_KINDS)], int(4 * scale * MIB), stays)


def _later_files(scale: float) -> Iterator[_File]:
    for number in range(_REWRITTEN):
        yield _File(f"Windows/later{number:03}.bin", _KINDS[number % len(_KINDS)], int(4 * scale * MIB))


@contextmanager
def _mounted(volume: Path, *options: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        _run_program("ntfs-3g", *options, str(volume), folder)
        try:
            yield Path(folder)
        finally:
            _run_program("umount", folder)


def _run_program(program: str, *arguments: str, stdin: str = "") -> None:
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise CannotMakeError(f"{program} is not installed")
    done = subprocess.run([found, *arguments], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotMakeError(f"{program}: {(done.stderr or done.stdout).strip()}")


# Files with holes. Only data are read, so that files of terabytes cost nothing for their holes.


def data_extents(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and length in bytes of each extent of data, by SEEK_DATA and SEEK_HOLE (lseek(2))."""
    with path.open("rb") as file:
        size, end = os.fstat(file.fileno()).st_size, 0
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: the rest is a hole
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, end - start


def stored_bytes(path: Path) -> int:
    """Bytes of data in a file."""
    return sum(length for _, length in data_extents(path))


def copy_data(source: Path, target: Path, shift: int) -> None:
    """Copy only the data into an existing file, `shift` bytes further on; data before its beginning are left out."""
    with source.open("rb") as read, target.open("rb+") as write:
        for start, length in _split(data_extents(source)):
            if start + shift >= 0:
                os.pwrite(write.fileno(), os.pread(read.fileno(), length, start), start + shift)


def are_equal(one: Path, other: Path) -> bool:
    """Whether two files have the same bytes; reads only what is data in at least one of them."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        return all(
            os.pread(first.fileno(), length, start) == os.pread(second.fileno(), length, start)
            for start, length in _split(chain(data_extents(one), data_extents(other)))
        )


def _split(extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for offset, length in extents:
        for start in range(offset, offset + length, _READ_SIZE):
            yield start, min(_READ_SIZE, offset + length - start)


@contextmanager
def kept_in_memory(disks: Iterable[Path]) -> Iterator[None]:
    """Keep disks in the page cache, so that every contender reads them from memory.

    The kernel may drop any page that no process has mapped. A virtual machine drops them to return memory to its
    host; then one contender would read memory and another the disk. Disks with more data than half of the memory are
    not kept.
    """
    available = psutil.virtual_memory().total // 2
    with ExitStack() as mappings:
        for disk in disks:
            if 0 < stored_bytes(disk) <= available:
                mappings.enter_context(_mapped(disk))
        yield


@contextmanager
def _mapped(disk: Path) -> Iterator[None]:
    with disk.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        mapping.madvise(mmap.MADV_RANDOM)
        for start, length in _split(data_extents(disk)):
            # Read as other programs do: through a mapping for random access the kernel would store page by page, and
            # reading those takes longer.
            os.pread(file.fileno(), length, start)
            mapping[start : start + length : mmap.PAGESIZE]  # an access maps the page
        yield
