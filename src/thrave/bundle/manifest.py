"""The manifest of a bundle as data; reads all three versions of its XML, and writes version 2007-10-10.

Reading accepts what known bundlers write: three versions, either quoting, missing or empty slots, any white space. A
manifest is not trusted, so counts, indexes, names, digests and numbers are checked here; the XML itself and signatures
are in `thrave.bundle.manifest_xml`. Written bytes equal those of ec2-ami-tools 1.5.3: one line, single quotes, no white
space, no final newline. Its verifier serializes the XML again with REXML, so any other valid spelling would fail.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.x509 import Certificate

from thrave.bundle.errors import ManifestError, NamingError, UnwritableValueError
from thrave.bundle.manifest_xml import Fields, Row, read_fields, rsa_key, sign
from thrave.bundle.model import (
    KeySlot,
    SealedBundle,
    encrypt_key,
    validate_account_id,
    validate_architecture,
    validate_filename,
)

VERSION = "2007-10-10"
"""The version that is written; there is no newer one."""


READABLE_VERSIONS = ("3", "20070829", "2007-08-29", VERSION)
"""The versions that ec2-ami-tools 1.2 to 1.5.3 wrote or accepted."""


UNSIGNED = "UNSIGNED"
"""Replaces the signature if euca2ools made a bundle without the user's key."""


@dataclass(frozen=True)
class Bundler:
    """The program that made a bundle; any field may be empty. Not covered by the signature."""

    name: str = ""
    version: str = ""
    release: str = ""

    def __str__(self) -> str:
        return " ".join(word for word in (self.name, self.version, self.release) if word)


