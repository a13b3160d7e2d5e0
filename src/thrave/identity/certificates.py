"""X.509 certificates and RSA private keys as PEM, as `ec2-ami-tools` and AWS's signing certificates have them.

A bundle's key is encrypted to the RSA key of a certificate and its manifest is signed with one, so nothing but RSA is
accepted. What is read may be old: 1024-bit keys and SHA-1 self-signatures are still in people's drawers, and a
certificate is only a wrapped public key here: who signed it and whether it has expired is not asked (as
ec2-ami-tools 1.5.3 does not). What is made is of today. Nothing here reads or writes files.

The service's own identity: what it signs manifests with, and what opens the "EC2" slot of every bundle it makes.

Three files of one folder, made once and never overwritten, each for the service's own user alone (mode 0600):

    cert.pem        X.509 certificate (RSA): what verifiers are given
    pk.pem          its private key: signs manifests, decrypts the key that a manifest holds for EC2
    side-key.pem    Ed25519 private key: signs the side file with the SHA-256 digests

Whoever holds `pk.pem` can open every bundle that the service ever made; whoever loses it cannot open those of accounts
without a certificate. So a missing private key beside an existing certificate is an error, never a reason to make
another one. Nor is any of the files made where the database has the fingerprint of an identity (`components.py`).
"""

import hashlib
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.x509.oid import NameOID

from thrave import files
from thrave.concurrency import utc_now
from thrave.identity.errors import MalformedCertificate, MalformedPrivateKey, ServiceIdentityError

_NEW_KEY_BITS = 2048


_KEY_BITS = range(1024, 16384 + 1)


_BITS = f"{{}} bits; it must have {_KEY_BITS.start} to {_KEY_BITS.stop - 1}"


_PEM_CHARACTERS = 16384  # as IAM's UploadSigningCertificate


_YEARS_VALID = 10


def new_certificate(common_name: str) -> tuple[str, str]:
    """Make an RSA key of 2048 bits and a self-signed certificate for it.

    Args:
        common_name: Whose it is, 1 to 64 characters.

    Returns:
        The certificate and the private key (PKCS#8, not encrypted), both PEM.
    """
    key = new_private_key()
    return certificate_pem(self_signed(common_name, key)), private_key_pem(key)


def new_private_key() -> rsa.RSAPrivateKey:
    """Make an RSA key of 2048 bits."""
    return rsa.generate_private_key(public_exponent=65537, key_size=_NEW_KEY_BITS)


def self_signed(common_name: str, key: rsa.RSAPrivateKey) -> x509.Certificate:
    """Make a certificate for a key, signed with that key, valid for ten years from now."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = utc_now()
    builder = x509.CertificateBuilder(
        issuer_name=name,
        subject_name=name,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(days=1),  # clocks differ
        not_valid_after=now + timedelta(days=365 * _YEARS_VALID),
    )
    return builder.sign(key, hashes.SHA256())


def load_certificate(pem: str | bytes) -> x509.Certificate:
    """Read a PEM certificate with an RSA key of 1024 bits or more.

    Raises:
        MalformedCertificate: It is something else; the message says what.
    """
    try:
        certificate = x509.load_pem_x509_certificate(_pem_bytes(pem))
        key = certificate.public_key()
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise MalformedCertificate(
            "The certificate is not an X.509 certificate in PEM form (-----BEGIN CERTIFICATE-----)"
        ) from error
    if not isinstance(key, rsa.RSAPublicKey):
        raise MalformedCertificate("The certificate's key is not RSA; a bundle can be encrypted to RSA keys only")
    if key.key_size not in _KEY_BITS:
        raise MalformedCertificate(f"The certificate's key has {_BITS.format(key.key_size)}")
    return certificate


def load_private_key(pem: str | bytes) -> rsa.RSAPrivateKey:
    """Read an unencrypted PEM RSA private key, PKCS#8 or PKCS#1 (as AWS gave out either).

    Raises:
        MalformedPrivateKey: It is something else; the message says what, and nothing of the key.
    """
    try:
        key = serialization.load_pem_private_key(_pem_bytes(pem), password=None)
    except TypeError:
        raise MalformedPrivateKey(
            "The private key is encrypted with a passphrase; decrypt it first (openssl pkey -in FILE -out PLAIN)"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise MalformedPrivateKey("The private key is not a PEM private key (-----BEGIN PRIVATE KEY-----)") from None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise MalformedPrivateKey("The private key is not RSA; bundles are encrypted to RSA keys only")
    if key.key_size not in _KEY_BITS:
        raise MalformedPrivateKey(f"The private key has {_BITS.format(key.key_size)}")
    return key


def certificate_pem(certificate: x509.Certificate) -> str:
    """Write a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def private_key_pem(key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> str:
    """Write a private key as PEM: PKCS#8, not encrypted."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem.decode("ascii")


def _pem_bytes(pem: str | bytes) -> bytes:
    data = pem if isinstance(pem, bytes) else pem.encode()
    if len(data) > _PEM_CHARACTERS:
        raise ValueError("too long")
    return data


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
            private_key = load_private_key(files.read_private(directory / PRIVATE_KEY_FILE))
            certificate = load_certificate((directory / CERTIFICATE_FILE).read_bytes())
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
        files.create_exclusive(private_key, private_key_pem(new_private_key()).encode())
    if not has_certificate:
        key = load_private_key(files.read_private(private_key))
        files.create_exclusive(certificate, certificate_pem(self_signed(_COMMON_NAME, key)).encode())
    side_key = private_key_pem(ed25519.Ed25519PrivateKey.generate())
    files.create_exclusive(directory / SIDE_KEY_FILE, side_key.encode())


def _load_side_key(pem: bytes) -> ed25519.Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise MalformedPrivateKey(f"{SIDE_KEY_FILE} is not a PEM private key") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise MalformedPrivateKey(f"{SIDE_KEY_FILE} is not an Ed25519 key")
    return key
