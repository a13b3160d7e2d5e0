"""A volume of any size, sealed into a store as a bundle task does it: with its records, journal and watch.

    PYTHONPATH=tests python benchmarks/store_sealing.py URL BYTES FOLDER

The volume is simulated: noise that does not repeat within what deflate looks back, made as it is read. Prints the
number of parts as soon as all are stored.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

from support.buckets.upload_policies import ACCESS_KEY_ID, SECRET
from support.service.upload_bench import UploadBench
from thrave.buckets.connection import Credentials, StoreConnection
from thrave.buckets.s3 import OwnersBuckets
from thrave.volumes.volume import Extent

_NOISE = random.Random(1).randbytes(4 << 20)


class NoiseVolume:
    """A disk full of noise."""

    def __init__(self, size: int) -> None:
        self.size = size

    def extents(self) -> Sequence[Extent]:
        """All of it."""
        return [Extent(0, self.size)]

    def will_read(self, offset: int, length: int) -> None:
        """Do nothing."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer."""
        done = 0
        while done < len(buffer):
            start = (offset + done) % len(_NOISE)
            piece = _NOISE[start : start + len(buffer) - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def close(self) -> None:
        """Do nothing."""


def main(url: str, size: int, folder: Path) -> None:
    """Seal."""
    key = Credentials(access_key_id=ACCESS_KEY_ID, secret_access_key=SECRET)
    buckets = OwnersBuckets(StoreConnection(endpoint=url, credentials=key), lambda _access_key_id: None)
    bench = UploadBench(folder, buckets)
    sealed = bench.seal(NoiseVolume(size), at_once=4, stall_timeout=600.0)
    print(len(sealed.parts))
    bench.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
