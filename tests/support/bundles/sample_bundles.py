"""Images in memory, bundles made from them, and the test keys."""

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
SECRETS = BundleKey(key=bytes(range(16)), iv=bytes(range(16, 32)))
SIDE_KEY = Ed25519PrivateKey.from_private_bytes(b"side".ljust(32))

Span = tuple[int, int]


@cache
def private_key(name: str) -> RSAPrivateKey:
    key = load_pem_private_key((VECTORS / "keys" / f"{name}-pk.pem").read_bytes(), None)
    assert isinstance(key, RSAPrivateKey)
    return key


@cache
def certificate(name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((VECTORS / "keys" / f"{name}-cert.pem").read_bytes())


@dataclass
class MemoryImage:
    """Data at some extents; the rest is a hole. ``on_read`` is called with the offset before each read."""

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
    """An image of any size whose data costs no memory: every byte of an extent is the same."""

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
    """All files of a bundle in memory; also a ``PartSource``."""

    manifest: bytes
    side_file: bytes
    parts: Mapping[str, bytes]
    sealed: SealedBundle

    def read(self, filename: str) -> bytes:
        if filename not in self.parts:
            raise PartMissingError(filename, "it was dropped")
        return self.parts[filename]


def seal(image, prefix: str = "disk", **options) -> tuple[list[Part], SealedBundle]:
    sealing = Sealer(image, prefix, bundle_key=SECRETS, **options)
    parts = list(sealing.parts())
    return parts, sealing.sealed


def manifest_of(sealed: SealedBundle) -> bytes:
    return write_manifest(
        sealed,
        account_id=ACCOUNT,
        architecture="x86_64",
        user_certificate=certificate("user"),
        service_certificate=certificate("cloud"),
        signing_key=private_key("user"),
    )


def bundle_of(image, prefix: str = "disk", **options) -> Bundle:
    parts, sealed = seal(image, prefix, **options)
    manifest = manifest_of(sealed)
    side_file = write_side_file(sealed, manifest, side_key=SIDE_KEY, signing_key=private_key("user"))
    return Bundle(manifest, side_file, {part.filename: bytes(part.data) for part in parts}, sealed)
