"""Deciphers the verified parts of a bundle back into one stream.

AES-128-CBC over all parts as one, PKCS#7 padding checked in full at the end. It never sees a part whose digest is
not known to be right. CBC could be deciphered on every core, but one does ten times what one inflates.
"""

from collections.abc import Callable, Iterable, Iterator

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from thrave.bundle.cutting import CIPHER_BLOCK
from thrave.bundle.errors import ContentError
from thrave.bundle.secrets import BundleSecrets

_SLICE = 1024 * 1024  # what is handed on while it is in the processor's cache

BUFFER = _SLICE + 2 * CIPHER_BLOCK
"""Bytes of a buffer: what was held back before a slice, the slice, and what ``update_into`` wants besides."""


def fresh() -> memoryview:
    """A new buffer."""
    return memoryview(bytearray(BUFFER))


def deciphered(
    parts: Iterable[bytes], secrets: BundleSecrets, free: Callable[[], memoryview] = fresh
) -> Iterator[memoryview]:
    """Yield the plain stream of the parts in order, without its padding.

    Args:
        parts: the ciphertext, cut anywhere.
        secrets: key and IV.
        free: gives the buffer that the next piece is to stand in, at its beginning.

    Raises:
        ContentError: the ciphertext is not whole blocks, or its padding is wrong (as it is under a wrong IV or key).
    """
    decryptor = Cipher(algorithms.AES(secrets.key), modes.CBC(secrets.iv)).decryptor()
    held = b""  # the padding is in the last block, and which that is shows only at the end
    for piece in _slices(parts):
        buffer = free()
        buffer[: len(held)] = held
        end = len(held) + decryptor.update_into(piece, buffer[len(held) :])
        kept = max(end - CIPHER_BLOCK, 0)
        held = bytes(buffer[kept:end])
        yield buffer[:kept]
    try:
        decryptor.finalize()
    except ValueError:
        raise ContentError("the parts together are no whole number of cipher blocks") from None
    rest, buffer = _unpadded(held), free()
    buffer[: len(rest)] = rest
    yield buffer[: len(rest)]


def _slices(parts: Iterable[bytes]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        yield from (view[start : start + _SLICE] for start in range(0, len(view), _SLICE))


def _unpadded(block: bytes) -> bytes:
    count = block[-1] if block else 0
    if not 1 <= count <= CIPHER_BLOCK or block[-count:] != bytes([count]) * count:
        raise ContentError("the padding at the end of the ciphertext is wrong")
    return block[:-count]
