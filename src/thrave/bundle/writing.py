"""Writes the manifest and the side file of what was sealed.

The manifest's bytes are those of ec2-ami-tools 1.5.3: one line, single quotes, no white space, no final newline, that
order of elements, ASCII. Its verifier re-serialises what it reads with REXML, so any other spelling, though valid XML,
would fail there. Values that would need escaping are refused rather than escaped.
"""

from importlib.metadata import version

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.x509 import Certificate

from thrave.bundle.manifest import VERSION
from thrave.bundle.names import checked_account_id, checked_architecture
from thrave.bundle.sealed import Sealed, SealedPart
from thrave.bundle.secrets import KeySlot, lock
from thrave.bundle.signatures import rsa_key, sign


def write_manifest(
    sealed: Sealed,
    *,
    account_id: str,
    architecture: str,
    user_certificate: Certificate | None,
    service_certificate: Certificate,
    signing_key: RSAPrivateKey,
) -> bytes:
    """Return the signed manifest of a bundle.

    Args:
        sealed: what was stored.
        account_id: whose bundle it is, 12 digits.
        architecture: of the machine that the image boots on.
        user_certificate: of the account, who can then open the bundle; without one the slot is made out to the
            service, since ec2-unbundle refuses empty slots.
        service_certificate: of the service that the image will be registered with.
        signing_key: whose certificate the readers will check the signature against.

    Raises:
        NamingError: the account id or the architecture cannot stand in a manifest.
    """
    ec2 = lock(sealed.secrets, rsa_key(service_certificate))
    user = lock(sealed.secrets, rsa_key(user_certificate or service_certificate))
    unsigned = (
        "<?xml version='1.0'?><manifest>"
        + _element("version", VERSION)
        + f"<bundler><name>thrave</name>{_bundler_version()}</bundler>"
        + _element("machine_configuration", _element("architecture", checked_architecture(architecture)))
        + _image(sealed, checked_account_id(account_id), ec2, user)
    ).encode("ascii")
    return unsigned + f"<signature>{sign(unsigned, signing_key).hex()}</signature></manifest>".encode("ascii")


def _bundler_version() -> str:
    major, minor, *rest = version("thrave").split(".")
    return _element("version", f"{major}.{minor}") + _element("release", ".".join(rest) or "0")


def _image(sealed: Sealed, account_id: str, ec2: KeySlot, user: KeySlot) -> str:
    cipher = "algorithm='AES-128-CBC'"
    return (
        "<image>"
        + _element("name", sealed.prefix)
        + _element("user", account_id)
        + _element("type", "machine")
        + _element("digest", sealed.digest, "algorithm='SHA1'")
        + _element("size", str(sealed.size))
        + _element("bundled_size", str(sealed.bundled_size))
        + _element("ec2_encrypted_key", ec2.key.hex(), cipher)
        + _element("user_encrypted_key", user.key.hex(), cipher)
        + _element("ec2_encrypted_iv", ec2.iv.hex())
        + _element("user_encrypted_iv", user.iv.hex())
        + _element("parts", "".join(map(_part, sealed.parts)), f"count='{len(sealed.parts)}'")
        + "</image>"
    )


def _part(part: SealedPart) -> str:
    digest = _element("digest", part.sha1, "algorithm='SHA1'")
    return _element("part", _element("filename", part.filename) + digest, f"index='{part.index}'")


def _element(tag: str, content: str, attribute: str = "") -> str:
    return f"<{tag} {attribute}>{content}</{tag}>" if attribute else f"<{tag}>{content}</{tag}>"
