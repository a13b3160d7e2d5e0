"""Makes a ``Manifest`` of a manifest's XML.

As liberal as the programs that write bundles are different (three versions, either quoting, missing or empty slots,
any white space), as strict as a stranger's file needs: counts, indexes, names, digests and numbers are checked here.
Whether the signature holds is checked elsewhere.
"""

import re
from collections.abc import Mapping

from thrave.bundle.errors import ManifestError, NamingError
from thrave.bundle.manifest import READABLE_VERSIONS, UNSIGNED, Bundler, Manifest, ManifestPart
from thrave.bundle.names import checked_filename
from thrave.bundle.secrets import KeySlot
from thrave.bundle.xmlreading import Fields, Row, read_fields

_SHA1 = re.compile(r"[0-9a-fA-F]{40}")
_NUMBER = re.compile(r"[0-9]{1,18}")
_CIPHER = "AES-128-CBC"
_HEX = re.compile(r"(?:[0-9a-fA-F]{2}){0,2048}")


def read_manifest(xml: bytes) -> Manifest:
    """Return what a manifest says, without believing it.

    Raises:
        ManifestError: it is no manifest of a known version, or contradicts itself.
    """
    return manifest_of(read_fields(xml))


def manifest_of(fields: Fields) -> Manifest:
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
        signature=signature_of(fields),
    )


def signature_of(fields: Fields) -> bytes:
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
        return checked_filename(text)
    except NamingError as error:
        raise ManifestError(f"a name in the manifest cannot be used: {error}") from None


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ManifestError(f"{text[:40]!r} in the manifest is no size or number")
    return int(text)


def _sha1(text: str, algorithm: str | None) -> str:
    if algorithm not in ("SHA1", None) or not _SHA1.fullmatch(text):
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
