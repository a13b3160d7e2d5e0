"""Images in memory, bundles of such images, and the keys and certificates of the tests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from thrave.bundle.errors import PartMissingError
from thrave.bundle.manifest import write_manifest
from thrave.bundle.model import BundleKey, Part, SealedBundle
from thrave.bundle.sealer import Sealer
from thrave.bundle.side_file import write_side_file

VECTORS = Path(__file__).parents[2] / "data" / "vectors"
ACCOUNT = "123456789012"
BUNDLE_KEY = BundleKey(key=bytes(range(16)), iv=bytes(range(16, 32)))
SIDE_KEY = Ed25519PrivateKey.from_private_bytes(b"side".ljust(32))

Span = tuple[int, int]


@cache
def private_key(name: str) -> RSAPrivateKey:
    """Return a test key: "user", "cloud" (the service's), or "wrong", for which no vector is encrypted."""
    key = load_pem_private_key((VECTORS / "keys" / f"{name}-pk.pem").read_bytes(), None)
    assert isinstance(key, RSAPrivateKey)
    return key


@cache
def certificate(name: str) -> x509.Certificate:
    """Return the certificate of the test key "user" or "cloud"."""
    return x509.load_pem_x509_certificate((VECTORS / "keys" / f"{name}-cert.pem").read_bytes())


@dataclass
class MemoryImage:
    """An image of bytes.

    Attributes:
        data: All bytes of the image; zeros where it has a hole.
        spans: Extents with data, (offset, length) each; None: the whole image.
        on_read: Called with the offset before each read.
    """

    data: bytes
    spans: Sequence[Span] | None = None
    on_read: Callable[[int], None] = field(default=lambda _: None)

    @property
    def size(self) -> int:
        return len(self.data)

    def extents(self) -> Sequence[Span]:
        return [(0, self.size)] if self.spans is None else self.spans

    def prefetch(self, offset: int, length: int) -> None:
        pass

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.on_read(offset)
        buffer[:] = self.data[offset : offset + len(buffer)]


@dataclass
class PatternImage:
    """An image of any size that needs no memory: every byte of an extent is 0x5A."""

    size: int
    spans: Sequence[Span]

    def extents(self) -> Sequence[Span]:
        return self.spans

    def prefetch(self, offset: int, length: int) -> None:
        pass

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = b"\x5a" * len(buffer)


@dataclass(frozen=True)
class Bundle:
    """All files of a bundle in memory; also a `PartSource`."""

    manifest: bytes
    side_file: bytes
    parts: Mapping[str, bytes]
    sealed: SealedBundle

    def read(self, filename: str) -> bytes:
        if filename not in self.parts:
            raise PartMissingError(filename, "removed by the test")
        return self.parts[filename]


def seal(image, prefix: str = "disk", **options) -> tuple[list[Part], SealedBundle]:
    """Seal an image with `BUNDLE_KEY`; return its parts and its record."""
    sealer = Sealer(image, prefix, bundle_key=BUNDLE_KEY, **options)
    parts = list(sealer.parts())
    return parts, sealer.sealed


def manifest_of(sealed: SealedBundle) -> bytes:
    """Return the manifest of a bundle for the readers "user" and "cloud", signed by "user"."""
    return write_manifest(
        sealed,
        account_id=ACCOUNT,
        architecture="x86_64",
        user_certificate=certificate("user"),
        service_certificate=certificate("cloud"),
        signing_key=private_key("user"),
    )


def bundle_of(image, prefix: str = "disk", **options) -> Bundle:
    """Seal an image and return all files of the bundle."""
    parts, sealed = seal(image, prefix, **options)
    manifest = manifest_of(sealed)
    side_file = write_side_file(sealed, manifest, side_key=SIDE_KEY, signing_key=private_key("user"))
    return Bundle(manifest, side_file, {part.filename: bytes(part.data) for part in parts}, sealed)
