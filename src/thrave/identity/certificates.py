"""X.509 certificates and RSA private keys as PEM, and the identity of the service (`ServiceIdentity`).

Only RSA is accepted: the key of a bundle is encrypted for the RSA key of a certificate, and manifests are signed with
one. Keys of 1,024 bits and SHA-1 self-signatures are accepted, since ec2-ami-tools and AWS issued them. A certificate
is only a container of a public key: its issuer and expiry are not checked (ec2-ami-tools 1.5.3 does not check them).
"""

# The identity has three files in one folder, created once and never overwritten, readable by the service's user only:
#
#     cert.pem        X.509 certificate (RSA), for verifiers
#     pk.pem          its private key: signs manifests, decrypts the key of a bundle that is encrypted for EC2
#     side-key.pem    Ed25519 private key: signs the side file with the SHA-256 digests
#
# With `pk.pem` every bundle of the service can be opened. Without it, bundles of accounts without a certificate cannot
# be opened at all. So if a certificate exists and its private key does not, that is an error, and no new key is
# created. Neither is any file if the database has the fingerprint of an identity (`components.py`).

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

CERTIFICATE_FILE = "cert.pem"
PRIVATE_KEY_FILE = "pk.pem"
SIDE_KEY_FILE = "side-key.pem"

_NEW_KEY_BITS = 2048
_KEY_BITS = range(1024, 16384 + 1)
_BITS = f"{{}} bits; it must have {_KEY_BITS.start} to {_KEY_BITS.stop - 1}"
_PEM_CHARACTERS = 16384  # IAM's limit, UploadSigningCertificate
_YEARS_VALID = 10
_COMMON_NAME = "Thrave bundle service"


def new_certificate(common_name: str) -> tuple[str, str]:
    """Create an RSA key of 2048 bits and a self-signed certificate for it.

    Args:
        common_name: Name of the owner, 1 to 64 characters.

    Returns:
        The certificate and the private key (PKCS#8, not encrypted), both PEM.
    """
    key = new_private_key()
    return certificate_pem(self_signed(common_name, key)), private_key_pem(key)


def new_private_key() -> rsa.RSAPrivateKey:
    """Create an RSA key of 2048 bits."""
    return rsa.generate_private_key(public_exponent=65537, key_size=_NEW_KEY_BITS)


def self_signed(common_name: str, key: rsa.RSAPrivateKey) -> x509.Certificate:
    """Create a certificate for a key, signed with that key and valid for ten years from now."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = utc_now()
    builder = x509.CertificateBuilder(
        issuer_name=name,
        subject_name=name,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(days=1),  # the clock of a verifier may be behind
        not_valid_after=now + timedelta(days=365 * _YEARS_VALID),
    )
    return builder.sign(key, hashes.SHA256())


def load_certificate(pem: str | bytes) -> x509.Certificate:
    """Read a PEM certificate with an RSA key of 1024 bits or more.

    Raises:
        MalformedCertificate: The text is something else; the message says what.
    """
    try:
        certificate = x509.load_pem_x509_certificate(_pem_bytes(pem))
        key = certificate.public_key()
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise MalformedCertificate(
            "The certificate is not an X.509 certificate in PEM form (-----BEGIN CERTIFICATE-----)"
        ) from error
    if not isinstance(key, rsa.RSAPublicKey):
        raise MalformedCertificate("The certificate's key is not RSA; a bundle can be encrypted for RSA keys only")
    if key.key_size not in _KEY_BITS:
        raise MalformedCertificate(f"The certificate's key has {_BITS.format(key.key_size)}")
    return certificate


def load_private_key(pem: str | bytes) -> rsa.RSAPrivateKey:
    """Read an unencrypted PEM RSA private key, PKCS#8 or PKCS#1 (AWS issued both).

    Raises:
        MalformedPrivateKey: The text is something else; the message says what, and contains nothing of the key.
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
        raise MalformedPrivateKey("The private key is not RSA; bundles are encrypted for RSA keys only")
    if key.key_size not in _KEY_BITS:
        raise MalformedPrivateKey(f"The private key has {_BITS.format(key.key_size)}")
    return key


def certificate_pem(certificate: x509.Certificate) -> str:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def private_key_pem(key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> str:
    """Return a private key as PEM: PKCS#8, not encrypted."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem.decode("ascii")


def _pem_bytes(pem: str | bytes) -> bytes:
    data = pem if isinstance(pem, bytes) else pem.encode()
    if len(data) > _PEM_CHARACTERS:
        raise ValueError("too long")
    return data


@dataclass(frozen=True)
class ServiceIdentity:
    """The service's certificate and keys."""

    certificate: x509.Certificate
    private_key: rsa.RSAPrivateKey = field(repr=False)
    side_key: ed25519.Ed25519PrivateKey = field(repr=False)

    @classmethod
    def open_or_create(cls, directory: Path) -> Self:
        """Read the identity from its folder; create it the first time.

        Processes that do this at the same time get the same identity: each file is created by one of them, and the
        certificate is for the key that is in the file.

        Raises:
            ServiceIdentityError: Some files are missing, other users can read them, or they do not belong together.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            _create_missing_files(directory)
        except (OSError, MalformedPrivateKey) as error:
            raise ServiceIdentityError(f"the service's identity in {directory} cannot be created: {error}") from error
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read the identity from its folder. Creates nothing.

        Raises:
            ServiceIdentityError: Files are missing, other users can read them, or they do not belong together.
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
        """SHA-256 of the two public keys in hex. Copies of one identity have the same fingerprint."""
        form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        keys = self.private_key.public_key().public_bytes(*form), self.side_key.public_key().public_bytes(*form)
        return hashlib.sha256(b"".join(keys)).hexdigest()


def _create_missing_files(directory: Path) -> None:
    """Create the files that do not exist, each only if no other process has created it."""
    private_key, certificate = directory / PRIVATE_KEY_FILE, directory / CERTIFICATE_FILE
    has_certificate = certificate.exists()  # checked first: the key is created before the certificate
    if not private_key.exists():
        if has_certificate:
            raise FileNotFoundError(f"{PRIVATE_KEY_FILE} is missing, and {CERTIFICATE_FILE} exists; restore it")
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
