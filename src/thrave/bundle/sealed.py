"""What sealing makes: parts with their bytes, and the records that remain of them.

Data only. A part's bytes are ciphertext; the one secret here, the bundle's key, is shown by no ``repr``.
"""

from dataclasses import dataclass, field

from thrave.bundle.checkpoint import Checkpoint
from thrave.bundle.secrets import BundleSecrets


@dataclass(frozen=True)
class SealedPart:
    """What remains of a part once it has been stored.

    Attributes:
        index: from 0.
        filename: bare name, beside the manifest.
        size: bytes of ciphertext.
        sha1: lower-case hex of the ciphertext's SHA-1, for the manifest.
        sha256: its SHA-256, for the side file.
    """

    index: int
    filename: str
    size: int
    sha1: str
    sha256: str


@dataclass(frozen=True)
class Part(SealedPart):
    """One part as it comes out: its record and its bytes.

    Attributes:
        data: the ciphertext; the consumer's own, nothing reuses its memory.
        checkpoint: from where to go on once this part is stored; None where an earlier one has to serve.
    """

    data: memoryview = field(repr=False)
    checkpoint: Checkpoint | None = field(default=None, repr=False)

    @property
    def record(self) -> SealedPart:
        """The part without its bytes."""
        return SealedPart(self.index, self.filename, self.size, self.sha1, self.sha256)


@dataclass(frozen=True)
class Sealed:
    """A whole bundle but for its manifest.

    Attributes:
        prefix: the image's name and the stem of the file names.
        size: bytes of the image.
        digest: lower-case hex SHA-1 of the tar stream.
        secrets: what the manifest's slots will carry.
        parts: in order, at least one, none empty.
    """

    prefix: str
    size: int
    digest: str
    secrets: BundleSecrets = field(repr=False)
    parts: tuple[SealedPart, ...]

    @property
    def bundled_size(self) -> int:
        """Bytes of all parts together."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class CutOff:
    """What remains of a sealing that was cut off: its last checkpoint, and the parts up to there."""

    checkpoint: Checkpoint
    parts: tuple[SealedPart, ...]
