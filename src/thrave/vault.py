"""Encrypts the secrets in the database, so that a stolen database contains no readable secret.

The secrets are access keys' secrets and running tasks' AES keys and upload policies. The algorithm is AES-256-GCM. The
key is in its own file next to the database, never in it. Each token is bound to a context, so that a token that is
copied to another row cannot be decrypted there. The vault does not store tokens, and no error contains a secret.

A thief of the database learns accounts and key ids but no secret; a thief of the key file learns nothing; a thief of
both learns all secrets.

    VaultError
    ├── VaultKeyError    the key file does not have 32 bytes, is readable by others, or cannot be read or created
    └── DecryptError     the token was encrypted with another key or for another context, or was changed
"""

from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from thrave import files
from thrave.concurrency import random_bytes

_KEY_BYTES = 32
_NONCE_BYTES = 12
_VERSION = b"\x01"


class VaultError(Exception):
    """The vault cannot be used."""


class VaultKeyError(VaultError):
    """The vault's key file cannot be used."""


class DecryptError(VaultError):
    """A token cannot be decrypted with this key in this context."""


class Vault:
    """Encrypts and decrypts with one key.

    A token is a version byte (1), a random 96-bit nonce, the ciphertext and the 128-bit tag. The tag authenticates
    version and context, too. One key may be used for 2**32 encryptions (NIST SP 800-38D §8.3), far more than accounts
    and tasks require.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise VaultKeyError(f"a vault's key has {_KEY_BYTES} bytes, not {len(key)}")
        self._cipher = AESGCM(key)

    @classmethod
    def open_or_create(cls, path: Path) -> Self:
        """Read the key from a file; create the file if it does not exist.

        Args:
            path: The key file: 32 random bytes, mode 0600. An existing file is never written. Processes that create it
                at the same time get the same key.

        Raises:
            VaultKeyError: The file is not a vault's key, is readable by others, or cannot be read or created.
        """
        try:
            files.create_exclusive(path, random_bytes(_KEY_BYTES))
        except OSError as error:
            raise VaultKeyError(f"the vault's key file cannot be used: {error}") from error
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the key from a file.

        Raises:
            VaultKeyError: The file is missing, is not a vault's key, is readable by others, or cannot be read.
        """
        try:
            return cls(files.read_private(path))
        except OSError as error:
            raise VaultKeyError(f"the vault's key file cannot be used: {error}") from error
        except VaultKeyError as error:
            raise VaultKeyError(f"{path} is not a vault's key file: {error}") from error

    def encrypt(self, plaintext: bytes, *, context: str) -> bytes:
        """Encrypt a secret and return the token.

        Args:
            plaintext: The secret.
            context: Owner and purpose of the secret, such as ``access-key/AKIA…``; `decrypt` needs the same.
        """
        nonce = random_bytes(_NONCE_BYTES)
        return _VERSION + nonce + self._cipher.encrypt(nonce, plaintext, _VERSION + context.encode())

    def decrypt(self, token: bytes, *, context: str) -> bytes:
        """Decrypt a token of `encrypt`.

        Raises:
            DecryptError: The key or the context is another, the token's version is unknown, or the token was changed.
        """
        version, nonce, ciphertext = token[:1], token[1 : 1 + _NONCE_BYTES], token[1 + _NONCE_BYTES :]
        if version != _VERSION or len(nonce) != _NONCE_BYTES:
            raise DecryptError(
                f"The encrypted secret of {context} has an unknown format. A newer version may have written it."
            )
        try:
            return self._cipher.decrypt(nonce, ciphertext, _VERSION + context.encode())
        except InvalidTag:
            raise DecryptError(
                f"The encrypted secret of {context} cannot be decrypted: it was changed, or this is another vault's key"
            ) from None
