"""The key and IV of one bundle, and the two slots of a manifest that carry them.

A slot holds the RSA PKCS#1 v1.5 encryption of the key's 32 lower-case hex characters, not of its 16 bytes
(ec2-ami-tools 1.5.3, euca2ools 3.4.1 and go_ami_tools agree). Nothing here ever prints or logs a key.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

from thrave.bundle.errors import WrongKeyError

_HEX_128 = re.compile(rb"[0-9a-fA-F]{32}")


@dataclass(frozen=True)
class BundleSecrets:
    """AES-128-CBC key and IV, 16 bytes each; never used for two different streams."""

    key: bytes = field(repr=False)
    iv: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse anything but AES-128."""
        if len(self.key) != 16 or len(self.iv) != 16:
            raise ValueError("key and IV have 16 bytes each")

    @classmethod
    def generate(cls) -> Self:
        """Return a new random key and IV."""
        return cls(key=os.urandom(16), iv=os.urandom(16))


@dataclass(frozen=True)
class KeySlot:
    """Key and IV encrypted to one RSA key; both empty where a bundle has no such reader.

    Attributes:
        key: the encrypted key, as long as the RSA modulus.
        iv: the encrypted IV, likewise.
    """

    key: bytes = field(repr=False)
    iv: bytes = field(repr=False)


def lock(secrets: BundleSecrets, public_key: RSAPublicKey) -> KeySlot:
    """Return the slot that the owner of the key can unlock."""
    return KeySlot(
        key=public_key.encrypt(secrets.key.hex().encode(), PKCS1v15()),
        iv=public_key.encrypt(secrets.iv.hex().encode(), PKCS1v15()),
    )


def unlock(slots: Iterable[KeySlot], private_key: RSAPrivateKey) -> BundleSecrets:
    """Return the secrets from the first slot that the key opens.

    OpenSSL from 3.2 on answers a wrong key with random bytes in place of an error (implicit rejection), so only 32
    hex characters count as opened.

    Raises:
        WrongKeyError: the key opens none of them.
    """
    for slot in slots:
        key, iv = _decrypted(slot.key, private_key), _decrypted(slot.iv, private_key)
        if key and iv:
            return BundleSecrets(key=key, iv=iv)
    raise WrongKeyError(
        "this bundle was not encrypted for this private key: it opens neither the user's nor the service's slot"
    )


def _decrypted(encrypted: bytes, private_key: RSAPrivateKey) -> bytes | None:
    if len(encrypted) != (private_key.key_size + 7) // 8:
        return None
    try:
        text = private_key.decrypt(encrypted, PKCS1v15())
    except ValueError:
        return None
    return bytes.fromhex(text.decode()) if _HEX_128.fullmatch(text) else None
