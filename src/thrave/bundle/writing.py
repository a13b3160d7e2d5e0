"""Writes the manifest of what was sealed, or of what is already there.

The manifest's bytes are those of ec2-ami-tools 1.5.3: one line, single quotes, no white space, no final newline, that
order of elements. Its verifier re-serialises what it reads with REXML, so any other spelling, though valid XML, would
fail there. Values that would need escaping are refused rather than escaped.
"""

from collections.abc import Iterable
from importlib.metadata import version

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.x509 import Certificate

from thrave.bundle.errors import UnwritableValueError
from thrave.bundle.manifest import VERSION, Bundler, Manifest, ManifestPart
from thrave.bundle.names import checked_account_id, checked_architecture
from thrave.bundle.sealed import Sealed
from thrave.bundle.secrets import lock
from thrave.bundle.signatures import rsa_key, sign

_CIPHER = "algorithm='AES-128-CBC'"
_SHA1 = "algorithm='SHA1'"
_MARKUP = frozenset("&<>\"'")


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
    manifest = Manifest(
        version=VERSION,
        bundler=_this_program(),
        architecture=checked_architecture(architecture),
        name=sealed.prefix,
        user=checked_account_id(account_id),
        digest=sealed.digest,
        size=sealed.size,
        bundled_size=sealed.bundled_size,
        user_slot=lock(sealed.secrets, rsa_key(user_certificate or service_certificate)),
        ec2_slot=lock(sealed.secrets, rsa_key(service_certificate)),
        parts=tuple(ManifestPart(part.index, part.filename, part.sha1) for part in sealed.parts),
    )
    return signed_manifest(manifest, signing_key)


def signed_manifest(manifest: Manifest, signing_key: RSAPrivateKey) -> bytes:
    """Return a manifest's bytes, of version 2007-10-10 whatever it was read from, with a new signature.

    Raises:
        UnwritableValueError: it says something that cannot be written without escaping.
    """
    unsigned = (
        "<?xml version='1.0'?><manifest>"
        + _element("version", VERSION)
        + _bundler(manifest.bundler)
        + _machine_configuration(manifest)
        + _image(manifest)
    ).encode()
    return unsigned + f"<signature>{sign(unsigned, signing_key).hex()}</signature></manifest>".encode("ascii")


def _this_program() -> Bundler:
    major, minor, *rest = version("thrave").split(".")
    return Bundler("thrave", f"{major}.{minor}", ".".join(rest) or "0")


def _bundler(bundler: Bundler) -> str:
    words = (("name", bundler.name), ("version", bundler.version), ("release", bundler.release))
    return _element("bundler", "".join(_text(tag, word) for tag, word in words))


def _machine_configuration(manifest: Manifest) -> str:
    mappings = (
        _element("mapping", _text("virtual", virtual) + _text("device", device))
        for virtual, device in manifest.block_devices
    )
    return _element(
        "machine_configuration",
        _text("architecture", manifest.architecture)
        + _list("block_device_mapping", mappings)
        + _optional("kernel_id", manifest.kernel_id)
        + _optional("ramdisk_id", manifest.ramdisk_id)
        + _list("product_codes", (_text("product_code", code) for code in manifest.product_codes)),
    )


def _image(manifest: Manifest) -> str:
    return _element(
        "image",
        _text("name", manifest.name)
        + _text("user", manifest.user)
        + _text("type", manifest.type)
        + _optional("kernel_name", manifest.kernel_name)
        + _list("ancestry", (_text("ancestor_ami_id", ami) for ami in manifest.ancestry))
        + _element("digest", manifest.digest, _SHA1)
        + _element("size", str(manifest.size))
        + _element("bundled_size", str(manifest.bundled_size))
        + _element("ec2_encrypted_key", manifest.ec2_slot.key.hex(), _CIPHER)
        + _element("user_encrypted_key", manifest.user_slot.key.hex(), _CIPHER)
        + _element("ec2_encrypted_iv", manifest.ec2_slot.iv.hex())
        + _element("user_encrypted_iv", manifest.user_slot.iv.hex())
        + _element("parts", "".join(map(_part, manifest.parts)), f"count='{len(manifest.parts)}'"),
    )


def _part(part: ManifestPart) -> str:
    digest = _element("digest", part.sha1, _SHA1)
    return _element("part", _text("filename", part.filename) + digest, f"index='{part.index}'")


def _optional(tag: str, text: str | None) -> str:
    return _text(tag, text) if text else ""


def _list(tag: str, elements: Iterable[str]) -> str:
    content = "".join(elements)
    return _element(tag, content) if content else ""


def _text(tag: str, text: str) -> str:
    """An element with somebody's words in it."""
    if not text.isprintable() or _MARKUP & set(text):
        raise UnwritableValueError(f"the {tag} {text[:80]!a} cannot stand in a manifest that every verifier accepts")
    return _element(tag, text)


def _element(tag: str, content: str, attribute: str = "") -> str:
    return f"<{tag} {attribute}>{content}</{tag}>" if attribute else f"<{tag}>{content}</{tag}>"
