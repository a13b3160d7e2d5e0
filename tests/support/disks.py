"""Disks for tests: seeded, so that a failing test can be run again on the same bytes."""

import random
from pathlib import Path


def make_disk(path: Path, size: int, *, seed: int = 1, holes: bool = True) -> Path:
    """Write a raw disk of `size` bytes: random, text and, if wanted, holes, in runs of 64 KiB."""
    source = random.Random(seed)
    text = b"The quick brown fox jumps over the lazy dog. " * 2000
    with path.open("wb") as disk:
        while disk.tell() < size:
            run = min(65536, size - disk.tell())
            kind = source.randrange(3)
            if kind == 2 and holes:
                disk.seek(run, 1)
            else:
                disk.write(source.randbytes(run) if kind else text[:run])
        disk.truncate(size)
    return path
