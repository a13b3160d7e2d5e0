"""Certificates and keys as options of a command: PEM files, read and checked while the command line is.

A file that holds something else is a wrong command line (exit code 2), a missing one exit code 3; both are reported
before anything is begun. No key is ever shown.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from thrave.cli.folders import FileMissingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate

_Key = TypeVar("_Key")
_LARGEST = 64 * 1024
_NO_ED25519 = "not an Ed25519 key in PEM form, or one that is encrypted"


class PemFile(click.ParamType["_Key"]):
    """A PEM file.

    Args:
        read: makes of its bytes what the command wants; raises ValueError, or an error of ours, with a reason.
        is_certificate: Whether that is a certificate; otherwise it is a key.
    """

    name = "file"

    def __init__(self, read: Callable[[bytes], _Key], *, is_certificate: bool = False) -> None:
        self._read = read
        self._is_certificate = is_certificate

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> _Key:
        """Give what the file holds. Fails the command line if it holds something else."""
        from thrave.identity.errors import IdentityError

        try:
            with Path(str(value)).open("rb") as file:
                pem = file.read(_LARGEST)
        except FileNotFoundError:
            raise FileMissingError(f"{value} does not exist") from None
        except OSError as error:
            self.fail(f"cannot read {value}: {error.strerror}", param, ctx)
        try:
            return self._read(pem)
        except (ValueError, IdentityError) as error:
            self.fail(f"{value}: {self._mistaken(pem) or error}", param, ctx)

    def _mistaken(self, pem: bytes) -> str | None:
        """What the file holds instead, if that is the other half of a pair."""
        if self._is_certificate and b"PRIVATE KEY-----" in pem:
            return "this is a private key; give its certificate"
        if not self._is_certificate and b"-----BEGIN CERTIFICATE-----" in pem:
            return "this is a certificate; give its key"
        return None


def _certificate(pem: bytes) -> Certificate:
    from thrave.identity.certificates import load_certificate

    return load_certificate(pem)


def _private_key(pem: bytes) -> RSAPrivateKey:
    from thrave.identity.certificates import load_private_key

    return load_private_key(pem)


@contextmanager
def _words_of_ours(text: str) -> Iterator[None]:
    """Say the text in place of what the library says of PEM that it cannot read."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: the key is encrypted
        raise ValueError(text) from None


def _ed25519_private_key(pem: bytes) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    with _words_of_ours(_NO_ED25519):
        key = load_pem_private_key(pem, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(_NO_ED25519)  # noqa: TRY004 (the file's content is wrong)
    return key


def _ed25519_public_key(pem: bytes) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    with _words_of_ours(_NO_ED25519):
        key = load_pem_public_key(pem)
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(_NO_ED25519)  # noqa: TRY004 (as above)
    return key


CERTIFICATE = PemFile(_certificate, is_certificate=True)
PRIVATE_KEY = PemFile(_private_key)
ED25519_PRIVATE_KEY = PemFile(_ed25519_private_key)
ED25519_PUBLIC_KEY = PemFile(_ed25519_public_key)
