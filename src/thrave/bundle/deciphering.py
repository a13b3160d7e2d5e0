"""Deciphers the verified parts of a bundle back into one stream.

AES-128-CBC over all parts as one, PKCS#7 padding checked in full at the end. It never sees a part whose digest is
not known to be right. CBC could be deciphered on every core, but one does ten times what one inflates.
"""

from collections.abc import Iterable, Iterator

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from thrave.bundle.cutting import CIPHER_BLOCK
from thrave.bundle.errors import ContentError
from thrave.bundle.secrets import BundleSecrets

_SLICE = 1024 * 1024  # what is handed on while it is in the processor's cache, from memory that is used over and over


def deciphered(parts: Iterable[bytes], secrets: BundleSecrets) -> Iterator[memoryview]:
    """Yield the plain stream of the parts in order, without its padding.

    Raises:
        ContentError: the ciphertext is not whole blocks, or its padding is wrong (as it is under a wrong IV or key).
    """
    decryptor = Cipher(algorithms.AES(secrets.key), modes.CBC(secrets.iv)).decryptor()
    held = memoryview(b"")  # the padding is in the last block, and which that is shows only at the end
    for piece in _slices(parts):
        plain = memoryview(decryptor.update(piece))
        if plain:
            yield held
            yield plain[:-CIPHER_BLOCK]
            held = plain[-CIPHER_BLOCK:]
    try:
        decryptor.finalize()
    except ValueError:
        raise ContentError("the parts together are no whole number of cipher blocks") from None
    yield _unpadded(held)


def _slices(parts: Iterable[bytes]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        yield from (view[start : start + _SLICE] for start in range(0, len(view), _SLICE))


def _unpadded(block: memoryview) -> memoryview:
    count = block[-1] if block else 0
    if not 1 <= count <= CIPHER_BLOCK or bytes(block[-count:]) != bytes([count]) * count:
        raise ContentError("the padding at the end of the ciphertext is wrong")
    return block[:-count]
