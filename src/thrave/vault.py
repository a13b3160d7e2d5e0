"""The vault: seals the few secrets that must be kept, so that a stolen database alone gives none of them away.

A secret (an access key's secret, a running task's AES key) is stored sealed: AES-256-GCM under one key, which
stands in a file of its own beside the database and never in it. Each seal is bound to a context (whose secret
it is), so that a sealed secret that is copied to another row does not open there. The vault never stores a
secret itself, never overwrites its key file, and never says a word of a secret in an error.

What a thief can do with each piece: the database alone: learn which accounts and keys there are, no secret.
The key file alone: nothing. Both: everything that is sealed.

    VaultError
    ├── VaultKeyError    the key file is missing its 32 bytes, open to others, or cannot be read or made
    └── SealError        this was not sealed by this key for this context, or was changed since
"""

import os
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from thrave import files

_KEY_BYTES = 32
_NONCE_BYTES = 12
_VERSION = b"\x01"


class VaultError(Exception):
    """Something about the vault went wrong."""


class VaultKeyError(VaultError):
    """The vault's key file cannot be used."""


class DecryptError(VaultError):
    """A sealed secret does not open with this key in this context."""


class Vault:
    """Seals and unseals with one key.

    A token is a version byte (1), a random 96-bit nonce, the ciphertext and the 128-bit tag. Version and
    context are authenticated with it. One key is good for 2**32 seals (NIST SP 800-38D §8.3), far beyond what
    accounts and tasks make.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise VaultKeyError(f"a vault's key has {_KEY_BYTES} bytes, not {len(key)}")
        self._cipher = AESGCM(key)

    @classmethod
    def open_or_create(cls, path: Path) -> Self:
        """Open the vault whose key stands in a file; the first time, make the key.

        Args:
            path: The key file: 32 random bytes, mode 0600. An existing one is never written to; processes
                that make it at the same time end up with the same key.

        Raises:
            VaultKeyError: The file is not a vault's key, is open to others, or cannot be read or made.
        """
        try:
            files.create_exclusive(path, os.urandom(_KEY_BYTES))
        except OSError as error:
            raise VaultKeyError(f"the vault's key file cannot be used: {error}") from error
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the vault whose key stands in a file.

        Raises:
            VaultKeyError: The file is missing, is not a vault's key, is open to others, or cannot be read.
        """
        try:
            return cls(files.read_private(path))
        except OSError as error:
            raise VaultKeyError(f"the vault's key file cannot be used: {error}") from error
        except VaultKeyError as error:
            raise VaultKeyError(f"{path} is not a vault's key file: {error}") from error

    def seal(self, plaintext: bytes, *, context: str) -> bytes:
        """Seal a secret.

        Args:
            plaintext: The secret.
            context: Whose it is and what for, e.g. ``access-key/AKIA…``; the same must be said to unseal it.
        """
        nonce = os.urandom(_NONCE_BYTES)
        return _VERSION + nonce + self._cipher.encrypt(nonce, plaintext, _VERSION + context.encode())

    def unseal(self, token: bytes, *, context: str) -> bytes:
        """Open what ``seal`` made.

        Raises:
            SealError: Another key or context, a token of an unknown version, or one that was changed.
        """
        version, nonce, sealed = token[:1], token[1 : 1 + _NONCE_BYTES], token[1 + _NONCE_BYTES :]
        if version != _VERSION or len(nonce) != _NONCE_BYTES:
            raise DecryptError(f"the sealed secret of {context} has an unknown form; did a newer version make it?")
        try:
            return self._cipher.decrypt(nonce, sealed, _VERSION + context.encode())
        except InvalidTag:
            raise DecryptError(
                f"the sealed secret of {context} does not open: it was changed, or this is another vault's key"
            ) from None
