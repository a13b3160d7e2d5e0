"""The limit: what the libraries need for one disk's chunks, with nothing between them.

Run as a program: one process a core, each with its share of the chunks and no word to the others, takes them through
all components one after the other. Prints CPU seconds by component, summed over the processes, as JSON. It uses nothing
of Thrave's, and makes no bundle: each process enciphers a chain of its own.
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
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from isal import isal_zlib

CHUNK = 1 << 20
PART_SIZE = 10 << 20
_ZERO = bytes(16)


class Components:
    """One process's share of the work.

    Args:
        folder: on tmpfs, for parts; each is removed before the next is written.
    """

    def __init__(self, folder: Path) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._encryptor = Cipher(algorithms.AES(_ZERO), modes.CBC(_ZERO)).encryptor()
        self._tar_sha1 = hashlib.sha1(usedforsecurity=False)
        self._part_sha1, self._part_sha256 = hashlib.sha1(usedforsecurity=False), hashlib.sha256()
        self._part = memoryview(bytearray(PART_SIZE + 2 * CHUNK))
        self._filled = 0
        self._path = folder / f"limit-{os.getpid()}"

    def take(self, disk: int, offset: int, buffer: memoryview) -> None:
        """Take one chunk through all components."""
        with self._timed("pread"):
            size = os.preadv(disk, [buffer], offset)
        with self._timed("tar SHA-1"):
            self._tar_sha1.update(buffer[:size])
        with self._timed("CRC-32"):
            isal_zlib.crc32(buffer[:size])
        with self._timed("deflate"):
            stream = isal_zlib.compressobj(level=2, wbits=-15)
            packed = stream.compress(buffer[:size]) + stream.flush(isal_zlib.Z_SYNC_FLUSH)
        with self._timed("AES-128-CBC"):
            count = self._encryptor.update_into(packed, self._part[self._filled :])
        fresh = self._part[self._filled : self._filled + count]
        with self._timed("part SHA-1"):
            self._part_sha1.update(fresh)
        with self._timed("part SHA-256"):
            self._part_sha256.update(fresh)
        self._filled += count
        if self._filled >= PART_SIZE:
            self.write()

    def write(self) -> None:
        """Write what is there as a part."""
        with self._timed("write"), self._path.open("wb", buffering=0) as file:
            file.write(self._part[: self._filled])
        self._path.unlink()
        self._filled = 0

    @contextmanager
    def _timed(self, component: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds[component] += time.process_time() - began


def share(disk: Path, folder: Path, cores: int, core: int) -> dict[str, float]:
    """Do one core's share of the chunks."""
    components, buffer = Components(folder), memoryview(bytearray(CHUNK))
    with disk.open("rb") as file:
        for offset in range(core * CHUNK, os.fstat(file.fileno()).st_size, cores * CHUNK):
            components.take(file.fileno(), offset, buffer)
    components.write()
    return components.seconds


def main() -> None:
    disk, folder = map(Path, sys.argv[1:])
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores) as pool:
        shares = list(pool.map(partial(share, disk, folder, cores), range(cores)))
    json.dump({component: sum(seconds[component] for seconds in shares) for component in shares[0]}, sys.stdout)


if __name__ == "__main__":
    main()
