"""A bundle's manifest as data, of any of its three versions.

Nothing is read, written, trusted or verified here: ``reading.py`` makes manifests of XML, ``writing.py`` XML of what
was sealed, ``signatures.py`` says whether to believe one.

Makes a ``Manifest`` of a manifest's XML.

As liberal as the programs that write bundles are different (three versions, either quoting, missing or empty slots,
any white space), as strict as a stranger's file needs: counts, indexes, names, digests and numbers are checked here.
Whether the signature holds is checked elsewhere.

Writes the manifest of what was sealed, or of what is already there.

The manifest's bytes are those of ec2-ami-tools 1.5.3: one line, single quotes, no white space, no final newline, that
order of elements. Its verifier re-serialises what it reads with REXML, so any other spelling, though valid XML, would
fail there. Values that would need escaping are refused rather than escaped.
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
"""The version that is written; never superseded."""


READABLE_VERSIONS = ("3", "20070829", "2007-08-29", VERSION)
"""The versions that ec2-ami-tools 1.2 to 1.5.3 wrote or accepted."""


UNSIGNED = "UNSIGNED"
"""Stands in place of a signature where euca2ools made a bundle without the user's key."""


@dataclass(frozen=True)
class Bundler:
    """The program that made a bundle, as far as it says; any word may be empty. Not signed."""

    name: str = ""
    version: str = ""
    release: str = ""

    def __str__(self) -> str:
        return " ".join(word for word in (self.name, self.version, self.release) if word)


@dataclass(frozen=True, slots=True)  # there may be 200,000
class ManifestPart:
    """One line of the list of parts.

    Attributes:
        index: from 0, the order of the parts.
        filename: bare name, beside the manifest.
        sha1: lower-case hex SHA-1 of the ciphertext.
    """

    index: int
    filename: str
    sha1: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a manifest says; whether it is true is another question.

    Attributes:
        version: one of ``READABLE_VERSIONS``.
        bundler: the program that made it.
        architecture: ``x86_64``, ``i386``, …; ``i386`` in version 3, which does not say.
        block_devices: (virtual, device) as the guest knew them.
        kernel_id: ``aki-…`` where given.
        ramdisk_id: ``ari-…`` where given.
        product_codes: as given.
        name: the image's name, which is the prefix without its folder.
        user: account id of whoever made it.
        type: ``machine``, ``kernel`` or ``ramdisk``.
        kernel_name: of a kernel, where given.
        ancestry: ``ami-…`` of the images that it descends from, oldest first.
        digest: lower-case hex SHA-1 of the tar stream.
        size: bytes of the image.
        bundled_size: bytes of all parts.
        user_slot: key and IV for the user's private key.
        ec2_slot: the same for the service's.
        parts: in the order of their indexes.
        signature: the bytes, empty where there are none.
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
        """Whether there is a signature at all; it may still be false."""
        return bool(self.signature)


_SHA1_HEX = re.compile(r"[0-9a-fA-F]{40}")


_NUMBER = re.compile(r"[0-9]{1,18}")


_CIPHER = "AES-128-CBC"


_HEX = re.compile(r"(?:[0-9a-fA-F]{2}){0,2048}")


def read_manifest(xml: bytes) -> Manifest:
    """Return what a manifest says, without believing it.

    Raises:
        ManifestError: it is no manifest of a known version, or contradicts itself.
    """
    return parse_manifest(read_fields(xml))


def parse_manifest(fields: Fields) -> Manifest:
    """Return what a manifest's fields say; see ``read_manifest``."""
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
    """Return the signature alone, empty if there is none: it is checked before anything else is looked at.

    Raises:
        ManifestError: it is not hexadecimal.
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
        raise ManifestError(f"{text[:40]!r} in the manifest is no size or number")
    return int(text)


def _sha1(text: str, algorithm: str | None) -> str:
    if algorithm not in ("SHA1", None) or not _SHA1_HEX.fullmatch(text):
        raise ManifestError(f"{text[:80]!r} in the manifest is no SHA-1")
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
        raise ManifestError(f"the manifest lists {len(rows)} parts and says that there are {count}")
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
    """An element with somebody's words in it."""
    if not text.isprintable() or _MARKUP & set(text):
        raise UnwritableValueError(f"the {tag} {text[:80]!a} cannot stand in a manifest that every verifier accepts")
    return _element(tag, text)


def _element(tag: str, content: str, attribute: str = "") -> str:
    return f"<{tag} {attribute}>{content}</{tag}>" if attribute else f"<{tag}>{content}</{tag}>"
