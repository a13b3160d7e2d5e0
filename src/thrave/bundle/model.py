"""Where a sealing can go on after it was cut off: what is known at the end of each part.

A checkpoint is small and holds no secret, and of the disk no more than digests; whoever keeps it keeps the key
elsewhere. It proves two things on the way back, so that nothing is ever enciphered with one key from two states of a
disk or by two compressors: the chunk in which the part ends must be deflated to the same bytes as far as parts hold
them, and the tar stream before it must have the same digests. Nothing here is read from a disk or written to one.

The names of a bundle's files: which are safe to write and to read, and how parts are numbered.

A name in a manifest is a stranger's word: it is used only as a bare file name beside the manifest. Nothing here
touches a disk.

The key and IV of one bundle, and the two slots of a manifest that carry them.

A slot holds the RSA PKCS#1 v1.5 encryption of the key's 32 lower-case hex characters, not of its 16 bytes
(ec2-ami-tools 1.5.3, euca2ools 3.4.1 and go_ami_tools agree). Nothing here ever prints or logs a key.

What sealing makes: parts with their bytes, and the records that remain of them.

Data only. A part's bytes are ciphertext; the one secret here, the bundle's key, is shown by no ``repr``.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

from thrave.bundle.errors import NamingError, ResumeError, WrongKeyError


@dataclass(frozen=True)
class StreamPosition:
    """A place in the tar stream, at a chunk's beginning.

    Attributes:
        offset: bytes of the tar stream before it.
        crc: their CRC-32, which goes on from here.
        proven: the first bytes of the stream whose SHA-1 is known: all of the offset, unless the sealing was cut off
            before; then those of the first time.
        sha1: lower-case hex of that SHA-1.
    """

    offset: int
    crc: int
    proven: int
    sha1: str


@dataclass(frozen=True)
class Checkpoint:
    """The end of a part.

    Attributes:
        parts: how many parts there are up to here.
        chunk: where the chunk begins in whose midst the part ends.
        skip: bytes of that chunk, deflated, that the parts hold already.
        skipped: lower-case hex of their SHA-256.
        last_block: hex of the last block of ciphertext, with which CBC goes on.
    """

    parts: int
    chunk: StreamPosition
    skip: int
    skipped: str
    last_block: str

    @classmethod
    def at(cls, parts: int, ciphertext: memoryview, chunk: StreamPosition, begun: memoryview) -> "Checkpoint":
        """The end of a part with this ciphertext, when `parts` parts hold the `begun` deflated bytes of a chunk."""
        return cls(parts, chunk, len(begun), hashlib.sha256(begun).hexdigest(), ciphertext[-16:].hex())

    def rest_of(self, deflated: memoryview) -> memoryview:
        """What of the chunk is still to be enciphered.

        Raises:
            ResumeError: it was deflated to other bytes than before: another disk, compression, library or processor.
        """
        if hashlib.sha256(deflated[: self.skip]).hexdigest() != self.skipped:
            raise ResumeError("the chunk at which the sealing was cut off is deflated to other bytes now")
        return deflated[self.skip :]

    def to_json(self) -> dict[str, Any]:
        """The checkpoint as JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Checkpoint":
        """A checkpoint from what `to_json` made of it."""
        return cls(**{**document, "chunk": StreamPosition(**document["chunk"])})


PART_SIZE = 10 * 1024 * 1024
"""Bytes of each part but the last, as ec2-ami-tools and every other known bundler cuts them."""


MANIFEST_SUFFIX = ".manifest.xml"


SIDE_FILE_SUFFIX = ".manifest.json"


_SERIES_DIGITS = 12


_BINDING_DIGITS = 32  # hexadecimal ones of the manifest's SHA-256


_LONGEST = 255


_LONGEST_SUFFIX = max(len(".part.") + 7, len(MANIFEST_SUFFIX), len(SIDE_FILE_SUFFIX))


_ACCOUNT_ID = re.compile(r"[0-9]{12}")


_WORD = re.compile(r"[A-Za-z0-9._-]+")


_PREFIX = re.compile(r"""(?![ .])(?:(?![/\\&<>"'])[ -~])+""")


