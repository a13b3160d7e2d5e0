"""Where a sealing can go on after it was cut off: what is known at the end of each part.

A checkpoint is small and holds no secret, and of the disk no more than digests; whoever keeps it keeps the key
elsewhere. It proves two things on the way back, so that nothing is ever enciphered with one key from two states of a
disk or by two compressors: the chunk in which the part ends must be deflated to the same bytes as far as parts hold
them, and the tar stream before it must have the same digests. Nothing here is read from a disk or written to one.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from thrave.bundle.errors import ResumeError


@dataclass(frozen=True)
class StreamPoint:
    """A place in the tar stream, at a chunk's beginning.

    Attributes:
        offset: bytes of the tar stream before it.
        crc: their CRC-32, which goes on from here.
        proven: the first bytes of the stream whose SHA-1 is known: all of the offset, unless the sealing was cut off
            before; then those of the first time.
        sha1: lower-case hex of that SHA-1.
    """

    offset: int
    crc: int
    proven: int
    sha1: str


@dataclass(frozen=True)
class Checkpoint:
    """The end of a part.

    Attributes:
        parts: how many parts there are up to here.
        chunk: where the chunk begins in whose midst the part ends.
        skip: bytes of that chunk, deflated, that the parts hold already.
        skipped: lower-case hex of their SHA-256.
        last_block: hex of the last block of ciphertext, with which CBC goes on.
    """

    parts: int
    chunk: StreamPoint
    skip: int
    skipped: str
    last_block: str

    @classmethod
    def at(cls, parts: int, ciphertext: memoryview, chunk: StreamPoint, begun: memoryview) -> "Checkpoint":
        """The end of a part with this ciphertext, when `parts` parts hold the `begun` deflated bytes of a chunk."""
        return cls(parts, chunk, len(begun), hashlib.sha256(begun).hexdigest(), ciphertext[-16:].hex())

    def rest_of(self, deflated: memoryview) -> memoryview:
        """What of the chunk is still to be enciphered.

        Raises:
            ResumeError: it was deflated to other bytes than before: another disk, compression, library or processor.
        """
        if hashlib.sha256(deflated[: self.skip]).hexdigest() != self.skipped:
            raise ResumeError("the chunk at which the sealing was cut off is deflated to other bytes now")
        return deflated[self.skip :]

    def to_json(self) -> dict[str, Any]:
        """The checkpoint as JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Checkpoint":
        """A checkpoint from what `to_json` made of it."""
        return cls(**{**document, "chunk": StreamPoint(**document["chunk"])})
