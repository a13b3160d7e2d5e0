"""$Bitmap: one bit for each cluster, set if it is used, beginning with the lowest bit of the first byte.

Looked at through Python's large integers, a million clusters at a time, since a loop over bits would take minutes.
"""

import re
from collections.abc import Iterator

_PIECE = 1 << 20  # clusters looked at together
_ZEROS = re.compile("0+")


def free_runs(bitmap: bytes | bytearray, clusters: int) -> Iterator[tuple[int, int]]:
    """The clusters that are not used.

    Args:
        bitmap: At least one bit for each cluster.
        clusters: How many of its bits count.

    Yields:
        (first cluster, number of clusters), ascending; a run may be told in several pieces that touch.
    """
    for start in range(0, clusters, _PIECE):
        count = min(_PIECE, clusters - start)
        piece = bitmap[start // 8 : (start + count + 7) // 8]
        bits = f"{int.from_bytes(piece, 'little'):0{8 * len(piece)}b}"[::-1][:count]
        for zeros in _ZEROS.finditer(bits):
            yield start + zeros.start(), zeros.end() - zeros.start()


def claim(bitmap: bytearray, first: int, count: int) -> bool:
    """Take a run of used clusters for a file, so that no second one can.

    Args:
        bitmap: What is used and not yet claimed; the run's bits are cleared.
        first: The run's first cluster.
        count: How many.

    Returns:
        Whether all of them were there to be claimed; if not, the bitmap is of no use any more.
    """
    starts = range(first, first + count, _PIECE)
    return all(_claim(bitmap, start, min(_PIECE, first + count - start)) for start in starts)


def _claim(bitmap: bytearray, first: int, count: int) -> bool:
    start, end = first // 8, (first + count + 7) // 8
    bits = int.from_bytes(bitmap[start:end], "little")
    wanted = ((1 << count) - 1) << first % 8
    bitmap[start:end] = (bits & ~wanted).to_bytes(len(bitmap[start:end]), "little")
    return bits & wanted == wanted
