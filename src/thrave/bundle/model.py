"""Data of a bundle: its key, parts, checkpoints, and the names of its files. Nothing here reads or writes a file.

A checkpoint is small and holds no secret: only digests of the disk. Store it apart from the key. No ``repr`` shows a
key, an IV or ciphertext.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

from thrave.bundle.errors import NamingError, ResumeError, WrongKeyError
from thrave.concurrency import random_below, random_bytes

PART_SIZE = 10 * 1024 * 1024
"""Bytes of each part but the last, as in ec2-ami-tools and every other known bundler."""

CIPHER_BLOCK = 16
"""Bytes of an AES block."""

MANIFEST_SUFFIX = ".manifest.xml"
SIDE_FILE_SUFFIX = ".manifest.json"

_SERIES_DIGITS = 12
_BINDING_DIGITS = 32  # hexadecimal digits of the manifest's SHA-256
_MAX_FILENAME = 255
_MAX_SUFFIX = max(len(".part.") + 7, len(MANIFEST_SUFFIX), len(SIDE_FILE_SUFFIX))

_ACCOUNT_ID = re.compile(r"[0-9]{12}")
_WORD = re.compile(r"[A-Za-z0-9._-]+")
_PREFIX = re.compile(r"""(?![ .])(?:(?![/\\&<>"'])[ -~])+""")
_HEX_128 = re.compile(rb"[0-9a-fA-F]{32}")


@dataclass(frozen=True)
class BundleKey:
    """AES-128-CBC key and IV, 16 bytes each. Never use one for two different streams."""

    key: bytes = field(repr=False)
    iv: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse anything but AES-128."""
        if len(self.key) != 16 or len(self.iv) != 16:
            raise ValueError("key and IV have 16 bytes each")

    @classmethod
    def generate(cls) -> Self:
        """Return a new random key and IV."""
        return cls(key=random_bytes(16), iv=random_bytes(16))


@dataclass(frozen=True)
class KeySlot:
    """Key and IV encrypted for one RSA key; both empty where a bundle has no such reader.

    Each field is the RSA PKCS#1 v1.5 encryption of 32 lower-case hex characters, not of 16 bytes (ec2-ami-tools 1.5.3,
    euca2ools 3.4.1 and go_ami_tools agree).

    Attributes:
        key: The encrypted key, as long as the RSA modulus.
        iv: The encrypted IV, of the same length.
    """

    key: bytes = field(repr=False)
    iv: bytes = field(repr=False)


def encrypt_key(bundle_key: BundleKey, public_key: RSAPublicKey) -> KeySlot:
    """Return a slot that the owner of the RSA key can decrypt."""
    return KeySlot(
        key=public_key.encrypt(bundle_key.key.hex().encode(), PKCS1v15()),
        iv=public_key.encrypt(bundle_key.iv.hex().encode(), PKCS1v15()),
    )


def decrypt_key(slots: Iterable[KeySlot], private_key: RSAPrivateKey) -> BundleKey:
    """Return key and IV from the first slot that the private key decrypts.

    Raises:
        WrongKeyError: The private key decrypts no slot.
    """
    for slot in slots:
        key, iv = _decrypt_field(slot.key, private_key), _decrypt_field(slot.iv, private_key)
        if key and iv:
            return BundleKey(key=key, iv=iv)
    raise WrongKeyError(
        "this bundle was not encrypted for this private key: it decrypts neither the user's nor the service's slot"
    )


def _decrypt_field(encrypted: bytes, private_key: RSAPrivateKey) -> bytes | None:
    if len(encrypted) != (private_key.key_size + 7) // 8:
        return None
    try:
        text = private_key.decrypt(encrypted, PKCS1v15())
    except ValueError:
        return None
    # OpenSSL 3.2 and later returns random bytes for a wrong key instead of an error (implicit rejection).
    return bytes.fromhex(text.decode()) if _HEX_128.fullmatch(text) else None


@dataclass(frozen=True)
class StreamPosition:
    """A position in the tar stream, at the beginning of a chunk.

    Attributes:
        offset: Bytes of the tar stream before the position.
        crc: CRC-32 of those bytes; the next chunk continues it.
        hashed_size: Bytes from the beginning of the stream that `sha1` covers. Equal to `offset`, unless sealing was
            resumed; then the value of the first run.
        sha1: SHA-1 of those bytes in lower-case hex.
    """

    offset: int
    crc: int
    hashed_size: int
    sha1: str


@dataclass(frozen=True)
class Checkpoint:
    """The end of a part, from which sealing can resume.

    A resumed run must not encrypt different data with the same key. So it checks two things: the chunk in which the
    part ends must compress to the same bytes as far as stored parts hold them, and the tar stream before that chunk
    must have the same digests.

    Attributes:
        parts: Number of parts up to the checkpoint.
        chunk: Beginning of the chunk in which the part ends.
        skip: Compressed bytes of that chunk that the parts already hold.
        skipped: SHA-256 of those bytes, in lower-case hex.
        last_block: The last block of ciphertext in hex; CBC continues from this block.
    """

    parts: int
    chunk: StreamPosition
    skip: int
    skipped: str
    last_block: str

    @classmethod
    def at_part_end(cls, parts: int, ciphertext: memoryview, chunk: StreamPosition, head: memoryview) -> "Checkpoint":
        """Return the checkpoint at the end of a part.

        Args:
            parts: Number of parts up to and including this one.
            ciphertext: Of this part.
            chunk: Beginning of the chunk in which the part ends.
            head: The first compressed bytes of that chunk, which the parts hold.
        """
        return cls(parts, chunk, len(head), hashlib.sha256(head).hexdigest(), ciphertext[-CIPHER_BLOCK:].hex())

    def remaining_bytes(self, compressed: memoryview) -> memoryview:
        """Return the bytes of the chunk that must still be encrypted.

        Raises:
            ResumeError: The chunk compresses to other bytes than before: another disk, compression, library or
                processor.
        """
        if hashlib.sha256(compressed[: self.skip]).hexdigest() != self.skipped:
            raise ResumeError("cannot resume: the chunk at the checkpoint compresses to other bytes than before")
        return compressed[self.skip :]

    def to_json(self) -> dict[str, Any]:
        """Return the checkpoint as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Checkpoint":
        """Return the checkpoint of a JSON object that `to_json` made."""
        return cls(**{**document, "chunk": StreamPosition(**document["chunk"])})


@dataclass(frozen=True)
class PartRecord:
    """Name, size and digests of a part; remains after its bytes were stored.

    Attributes:
        index: From 0.
        filename: Bare name, next to the manifest.
        size: Bytes of ciphertext.
        sha1: SHA-1 of the ciphertext in lower-case hex, for the manifest.
        sha256: Its SHA-256, for the side file.
    """

    index: int
    filename: str
    size: int
    sha1: str
    sha256: str


@dataclass(frozen=True)
class Part(PartRecord):
    """A part with its bytes.

    Attributes:
        data: The ciphertext. The memory belongs to the consumer and is not reused.
        checkpoint: Where to resume once this part is stored; None where an earlier checkpoint must be used.
    """

    data: memoryview = field(repr=False)
    checkpoint: Checkpoint | None = field(default=None, repr=False)

    @property
    def record(self) -> PartRecord:
        """The part without its bytes."""
        return PartRecord(self.index, self.filename, self.size, self.sha1, self.sha256)


@dataclass(frozen=True)
class SealedBundle:
    """All data of a bundle that its manifest and side file need.

    Attributes:
        prefix: Name of the image, and the first part of every file name.
        size: Bytes of the image.
        digest: SHA-1 of the tar stream in lower-case hex.
        bundle_key: Key and IV; the manifest carries them encrypted.
        parts: In order; at least one, none empty.
    """

    prefix: str
    size: int
    digest: str
    bundle_key: BundleKey = field(repr=False)
    parts: tuple[PartRecord, ...]

    @property
    def bundled_size(self) -> int:
        """Total bytes of all parts."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class ResumePoint:
    """Where an interrupted sealing resumes: its last checkpoint, and the parts up to the checkpoint."""

    checkpoint: Checkpoint
    parts: tuple[PartRecord, ...]


def validate_prefix(prefix: str) -> str:
    """Return the prefix if a bundle may use it.

    The prefix becomes the name of the image and of the tar member, and the first part of every file name. So it is a
    bare ASCII file name, without a leading dot, control characters and slashes. The five characters that XML escapes
    are refused: verifiers that serialize the manifest again, as ec2-ami-tools does, would not reproduce them. It must
    leave space for ``.part.NNNNNNN`` and ``.manifest.json`` in 255 bytes. The folder of an S3 prefix is not part of it.

    Raises:
        NamingError: The prefix may not be used.
    """
    if not _PREFIX.fullmatch(prefix):
        raise NamingError(
            f"the prefix {prefix!r} must be a plain ASCII file name:"
            " no slash, no leading dot or space, none of & < > \" '"
        )
    if len(prefix) > _MAX_FILENAME - _MAX_SUFFIX:
        raise NamingError(f"the prefix has {len(prefix)} characters; the maximum is {_MAX_FILENAME - _MAX_SUFFIX}")
    return prefix


def validate_account_id(account_id: str) -> str:
    """Return the account id if it has 12 digits, without the hyphens that EC2 refuses in a manifest.

    Raises:
        NamingError: It has not.
    """
    if not _ACCOUNT_ID.fullmatch(account_id):
        raise NamingError(f"the account id {account_id!r} is not 12 digits")
    return account_id


def validate_architecture(architecture: str) -> str:
    """Return the architecture if it is a plain word, as EC2's ``x86_64``, ``i386`` and ``arm64`` are.

    Raises:
        NamingError: It is not.
    """
    if not _WORD.fullmatch(architecture):
        raise NamingError(f"the architecture {architecture!r} is not a plain word")
    return architecture


def validate_filename(filename: str) -> str:
    """Return the name from a manifest if it is safe to read as a file next to the manifest.

    A name in a manifest is not trusted. Old bundles have names with a leading dot, blanks, ``&`` or quotes, so every
    name is accepted that Linux allows for a file. Escape it before printing.

    Raises:
        NamingError: It is empty, ``.`` or ``..``, contains a slash or NUL, or has more than 255 bytes of UTF-8.
    """
    is_bare = filename not in {"", ".", ".."} and not set(filename) & set("/\0")
    if not is_bare or len(filename.encode(errors="surrogatepass")) > _MAX_FILENAME:
        raise NamingError(f"{filename[:80]!r} is not a bare file name")
    return filename


def part_width(stream_length: int, part_size: int = PART_SIZE) -> int:
    """Return the number of digits in the part numbers of a bundle.

    Names must sort in the order of the parts, and the first part is stored before the number of parts is known. So
    the width follows from the maximum number of parts of a stream. As in ec2-ami-tools, it is the number of digits of
    that number, not of the last index (nine parts ``.part.0``, ten ``.part.00``).

    Args:
        stream_length: Maximum bytes of ciphertext.
        part_size: Bytes of each part but the last.
    """
    return len(str(-(-stream_length // part_size)))


def part_filename(prefix: str, index: int, width: int, series: str = "") -> str:
    """Return the file name of a part: ``PREFIX.part.007`` for index 7 and width 3.

    Args:
        prefix: Name of the bundle.
        index: From 0.
        width: Digits of the index.
        series: Digits before the index; see `new_series`.
    """
    return f"{prefix}.part.{series}{index:0{width}}"


def new_series() -> str:
    """Return random digits that make the part names of a bundle unique among all bundles with its prefix.

    The digits precede the index, so the names match ``PREFIX.part.[0-9]+``, as those of every known bundler do, and
    sort in the order of the parts. They are longer than any index, so they never equal a name without a series.
    """
    return f"{1 + random_below(9)}" + "".join(str(random_below(10)) for _ in range(_SERIES_DIGITS - 1))


def part_pattern(prefix: str) -> re.Pattern[str]:
    """Return a pattern of the part names of a bundle. No other file is ever copied or deleted."""
    return re.compile(re.escape(prefix) + r"\.part\.[0-9]+")


def manifest_filename(prefix: str) -> str:
    """Return the file name of the manifest, which every tool derives from the prefix."""
    return prefix + MANIFEST_SUFFIX


def side_filename(prefix: str) -> str:
    """Return the usual file name of the side file, which old tools ignore."""
    return prefix + SIDE_FILE_SUFFIX


def bound_side_filename(prefix: str, manifest_xml: bytes) -> str:
    """Return the file name of a side file that belongs to one manifest: ``PREFIX.manifest.DIGEST.json``.

    A bundle that replaces another one uses this name, so that no reader combines the side file of one with the
    manifest of the other. Readers try this name first, then the usual name.
    """
    return f"{prefix}.manifest.{hashlib.sha256(manifest_xml).hexdigest()[:_BINDING_DIGITS]}.json"
