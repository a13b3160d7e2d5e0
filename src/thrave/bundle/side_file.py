"""The side file ``PREFIX.manifest.json``: strong digests beside a format that knows only SHA-1.

It holds SHA-256 and size of the manifest and of each part, signed with Ed25519. Old tools ignore it; where it is
there, we insist on it. An Ed25519 key that merely stands in the file proves nothing, so the key that signed the
manifest vouches for it (RSASSA-PSS, SHA-256, over a text of its own): whoever has the signer's certificate needs
nothing more, and whoever knows the side key can insist on that one. Both signatures are over canonical JSON (RFC 8785;
keys sorted, no white space), so the file itself may be indented for people.
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

# A value of JSON can take 40 times its bytes in memory. A line of a real side file has 150 bytes or more, one object
# and three commas; there is room for names that consist of such characters in part.
_FREE_VALUES = 1000

_KEY_PREFIX = b"thrave: this Ed25519 key signs the side files of my bundles: "
_PSS = PSS(MGF1(SHA256()), SHA256.digest_size)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Digest:
    """Size in bytes and lower-case hex SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> "Digest":
        """Return the digest of some bytes."""
        return cls(len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class SideFile:
    """A side file whose own signature holds.

    Attributes:
        manifest: of the manifest's bytes.
        parts: by file name.
        public_key: whose signature holds; who it belongs to is another question.
        key_signature: the manifest signer's signature over that key.
    """

    manifest: Digest
    parts: Mapping[str, Digest]
    public_key: Ed25519PublicKey
    key_signature: bytes

    def is_certified_by(self, signer: RSAPublicKey) -> bool:
        """Whether the signer of the manifest has also signed the side key."""
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
        sealed: what was stored.
        manifest_xml: the signed manifest, as it will be stored.
        side_key: signs the digests.
        signing_key: the key that signed the manifest; it vouches for the side key.
    """
    parts = {part.filename: Digest(part.size, part.sha256) for part in sealed.parts}
    return sign_digests(parts, manifest_xml, side_key=side_key, signing_key=signing_key)


def sign_digests(
    parts: Mapping[str, Digest], manifest_xml: bytes, *, side_key: Ed25519PrivateKey, signing_key: RSAPrivateKey
) -> bytes:
    """Return the side file of a bundle whose parts are given by file name, in order; else see ``write_side_file``."""
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
    """Return a side file whose Ed25519 signature holds.

    Raises:
        SideFileError: it is none, too large, or its signature is wrong.
    """
    if len(data) > MAX_SIDE_FILE_BYTES:
        raise SideFileError(f"the side file has more than {MAX_SIDE_FILE_BYTES} bytes")
    containers, commas = data.count(b"[") + data.count(b"{"), data.count(b",")
    if containers > _FREE_VALUES + len(data) // 32 or commas > _FREE_VALUES + len(data) // 16:
        raise SideFileError("the side file is no list of parts: it has too many JSON values for its size")
    try:
        document: object = json.loads(data, object_pairs_hook=_without_repetition)
        contents = _field(document, "contents", dict)
        canonical = _canonical(contents)
    except (ValueError, RecursionError):
        raise SideFileError("the side file is no JSON, or nested too deeply") from None
    public_key = _public_key(_bytes(document, "publicKey"))
    try:
        public_key.verify(_bytes(document, "signature"), canonical)
    except InvalidSignature:
        raise SideFileError("the side file was changed: its signature does not hold") from None
    if _field(contents, "format", str) != FORMAT:
        raise SideFileError("the side file is of a format that is not known")
    return SideFile(
        manifest=_digest(_field(contents, "manifest", dict)),
        parts={_field(part, "filename", str): _digest(part) for part in _field(contents, "parts", list)},
        public_key=public_key,
        key_signature=_bytes(document, "keySignature"),
    )


def _field(document: object, key: str, kind: type[_Kind]) -> _Kind:
    value = document.get(key) if isinstance(document, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SideFileError(f"the side file lacks {key!r}, or it is of a wrong kind")
    return value


def _digest(document: object) -> Digest:
    digest = Digest(_field(document, "size", int), _field(document, "sha256", str))
    if digest.size < 0 or not _SHA256.fullmatch(digest.sha256):
        raise SideFileError("a size or SHA-256 in the side file is none")
    return digest


def _bytes(document: object, key: str) -> bytes:
    try:
        return base64.b64decode(_field(document, key, str), validate=True)
    except ValueError:
        raise SideFileError(f"{key!r} in the side file is no base64") from None


def _public_key(raw: bytes) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        raise SideFileError("the side file's public key is no Ed25519 key") from None


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _canonical(contents: Mapping[str, object]) -> bytes:
    return json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
