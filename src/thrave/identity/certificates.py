"""X.509 certificates and RSA private keys as PEM, as `ec2-ami-tools` and AWS's signing certificates have them.

A bundle's key is encrypted to the RSA key of a certificate and its manifest is signed with one, so nothing but RSA is
accepted. What is read may be old: 1024-bit keys and SHA-1 self-signatures are still in people's drawers, and a
certificate is only a wrapped public key here: who signed it and whether it has expired is not asked (as
ec2-ami-tools 1.5.3 does not). What is made is of today. Nothing here reads or writes files.
"""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.x509.oid import NameOID

from thrave.identity.errors import MalformedCertificate, MalformedPrivateKey

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
    now = datetime.now(UTC)
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
