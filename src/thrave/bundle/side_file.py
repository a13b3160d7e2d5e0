"""The side file ``PREFIX.manifest.json``: SHA-256 digests for a format that knows only SHA-1.

It holds SHA-256 and size of the manifest and of each part, signed with Ed25519. Old tools ignore it; if it exists, it
must be correct. An Ed25519 key in the file itself proves nothing, so the key that signed the manifest certifies it
(RSASSA-PSS, SHA-256, with a prefix of its own). The signer's certificate is then enough to verify the file; a reader
may also require a certain side key. Both signatures cover canonical JSON (RFC 8785; sorted keys, no white space).
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256

from thrave.bundle.errors import SideFileError
from thrave.bundle.model import SealedBundle

_Kind = TypeVar("_Kind")

FORMAT = "thrave-side-file-1"
MAX_SIDE_FILE_BYTES = 64 * 1024 * 1024

# A JSON value can take 40 times its bytes in memory. An entry of a real side file has 150 bytes or more, one object
# and three commas; names that contain some such characters are still accepted.
_ALLOWED_VALUES = 1000

_KEY_PREFIX = b"thrave: this Ed25519 key signs the side files of my bundles: "
_PSS = PSS(MGF1(SHA256()), SHA256.digest_size)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Digest:
    """Size in bytes and SHA-256 in lower-case hex of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> "Digest":
        """Return the digest of some bytes."""
        return cls(len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class SideFile:
    """A side file with a correct Ed25519 signature.

    Attributes:
        manifest: Digest of the manifest.
        parts: Digests by file name.
        public_key: The key that signed it; its owner is not verified.
        key_signature: Signature of the manifest's signer over that key.
    """

    manifest: Digest
    parts: Mapping[str, Digest]
    public_key: Ed25519PublicKey
    key_signature: bytes

    def is_certified_by(self, signer: RSAPublicKey) -> bool:
        """Whether the signer of the manifest has signed the side key."""
        try:
            signer.verify(self.key_signature, _KEY_PREFIX + self.public_key.public_bytes_raw(), _PSS, SHA256())
        except InvalidSignature:
            return False
        return True


def write_side_file(
    sealed: SealedBundle, manifest_xml: bytes, *, side_key: Ed25519PrivateKey, signing_key: RSAPrivateKey
) -> bytes:
    """Return the side file of a bundle.

    Args:
        sealed: The stored bundle.
        manifest_xml: The signed manifest, as it will be stored.
        side_key: Signs the digests.
        signing_key: The key that signed the manifest; it certifies the side key.
    """
    parts = {part.filename: Digest(part.size, part.sha256) for part in sealed.parts}
    return sign_digests(parts, manifest_xml, side_key=side_key, signing_key=signing_key)


def sign_digests(
    parts: Mapping[str, Digest], manifest_xml: bytes, *, side_key: Ed25519PrivateKey, signing_key: RSAPrivateKey
) -> bytes:
    """Return the side file of a bundle with these digests by file name, in order; see `write_side_file`."""
    manifest = Digest.of(manifest_xml)
    contents: dict[str, object] = {
        "format": FORMAT,
        "manifest": {"size": manifest.size, "sha256": manifest.sha256},
        "parts": [{"filename": name, "size": part.size, "sha256": part.sha256} for name, part in parts.items()],
    }
    public = side_key.public_key().public_bytes_raw()
    document = {
        "contents": contents,
        "publicKey": _base64(public),
        "signature": _base64(side_key.sign(_canonical(contents))),
        "keySignature": _base64(signing_key.sign(_KEY_PREFIX + public, _PSS, SHA256())),
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def read_side_file(data: bytes) -> SideFile:
    """Parse a side file and verify its Ed25519 signature.

    Raises:
        SideFileError: Not a side file, too large, or the signature is wrong.
    """
    if len(data) > MAX_SIDE_FILE_BYTES:
        raise SideFileError(f"the side file has more than {MAX_SIDE_FILE_BYTES} bytes")
    containers, commas = data.count(b"[") + data.count(b"{"), data.count(b",")
    if containers > _ALLOWED_VALUES + len(data) // 32 or commas > _ALLOWED_VALUES + len(data) // 16:
        raise SideFileError("the side file is not a list of parts: it has too many JSON values for its size")
    try:
        document: object = json.loads(data, object_pairs_hook=_unique_keys)
        contents = _field(document, "contents", dict)
        canonical = _canonical(contents)
    except (ValueError, RecursionError):
        raise SideFileError("the side file is not JSON, or nested too deeply") from None
    public_key = _public_key(_bytes(document, "publicKey"))
    try:
        public_key.verify(_bytes(document, "signature"), canonical)
    except InvalidSignature:
        raise SideFileError("the side file was changed: its signature is wrong") from None
    if _field(contents, "format", str) != FORMAT:
        raise SideFileError("the side file has an unknown format")
    return SideFile(
        manifest=_digest(_field(contents, "manifest", dict)),
        parts={_field(part, "filename", str): _digest(part) for part in _field(contents, "parts", list)},
        public_key=public_key,
        key_signature=_bytes(document, "keySignature"),
    )


def _field(document: object, key: str, kind: type[_Kind]) -> _Kind:
    value = document.get(key) if isinstance(document, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SideFileError(f"the side file has no {key!r}, or it has a wrong type")
    return value


def _digest(document: object) -> Digest:
    digest = Digest(_field(document, "size", int), _field(document, "sha256", str))
    if digest.size < 0 or not _SHA256.fullmatch(digest.sha256):
        raise SideFileError("a size or SHA-256 in the side file is invalid")
    return digest


def _bytes(document: object, key: str) -> bytes:
    try:
        return base64.b64decode(_field(document, key, str), validate=True)
    except ValueError:
        raise SideFileError(f"{key!r} in the side file is not base64") from None


def _public_key(raw: bytes) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        raise SideFileError("the side file's public key is not an Ed25519 key") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _canonical(contents: Mapping[str, object]) -> bytes:
    return json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
