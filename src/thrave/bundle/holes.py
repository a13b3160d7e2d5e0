"""Finds what of an image's data need not be written: whoever writes an image begins with an empty one.

Only grains of 64 KiB, counted from the image's beginning, are left out: they are whole pages of a file, whole
clusters of a qcow2 image, and few enough to look at. What is written reads the same either way.
"""

from collections.abc import Iterable, Iterator

from thrave.bundle.untar import Run

GRAIN = 64 * 1024
"""Bytes."""

_ZEROS = bytes(GRAIN)
_GLANCE = 512  # bytes that tell most data from zeros, so that the rest of them need not be copied to be compared


def without_zeros(runs: Iterable[Run]) -> Iterator[Run]:
    """Yield of the runs what is not zeros, in stretches as long as they come."""
    for run in runs:
        yield from _stretches(run)


def _stretches(run: Run) -> Iterator[Run]:
    offset, data = run
    begin = at = 0
    while at < len(data):
        end = min(at + GRAIN - (offset + at) % GRAIN, len(data))
        if _is_zeros(data[at:end]):
            if begin < at:
                yield Run(offset + begin, data[begin:at])
            begin = end
        at = end
    if begin < at:
        yield Run(offset + begin, data[begin:at])


def _is_zeros(grain: memoryview) -> bool:
    glance = grain[:_GLANCE].tobytes()
    return glance == _ZEROS[: len(glance)] and grain.tobytes() == _ZEROS[: len(grain)]
