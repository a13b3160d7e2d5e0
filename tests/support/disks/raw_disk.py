"""Raw disks with content from a seed, so that a failed test can be repeated with the same content."""

import random
from pathlib import Path

RUN = 65536


def make_disk(path: Path, size: int, *, seed: int = 1, holes: bool = True) -> Path:
    """Write a raw disk of `size` bytes: noise, text and perhaps holes, in numbered runs of 64 KiB.

    The noise repeats, but at distances above the window of deflate.
    """
    source = random.Random(seed)
    noise, text = source.randbytes(RUN), (b"The quick brown fox jumps over the lazy dog. " * 1500)[:RUN]
    with path.open("wb") as disk:
        while disk.tell() < size:
            kind = source.randrange(3)
            if kind == 2 and holes:
                disk.seek(RUN, 1)
            else:
                disk.write(disk.tell().to_bytes(8, "little") + (noise if kind else text)[8:])
        disk.truncate(size)
    return path
