"""What of a manifest is signed, and whether the signature holds.

RSASSA-PKCS1-v1_5 with SHA-1 over two slices of the raw bytes, tags included, nothing between: the first
``<machine_configuration>…</machine_configuration>`` and the first ``<image>…</image>`` (ec2-ami-tools 1.3 to 1.5.3,
Walrus, euca2ools; version 3 signs the second alone). A certificate is a wrapped public key here: as with every known
verifier its dates and issuer are not asked.
"""

from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.x509 import Certificate

from thrave.bundle.errors import SignatureError


class Slice(NamedTuple):
    """A stretch of the manifest's bytes: offsets of its first byte and of its closing tag."""

    start: int
    closing_tag: int


def find_slice(xml: bytes, tag: str) -> Slice | None:
    """Return where the first ``<tag>`` in the text begins and the first ``</tag>`` after it closes it."""
    start = xml.find(f"<{tag}>".encode())
    closing_tag = xml.find(f"</{tag}>".encode(), start)
    return Slice(start, closing_tag) if 0 <= start < closing_tag else None


def signed_bytes(xml: bytes) -> bytes:
    """Return what the signature of a manifest is made over."""
    return b"".join(_cut(xml, tag) for tag in ("machine_configuration", "image"))


def sign(xml: bytes, signing_key: RSAPrivateKey) -> bytes:
    """Return the signature for a manifest's bytes, of which the part after the image may still be missing."""
    return signing_key.sign(signed_bytes(xml), PKCS1v15(), SHA1())  # noqa: S303 - the format knows no other


def is_signed_with(xml: bytes, signature: bytes, key: RSAPublicKey) -> bool:
    """Whether a manifest's signature was made with this key's private half over these bytes."""
    try:
        key.verify(signature, signed_bytes(xml), PKCS1v15(), SHA1())  # noqa: S303 - the format knows no other
    except InvalidSignature:
        return False
    return True


def verify(xml: bytes, signature: bytes, certificate: Certificate) -> None:
    """Check a manifest's signature.

    Raises:
        SignatureError: it is missing, or was not made with the certificate's key over these bytes.
    """
    if not signature:
        raise SignatureError("the manifest is not signed, but a signer's certificate was given")
    if not is_signed_with(xml, signature, rsa_key(certificate)):
        raise SignatureError("the manifest was changed, or another key than this certificate's signed it")


def rsa_key(certificate: Certificate) -> RSAPublicKey:
    """Return the certificate's public key.

    Raises:
        ValueError: it is not an RSA key; the format knows no other.
    """
    key = certificate.public_key()
    if not isinstance(key, RSAPublicKey):
        raise ValueError("the certificate holds no RSA key")  # noqa: TRY004 - the value's content is wrong
    return key


def _cut(xml: bytes, tag: str) -> bytes:
    found = find_slice(xml, tag)
    return xml[found.start : found.closing_tag + len(tag) + len("</>")] if found else b""
