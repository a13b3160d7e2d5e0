"""Verifies a sample of a bundle's parts, and of the others that they are there and have their size.

For a bundle of many gigabytes that is looked at often. It never calls a bundle verified of which it has read only a
part: the report says what was not read, and with which seed the sample was drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from thrave.bundle.crew import Crew
from thrave.bundle.errors import ManifestError, PartDamagedError
from thrave.bundle.manifest import Manifest, ManifestPart
from thrave.bundle.opening import Reporter, unheard
from thrave.bundle.partsource import PartSource
from thrave.bundle.report import Check, Subject, Verified
from thrave.bundle.verifying import Believed, check_part


class MeasuredParts(PartSource, Protocol):
    """Parts whose size is known without reading them."""

    def size(self, filename: str) -> int:
        """Return a part's size in bytes.

        Raises:
            PartMissingError: it is not there or cannot be asked for.
        """
        ...


@dataclass(frozen=True)
class Sample:
    """How a sample is drawn: the same of the same bundle each time.

    Attributes:
        percent: of the parts, rounded up; above 0, to 100.
        seed: of the random choice.
    """

    percent: float
    seed: int

    def of(self, manifest: Manifest) -> Sequence[ManifestPart]:
        """Return the parts of the sample, in their order."""
        count = min(math.ceil(len(manifest.parts) * self.percent / 100), len(manifest.parts))
        chosen = Random(self.seed).sample(manifest.parts, count)  # noqa: S311 - a sample, no secret
        return sorted(chosen, key=lambda part: part.index)


def verify_sample(
    believed: Believed,
    parts: MeasuredParts,
    sample: Sample,
    *,
    reporter: Reporter = unheard,
    ahead: int,
) -> Verified:
    """Check the size of each part of a bundle, and the digests of some.

    Args:
        believed: its manifest, read and checked by `believe`; errors are as for ``verify_bundle``.
        parts: where the parts are.
        sample: which of them are read.
        reporter: told how many bytes have been read.
        ahead: how many parts are asked for at once, each in memory.
    """
    chosen = sample.of(believed.manifest)
    with Crew(ahead) as crew:
        _check_sizes(believed, list(crew.map(lambda part: parts.size(part.filename), believed.manifest.parts, ahead)))
        done = 0
        for size in crew.map(lambda part: _verified_size(parts, part, believed), chosen, ahead):
            done += size
            reporter(done)
    return Verified(believed.manifest, (*believed.checks, *_checks(believed.manifest, sample, len(chosen))))


def _check_sizes(believed: Believed, sizes: Sequence[int]) -> None:
    if sum(sizes) != believed.manifest.bundled_size:
        raise ManifestError(f"the parts have {sum(sizes)} bytes together, not {believed.manifest.bundled_size}")
    for part, size in zip(believed.manifest.parts, sizes, strict=True):
        if believed.side is not None and believed.side.parts[part.filename].size != size:
            raise PartDamagedError(part.filename, "its size is not the side file's")


def _verified_size(parts: PartSource, part: ManifestPart, believed: Believed) -> int:
    data = parts.read(part.filename)
    check_part(part, data, believed.side)
    return len(data)


def _checks(manifest: Manifest, sample: Sample, verified: int) -> tuple[Check, ...]:
    count = len(manifest.parts)
    there = f"{count} parts are there, {manifest.bundled_size} bytes together"
    drawn = f"{verified} of {count} parts, drawn with seed {sample.seed}, hold; {count - verified} have not been read"
    reason = "only a sample was read"
    return (
        Check(Subject.PART_SIZES, checked=True, detail=there),
        Check(Subject.PART_DIGESTS, checked=verified == count, detail=drawn),
        Check(Subject.IMAGE_DIGEST, checked=False, detail=reason),
        Check(Subject.IMAGE_SIZE, checked=False, detail=reason),
    )
