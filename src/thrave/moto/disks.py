"""The root disks of moto's instances, which have none of their own: generated, and the same for the same instance."""

import hashlib
from collections.abc import Sequence

SIZE = 4 << 20  # bytes of a disk
_USED = 1 << 20  # bytes at its start and at its middle that are not zeros, together


class GeneratedDisk:
    """The root disk of one instance, in memory. An image for `thrave.bundle.Sealer`.

    Args:
        instance_id: The content depends on it alone.
    """

    def __init__(self, instance_id: str) -> None:
        used = hashlib.shake_128(f"root disk of {instance_id}".encode()).digest(_USED)
        half = _USED // 2
        self._extents = ((0, half), (SIZE // 2, half))
        content = bytearray(SIZE)
        content[:half], content[SIZE // 2 : SIZE // 2 + half] = used[:half], used[half:]
        self.content = bytes(content)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return SIZE

    def extents(self) -> Sequence[tuple[int, int]]:
        """Return offset and length of the data; the rest is zeros."""
        return self._extents

    def prefetch(self, offset: int, length: int) -> None:
        """Do nothing: the content is in memory."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes at the offset."""
        buffer[:] = self.content[offset : offset + len(buffer)]