def validate_prefix(prefix: str) -> str:
    """Return the prefix if a bundle may be written under it.

    It becomes the image's name, the tar member's and the stem of every file name, so it is a bare file name: ASCII
    without control characters, slashes and the five characters that XML escapes (verifiers that re-serialise the
    manifest, as ec2-ami-tools does, would not reproduce them), without a leading dot, and short enough to leave
    room for ``.part.NNNNNNN`` and ``.manifest.json`` in 255 bytes. The folder of an S3 prefix is the caller's affair.

    Raises:
        NamingError: it may not be used.
    """
    if not _PREFIX.fullmatch(prefix):
        raise NamingError(
            f"the prefix {prefix!r} must be a plain ASCII file name:"
            " no slash, no leading dot or space, none of & < > \" '"
        )
    if len(prefix) > _LONGEST - _LONGEST_SUFFIX:
        raise NamingError(f"the prefix is {len(prefix)} characters long; at most {_LONGEST - _LONGEST_SUFFIX} fit")
    return prefix


def validate_account_id(account_id: str) -> str:
    """Return the account id if it is one: 12 digits, without the hyphens that EC2 refuses in a manifest.

    Raises:
        NamingError: it is none.
    """
    if not _ACCOUNT_ID.fullmatch(account_id):
        raise NamingError(f"the account id {account_id!r} is not 12 digits")
    return account_id


def validate_architecture(architecture: str) -> str:
    """Return the architecture if it is a plain word, as EC2's ``x86_64``, ``i386`` and ``arm64`` are.

    Raises:
        NamingError: it is none.
    """
    if not _WORD.fullmatch(architecture):
        raise NamingError(f"the architecture {architecture!r} is not a plain word")
    return architecture


def validate_filename(filename: str) -> str:
    """Return a part's file name as a manifest gives it, if it names a file in the manifest's own folder.

    Old bundles have names with a leading dot, blanks, ``&`` or quotes. Any name is read that Linux lets a file have;
    what is printed of one is escaped.

    Raises:
        NamingError: It is empty, ``.`` or ``..``, has a slash or NUL in it, or more than 255 bytes of UTF-8.
    """
    bare = filename not in {"", ".", ".."} and not set(filename) & set("/\0")
    if not bare or len(filename.encode(errors="surrogatepass")) > _LONGEST:
        raise NamingError(f"{filename[:80]!r} is not a bare file name")
    return filename


