"""CPU time that the libraries alone need for one disk: the limit for Thrave.

    python benchmarks/library_limits.py WORK DISK FOLDER

WORK is `sealing`, `proving` or `inflating`; FOLDER is on tmpfs. Prints CPU seconds by component as JSON. Uses no code
of Thrave, and makes no bundle.
"""

import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from isal import igzip_lib, isal_zlib

CHUNK = 2 << 20
PART_SIZE = 10 << 20
_INPUT_SIZE, _OUTPUT_SIZE = 64 << 10, 256 << 10  # igzip_lib inflates fastest with these
_ZERO = bytes(16)


class Clock:
    """CPU seconds of this process, by component."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, component: str) -> Iterator[None]:
        """Time the block."""
        started = time.process_time()
        yield
        self.seconds[component] += time.process_time() - started


class SealingShare:
    """The work of one process, which encrypts a CBC chain of its own.

    Args:
        folder: On tmpfs, for parts. None is deleted, as in a bundle: the first use of memory costs more.
    """

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self._encryptor = Cipher(algorithms.AES(_ZERO), modes.CBC(_ZERO)).encryptor()
        self._tar_sha1 = hashlib.sha1(usedforsecurity=False)
        self._part_sha1, self._part_sha256 = hashlib.sha1(usedforsecurity=False), hashlib.sha256()
        self._part = memoryview(bytearray(PART_SIZE + 2 * CHUNK))
        self._filled = 0
        self._paths = (folder / f"limit-{os.getpid()}-{number}" for number in count())

    def process(self, disk: int, offset: int, buffer: memoryview) -> None:
        """Process one chunk with all components."""
        timed = self.clock.timed
        with timed("pread"):
            size = os.preadv(disk, [buffer], offset)
        with timed("tar SHA-1"):
            self._tar_sha1.update(buffer[:size])
        with timed("CRC-32"):
            isal_zlib.crc32(buffer[:size])
        with timed("deflate"):
            packed = _deflate(buffer[:size])
        with timed("AES-128-CBC"):
            count = self._encryptor.update_into(packed, self._part[self._filled :])
        added = self._part[self._filled : self._filled + count]
        with timed("part SHA-1"):
            self._part_sha1.update(added)
        with timed("part SHA-256"):
            self._part_sha256.update(added)
        self._filled += count
        if self._filled >= PART_SIZE:
            self.write()

    def write(self) -> None:
        """Write the buffer as a part."""
        with self.clock.timed("write"), next(self._paths).open("wb", buffering=0) as file:
            file.write(self._part[: self._filled])
        self._filled = 0


def sealing(disk: Path, folder: Path) -> dict[str, float]:
    """Measure sealing: one process for each core, each with its share of the chunks, without communication."""
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores) as pool:
        shares = list(pool.map(partial(_seal_share, disk, folder, cores), range(cores)))
    return {component: sum(seconds[component] for seconds in shares) for component in shares[0]}


def proving(disk: Path, _: Path) -> dict[str, float]:
    """Measure reading and SHA-1, which prove that a disk has not changed."""
    clock, sha1 = Clock(), hashlib.sha1(usedforsecurity=False)
    for chunk in _chunks(disk, clock):
        with clock.timed("SHA-1"):
            sha1.update(chunk)
    return clock.seconds


def inflating(disk: Path, _: Path) -> dict[str, float]:
    """Measure inflating the output of ISA-L; one thread, since deflate refers to earlier output."""
    clock = Clock()
    for chunk in _chunks(disk, Clock()):
        packed = memoryview(_deflate(chunk))
        inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE)
        with clock.timed("inflate"):
            for start in range(0, len(packed), _INPUT_SIZE):
                inflater.decompress(packed[start : start + _INPUT_SIZE], _OUTPUT_SIZE)
                while not inflater.needs_input:
                    inflater.decompress(b"", _OUTPUT_SIZE)
    return clock.seconds


WORK = {"sealing": sealing, "proving": proving, "inflating": inflating}


def _seal_share(disk: Path, folder: Path, cores: int, core: int) -> dict[str, float]:
    share, buffer = SealingShare(folder), memoryview(bytearray(CHUNK))
    with disk.open("rb") as file:
        for offset in range(core * CHUNK, os.fstat(file.fileno()).st_size, cores * CHUNK):
            share.process(file.fileno(), offset, buffer)
    share.write()
    return share.clock.seconds


def _chunks(disk: Path, clock: Clock) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(CHUNK))
    with disk.open("rb") as file:
        for offset in range(0, os.fstat(file.fileno()).st_size, CHUNK):
            with clock.timed("pread"):
                size = os.preadv(file.fileno(), [buffer], offset)
            yield buffer[:size]


def _deflate(chunk: memoryview) -> bytes:
    stream = isal_zlib.compressobj(level=2, wbits=-15)
    return stream.compress(chunk) + stream.flush(isal_zlib.Z_SYNC_FLUSH)


def main() -> None:
    work, disk, folder = sys.argv[1:]
    json.dump(WORK[work](Path(disk), Path(folder)), sys.stdout)


if __name__ == "__main__":
    main()
