"""Deciphers the verified parts of a bundle back into one stream.

AES-128-CBC over all parts as one, PKCS#7 padding checked in full at the end. It never sees a part whose digest is
not known to be right.
"""

from collections.abc import Iterable, Iterator

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from thrave.bundle.cutting import CIPHER_BLOCK
from thrave.bundle.errors import ContentError
from thrave.bundle.secrets import BundleSecrets


def deciphered(parts: Iterable[bytes], secrets: BundleSecrets) -> Iterator[memoryview]:
    """Yield the plain stream of the parts in order, without its padding.

    Raises:
        ContentError: the ciphertext is not whole blocks, or its padding is wrong (as it is under a wrong IV or key).
    """
    decryptor = Cipher(algorithms.AES(secrets.key), modes.CBC(secrets.iv)).decryptor()
    held = memoryview(b"")  # the padding is in the last block, and which that is shows only at the end
    for part in parts:
        plain = memoryview(decryptor.update(part))
        if plain:
            yield held
            yield plain[:-CIPHER_BLOCK]
            held = plain[-CIPHER_BLOCK:]
    try:
        decryptor.finalize()
    except ValueError:
        raise ContentError("the parts together are no whole number of cipher blocks") from None
    yield _unpadded(held)


def _unpadded(block: memoryview) -> memoryview:
    count = block[-1] if block else 0
    if not 1 <= count <= CIPHER_BLOCK or bytes(block[-count:]) != bytes([count]) * count:
        raise ContentError("the padding at the end of the ciphertext is wrong")
    return block[:-count]