def part_width(stream_length: int, part_size: int = PART_SIZE) -> int:
    """Return how many digits the part numbers of a bundle have.

    Names must sort in their order and the first is stored before the last is known, so the width follows from the
    most parts that can come of a stream. That ec2-ami-tools pads to the digits of the count (nine parts ``.part.0``,
    ten ``.part.00``) is kept for that most.

    Args:
        stream_length: the most bytes of ciphertext that there can be.
        part_size: bytes of each part but the last.
    """
    return len(str(-(-stream_length // part_size)))


def part_filename(prefix: str, index: int, width: int, series: str = "") -> str:
    """Return the file name of a part: ``PREFIX.part.007`` for index 7 and width 3.

    Args:
        prefix: the bundle's name.
        index: from 0.
        width: digits of the index.
        series: digits before the index; see ``new_series``.
    """
    return f"{prefix}.part.{series}{index:0{width}}"


def new_series() -> str:
    """Return digits that keep the names of a bundle's parts apart from those of every other bundle of its prefix.

    They stand before the part's index, so the names match ``PREFIX.part.[0-9]+`` as those of every known bundler do,
    and sort in their order. They are longer than any index, so no such name is one without a series.
    """
    return f"{1 + secrets.randbelow(9)}" + "".join(str(secrets.randbelow(10)) for _ in range(_SERIES_DIGITS - 1))


def own_part(prefix: str) -> re.Pattern[str]:
    """Return a pattern of the names that the parts of a bundle may have: no other file is ever copied or removed."""
    return re.compile(re.escape(prefix) + r"\.part\.[0-9]+")


def manifest_filename(prefix: str) -> str:
    """Return the file name of the manifest, which every tool derives from the prefix."""
    return prefix + MANIFEST_SUFFIX


def side_filename(prefix: str) -> str:
    """Return the usual file name of the side file, which old tools ignore."""
    return prefix + SIDE_FILE_SUFFIX


def bound_side_filename(prefix: str, manifest_xml: bytes) -> str:
    """Return the file name of a side file that belongs to one manifest: ``PREFIX.manifest.DIGEST.json``.

    A bundle that replaces another one has it, so that the side file of neither is ever read with the manifest of the
    other. Readers look for it first, then for the usual name.
    """
    return f"{prefix}.manifest.{hashlib.sha256(manifest_xml).hexdigest()[:_BINDING_DIGITS]}.json"


_HEX_128 = re.compile(rb"[0-9a-fA-F]{32}")


@dataclass(frozen=True)
class BundleKey:
    """AES-128-CBC key and IV, 16 bytes each; never used for two different streams."""

    key: bytes = field(repr=False)
    iv: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse anything but AES-128."""
        if len(self.key) != 16 or len(self.iv) != 16:
            raise ValueError("key and IV have 16 bytes each")

    @classmethod
    def generate(cls) -> Self:
        """Return a new random key and IV."""
        return cls(key=os.urandom(16), iv=os.urandom(16))


@dataclass(frozen=True)
class KeySlot:
    """Key and IV encrypted to one RSA key; both empty where a bundle has no such reader.

    Attributes:
        key: the encrypted key, as long as the RSA modulus.
        iv: the encrypted IV, likewise.
    """

    key: bytes = field(repr=False)
    iv: bytes = field(repr=False)


def lock(secrets: BundleKey, public_key: RSAPublicKey) -> KeySlot:
    """Return the slot that the owner of the key can unlock."""
    return KeySlot(
        key=public_key.encrypt(secrets.key.hex().encode(), PKCS1v15()),
        iv=public_key.encrypt(secrets.iv.hex().encode(), PKCS1v15()),
    )


def unlock(slots: Iterable[KeySlot], private_key: RSAPrivateKey) -> BundleKey:
    """Return the secrets from the first slot that the key opens.

    OpenSSL from 3.2 on answers a wrong key with random bytes in place of an error (implicit rejection), so only 32
    hex characters count as opened.

    Raises:
        WrongKeyError: the key opens none of them.
    """
    for slot in slots:
        key, iv = _decrypted(slot.key, private_key), _decrypted(slot.iv, private_key)
        if key and iv:
            return BundleKey(key=key, iv=iv)
    raise WrongKeyError(
        "this bundle was not encrypted for this private key: it opens neither the user's nor the service's slot"
    )


def _decrypted(encrypted: bytes, private_key: RSAPrivateKey) -> bytes | None:
    if len(encrypted) != (private_key.key_size + 7) // 8:
        return None
    try:
        text = private_key.decrypt(encrypted, PKCS1v15())
    except ValueError:
        return None
    return bytes.fromhex(text.decode()) if _HEX_128.fullmatch(text) else None


@dataclass(frozen=True)
class PartRecord:
    """What remains of a part once it has been stored.

    Attributes:
        index: from 0.
        filename: bare name, beside the manifest.
        size: bytes of ciphertext.
        sha1: lower-case hex of the ciphertext's SHA-1, for the manifest.
        sha256: its SHA-256, for the side file.
    """

    index: int
    filename: str
    size: int
    sha1: str
    sha256: str


@dataclass(frozen=True)
class Part(PartRecord):
    """One part as it comes out: its record and its bytes.

    Attributes:
        data: the ciphertext; the consumer's own, nothing reuses its memory.
        checkpoint: from where to go on once this part is stored; None where an earlier one has to serve.
    """

    data: memoryview = field(repr=False)
    checkpoint: Checkpoint | None = field(default=None, repr=False)

    @property
    def record(self) -> PartRecord:
        """The part without its bytes."""
        return PartRecord(self.index, self.filename, self.size, self.sha1, self.sha256)


@dataclass(frozen=True)
class SealedBundle:
    """A whole bundle but for its manifest.

    Attributes:
        prefix: the image's name and the stem of the file names.
        size: bytes of the image.
        digest: lower-case hex SHA-1 of the tar stream.
        secrets: what the manifest's slots will carry.
        parts: in order, at least one, none empty.
    """

    prefix: str
    size: int
    digest: str
    secrets: BundleKey = field(repr=False)
    parts: tuple[PartRecord, ...]

    @property
    def bundled_size(self) -> int:
        """Bytes of all parts together."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class CutOff:
    """What remains of a sealing that was cut off: its last checkpoint, and the parts up to there."""

    checkpoint: Checkpoint
    parts: tuple[PartRecord, ...]


CIPHER_BLOCK = 16