@dataclass(frozen=True, slots=True)  # there may be 200,000
class ManifestPart:
    """One entry of the list of parts.

    Attributes:
        index: From 0, in the order of the parts.
        filename: Bare name, next to the manifest.
        sha1: SHA-1 of the ciphertext in lower-case hex.
    """

    index: int
    filename: str
    sha1: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The data of a manifest, not verified.

    Attributes:
        version: One of `READABLE_VERSIONS`.
        bundler: The program that made the bundle.
        architecture: ``x86_64``, ``i386``, …; ``i386`` in version 3, which has no such element.
        block_devices: (virtual name, device) as in the guest.
        kernel_id: ``aki-…`` if given.
        ramdisk_id: ``ari-…`` if given.
        product_codes: As given.
        name: Name of the image: the prefix without its folder.
        user: Account id of the owner.
        type: ``machine``, ``kernel`` or ``ramdisk``.
        kernel_name: Of a kernel, if given.
        ancestry: ``ami-…`` of the images from which it was made, oldest first.
        digest: SHA-1 of the tar stream in lower-case hex.
        size: Bytes of the image.
        bundled_size: Total bytes of all parts.
        user_slot: Key and IV encrypted for the user.
        ec2_slot: Key and IV encrypted for the service.
        parts: In the order of their indexes.
        signature: Empty if the manifest is not signed.
    """

    version: str
    bundler: Bundler
    architecture: str
    block_devices: tuple[tuple[str, str], ...] = ()
    kernel_id: str | None = None
    ramdisk_id: str | None = None
    product_codes: tuple[str, ...] = ()
    name: str
    user: str
    type: str = "machine"
    kernel_name: str | None = None
    ancestry: tuple[str, ...] = ()
    digest: str
    size: int
    bundled_size: int
    user_slot: KeySlot = field(repr=False)
    ec2_slot: KeySlot = field(repr=False)
    parts: tuple[ManifestPart, ...] = field(repr=False)
    signature: bytes = field(default=b"", repr=False)

    @property
    def is_signed(self) -> bool:
        """Whether there is a signature. It may be wrong."""
        return bool(self.signature)


_SHA1_HEX = re.compile(r"[0-9a-fA-F]{40}")


_NUMBER = re.compile(r"[0-9]{1,18}")


_CIPHER = "AES-128-CBC"


_HEX = re.compile(r"(?:[0-9a-fA-F]{2}){0,2048}")


def read_manifest(xml: bytes) -> Manifest:
    """Parse a manifest without verifying it.

    Raises:
        ManifestError: Not a manifest of a known version, or one that contradicts itself.
    """
    return parse_manifest(read_fields(xml))


def parse_manifest(fields: Fields) -> Manifest:
    """Return the manifest with these XML fields; see `read_manifest`."""
    version = _required(fields.text, "version")
    if version not in READABLE_VERSIONS:
        raise ManifestError(f"the manifest is of version {version[:40]!r}; known are {', '.join(READABLE_VERSIONS)}")
    text = fields.text
    bundler = Bundler(*(text.get(f"bundler/{key}", "") for key in ("name", "version", "release")))
    return Manifest(
        version=version,
        bundler=bundler,
        architecture=text.get("machine_configuration/architecture") or "i386",
        block_devices=_block_devices(fields),
        kernel_id=text.get("machine_configuration/kernel_id"),
        ramdisk_id=text.get("machine_configuration/ramdisk_id"),
        product_codes=tuple(fields.lists.get("machine_configuration/product_codes/product_code", ())),
        name=_name(_required(text, "image/name")),
        user=text.get("image/user", ""),
        type=text.get("image/type") or "machine",
        kernel_name=text.get("image/kernel_name"),
        ancestry=tuple(fields.lists.get("image/ancestry/ancestor_ami_id", ())),
        digest=_sha1(_required(text, "image/digest"), fields.attributes.get("image/digest@algorithm")),
        size=_number(_required(text, "image/size")),
        bundled_size=_number(_required(text, "image/bundled_size")),
        user_slot=_slot(fields, "user"),
        ec2_slot=_slot(fields, "ec2"),
        parts=_parts(fields),
        signature=parse_signature(fields),
    )


def parse_signature(fields: Fields) -> bytes:
    """Return the signature, empty if there is none. It is checked before the other fields are parsed.

    Raises:
        ManifestError: The signature is not hexadecimal.
    """
    text = fields.text.get("signature", "")
    return b"" if text == UNSIGNED else _hex(text, "signature")


def _required(text: Mapping[str, str], path: str) -> str:
    if path not in text:
        raise ManifestError(f"the manifest has no <{path}>")
    return text[path]


def _name(text: str) -> str:
    try:
        return validate_filename(text)
    except NamingError as error:
        raise ManifestError(f"a name in the manifest cannot be used: {error}") from None


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ManifestError(f"{text[:40]!r} in the manifest is not a size or number")
    return int(text)


def _sha1(text: str, algorithm: str | None) -> str:
    if algorithm not in ("SHA1", None) or not _SHA1_HEX.fullmatch(text):
        raise ManifestError(f"{text[:80]!r} in the manifest is not a SHA-1")
    return text.lower()


def _hex(text: str, what: str) -> bytes:
    if not _HEX.fullmatch(text):
        raise ManifestError(f"the {what} in the manifest is not hexadecimal")
    return bytes.fromhex(text)


def _slot(fields: Fields, owner: str) -> KeySlot:
    cipher = fields.attributes.get(f"image/{owner}_encrypted_key@algorithm", _CIPHER)
    if cipher != _CIPHER:
        raise ManifestError(f"the manifest's cipher is {cipher[:40]!r}; known is {_CIPHER}")
    key, iv = (fields.text.get(f"image/{owner}_encrypted_{what}", "") for what in ("key", "iv"))
    return KeySlot(key=_hex(key, "encrypted key"), iv=_hex(iv, "encrypted IV"))


def _block_devices(fields: Fields) -> tuple[tuple[str, str], ...]:
    rows = fields.rows.get("machine_configuration/block_device_mapping/mapping", [])
    return tuple((virtual, device) for virtual, device in rows)


def _parts(fields: Fields) -> tuple[ManifestPart, ...]:
    rows = fields.rows.get("image/parts/part", [])
    count = _number(fields.attributes.get("image/parts@count", ""))
    if not rows or count != len(rows):
        raise ManifestError(f"the manifest lists {len(rows)} parts, but states a count of {count}")
    parts = sorted((_part(row) for row in rows), key=lambda part: part.index)
    if [part.index for part in parts] != list(range(count)):
        raise ManifestError("the indexes of the parts do not run from 0 without gap or repetition")
    if len({part.filename for part in parts}) != count:
        raise ManifestError("two parts have the same file name")
    return tuple(parts)


def _part(row: Row) -> ManifestPart:
    index, filename, digest, algorithm = row
    return ManifestPart(index=_number(index), filename=_name(filename), sha1=_sha1(digest, algorithm or None))


_CIPHER_ATTRIBUTE = "algorithm='AES-128-CBC'"


_SHA1_ATTRIBUTE = "algorithm='SHA1'"


_MARKUP = frozenset("&<>\"'")


def write_manifest(
    sealed: SealedBundle,
    *,
    account_id: str,
    architecture: str,
    user_certificate: Certificate | None,
    service_certificate: Certificate,
    signing_key: RSAPrivateKey,
) -> bytes:
    """Write and sign the manifest of a bundle.

    Args:
        sealed: The stored bundle.
        account_id: Owner of the bundle, 12 digits.
        architecture: Of the machine on which the image boots.
        user_certificate: Of the account, which can then open the bundle. Without one, the user's slot is encrypted
            for the service, since ec2-unbundle refuses empty slots.
        service_certificate: Of the service where the image will be registered.
        signing_key: Readers verify the signature with the certificate of this key.

    Raises:
        NamingError: The account id or the architecture is not valid in a manifest.
    """
    manifest = Manifest(
        version=VERSION,
        bundler=_own_bundler(),
        architecture=validate_architecture(architecture),
        name=sealed.prefix,
        user=validate_account_id(account_id),
        digest=sealed.digest,
        size=sealed.size,
        bundled_size=sealed.bundled_size,
        user_slot=encrypt_key(sealed.bundle_key, rsa_key(user_certificate or service_certificate)),
        ec2_slot=encrypt_key(sealed.bundle_key, rsa_key(service_certificate)),
        parts=tuple(ManifestPart(part.index, part.filename, part.sha1) for part in sealed.parts),
    )
    return signed_manifest(manifest, signing_key)


def signed_manifest(manifest: Manifest, signing_key: RSAPrivateKey) -> bytes:
    """Return the XML of a manifest with a new signature, in version 2007-10-10.

    Raises:
        UnwritableValueError: A value cannot be written without escaping.
    """
    unsigned = (
        "<?xml version='1.0'?><manifest>"
        + _element("version", VERSION)
        + _bundler(manifest.bundler)
        + _machine_configuration(manifest)
        + _image(manifest)
    ).encode()
    return unsigned + f"<signature>{sign(unsigned, signing_key).hex()}</signature></manifest>".encode("ascii")


def _own_bundler() -> Bundler:
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
        + _element("digest", manifest.digest, _SHA1_ATTRIBUTE)
        + _element("size", str(manifest.size))
        + _element("bundled_size", str(manifest.bundled_size))
        + _element("ec2_encrypted_key", manifest.ec2_slot.key.hex(), _CIPHER_ATTRIBUTE)
        + _element("user_encrypted_key", manifest.user_slot.key.hex(), _CIPHER_ATTRIBUTE)
        + _element("ec2_encrypted_iv", manifest.ec2_slot.iv.hex())
        + _element("user_encrypted_iv", manifest.user_slot.iv.hex())
        + _element("parts", "".join(map(_part_element, manifest.parts)), f"count='{len(manifest.parts)}'"),
    )


def _part_element(part: ManifestPart) -> str:
    digest = _element("digest", part.sha1, _SHA1_ATTRIBUTE)
    return _element("part", _text("filename", part.filename) + digest, f"index='{part.index}'")


def _optional(tag: str, text: str | None) -> str:
    return _text(tag, text) if text else ""


def _list(tag: str, elements: Iterable[str]) -> str:
    content = "".join(elements)
    return _element(tag, content) if content else ""


def _text(tag: str, text: str) -> str:
    """Return an element whose text comes from outside."""
    if not text.isprintable() or _MARKUP & set(text):
        raise UnwritableValueError(
            f"the {tag} {text[:80]!a} cannot be written to a manifest that every verifier accepts"
        )
    return _element(tag, text)


def _element(tag: str, content: str, attribute: str = "") -> str:
    return f"<{tag} {attribute}>{content}</{tag}>" if attribute else f"<{tag}>{content}</{tag}>"
