"""The service's own identity: what it signs manifests with, and what opens the "EC2" slot of every bundle it makes.

Three files of one folder, made once and never overwritten, each for the service's own user alone (mode 0600):

    cert.pem        X.509 certificate (RSA): what verifiers are given
    pk.pem          its private key: signs manifests, decrypts the key that a manifest holds for EC2
    side-key.pem    Ed25519 private key: signs the side file with the SHA-256 digests

Whoever holds `pk.pem` can open every bundle that the service ever made; whoever loses it cannot open those of accounts
without a certificate. So a missing private key beside an existing certificate is an error, never a reason to make
another one. Nor is any of the files made where the database has the fingerprint of an identity (`ground.py`).
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from thrave import files
from thrave.identity import certificates
from thrave.identity.errors import MalformedCertificate, MalformedPrivateKey, ServiceIdentityError

CERTIFICATE_FILE = "cert.pem"
PRIVATE_KEY_FILE = "pk.pem"
SIDE_KEY_FILE = "side-key.pem"
_COMMON_NAME = "Thrave bundle service"


@dataclass(frozen=True)
class ServiceIdentity:
    """The service's certificate and keys."""

    certificate: x509.Certificate
    private_key: rsa.RSAPrivateKey = field(repr=False)
    side_key: ed25519.Ed25519PrivateKey = field(repr=False)

    @classmethod
    def open_or_create(cls, directory: Path) -> Self:
        """Read the identity from its folder; the first time, make it.

        Processes that do this at the same time end up with the same identity: each file is created by one of them, and
        the certificate is made for the key that stands in the file.

        Raises:
            ServiceIdentityError: The files are missing in part, open to others, or do not belong together.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            _make_missing(directory)
        except (OSError, MalformedPrivateKey) as error:
            raise ServiceIdentityError(f"the service's identity in {directory} cannot be made: {error}") from error
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read the identity from its folder. Makes nothing.

        Raises:
            ServiceIdentityError: The files are missing, open to others, or do not belong together.
        """
        try:
            private_key = certificates.load_private_key(files.read_private(directory / PRIVATE_KEY_FILE))
            certificate = certificates.load_certificate((directory / CERTIFICATE_FILE).read_bytes())
            side_key = _load_side_key(files.read_private(directory / SIDE_KEY_FILE))
        except (OSError, MalformedCertificate, MalformedPrivateKey) as error:
            raise ServiceIdentityError(f"the service's identity in {directory} cannot be used: {error}") from error
        if certificate.public_key() != private_key.public_key():
            raise ServiceIdentityError(
                f"{CERTIFICATE_FILE} and {PRIVATE_KEY_FILE} in {directory} do not belong together"
            )
        return cls(certificate, private_key, side_key)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the two public keys: what makes two copies of the identity the same one."""
        form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        keys = self.private_key.public_key().public_bytes(*form), self.side_key.public_key().public_bytes(*form)
        return hashlib.sha256(b"".join(keys)).hexdigest()


def _make_missing(directory: Path) -> None:
    """Make the files that are not there, each only if no other process has made it."""
    private_key, certificate = directory / PRIVATE_KEY_FILE, directory / CERTIFICATE_FILE
    has_certificate = certificate.exists()  # asked first: the key is made before the certificate
    if not private_key.exists():
        if has_certificate:
            raise FileNotFoundError(f"{PRIVATE_KEY_FILE} is missing beside {CERTIFICATE_FILE}; restore it")
        files.create_once(private_key, certificates.private_key_pem(certificates.new_private_key()).encode())
    if not has_certificate:
        key = certificates.load_private_key(files.read_private(private_key))
        files.create_once(
            certificate, certificates.certificate_pem(certificates.self_signed(_COMMON_NAME, key)).encode()
        )
    side_key = certificates.private_key_pem(ed25519.Ed25519PrivateKey.generate())
    files.create_once(directory / SIDE_KEY_FILE, side_key.encode())


def _load_side_key(pem: bytes) -> ed25519.Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise MalformedPrivateKey(f"{SIDE_KEY_FILE} is not a PEM private key") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise MalformedPrivateKey(f"{SIDE_KEY_FILE} is not an Ed25519 key")
    return key
