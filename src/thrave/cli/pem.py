"""Certificates and keys as options of a command: PEM files, read and checked while the command line is.

A file that is no such thing is a wrong command line (exit code 2), said before anything is begun. No key is ever shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate

_Key = TypeVar("_Key")
_LARGEST = 64 * 1024
_NO_ED25519 = "not an Ed25519 key"


class PemFile(click.ParamType["_Key"]):
    """A PEM file.

    Args:
        read: makes of its bytes what the command wants; raises ValueError, or an error of ours, with a reason.
    """

    name = "file"

    def __init__(self, read: Callable[[bytes], _Key]) -> None:
        self._read = read

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> _Key:
        """Give what the file holds. Fails the command line if it holds something else."""
        from thrave.identity.errors import IdentityError

        try:
            with Path(str(value)).open("rb") as file:
                return self._read(file.read(_LARGEST))
        except (OSError, ValueError, IdentityError) as error:
            self.fail(f"{value}: {error}", param, ctx)


def _certificate(pem: bytes) -> Certificate:
    from thrave.identity.certificates import load_certificate

    return load_certificate(pem)


def _private_key(pem: bytes) -> RSAPrivateKey:
    from thrave.identity.certificates import load_private_key

    return load_private_key(pem)


def _ed25519_private_key(pem: bytes) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(pem, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(_NO_ED25519)  # noqa: TRY004 (the file's content is wrong)
    return key


def _ed25519_public_key(pem: bytes) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = load_pem_public_key(pem)
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(_NO_ED25519)  # noqa: TRY004 (as above)
    return key


CERTIFICATE = PemFile(_certificate)
PRIVATE_KEY = PemFile(_private_key)
ED25519_PRIVATE_KEY = PemFile(_ed25519_private_key)
ED25519_PUBLIC_KEY = PemFile(_ed25519_public_key)
