"""Deciphers the verified parts of a bundle back into one stream.

AES-128-CBC over all parts as one, PKCS#7 padding checked in full at the end. It never sees a part whose digest is
not known to be right. CBC could be deciphered on every core, but one does ten times what one inflates.

Opens and verifies bundles, whoever made them.

Everything about a bundle is hostile until verified. ``_plain_image`` joins the stages: a pool reads parts and checks
their digests, a thread deciphers them, one inflates, one hashes the tar stream, and the caller's thread takes the
image out of it. The image gets its name only after the last check.
"""

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.x509 import Certificate

from thrave.bundle.base import ImageMaker, PartSource
from thrave.bundle.errors import ContentError
from thrave.bundle.gzip_stream import inflated
from thrave.bundle.image_output import image_file, without_zeros
from thrave.bundle.model import CIPHER_BLOCK, BundleKey, unlock
from thrave.bundle.tar_reader import ImageRun, image_runs
from thrave.bundle.verifier import (
    CheckResult,
    CheckSubject,
    OpenResult,
    ProgressCallback,
    Trust,
    VerifiedManifest,
    VerifyResult,
    unheard,
    verified_parts,
    verify_manifest,
)
from thrave.pipeline import BufferPool, Pipeline

_SLICE = 1024 * 1024  # what is handed on while it is in the processor's cache


BUFFER = _SLICE + 2 * CIPHER_BLOCK
"""Bytes of a buffer: what was held back before a slice, the slice, and what ``update_into`` wants besides."""


def fresh() -> memoryview:
    """A new buffer."""
    return memoryview(bytearray(BUFFER))


def deciphered(
    parts: Iterable[bytes], secrets: BundleKey, free: Callable[[], memoryview] = fresh
) -> Iterator[memoryview]:
    """Yield the plain stream of the parts in order, without its padding.

    Args:
        parts: the ciphertext, cut anywhere.
        secrets: key and IV.
        free: gives the buffer that the next piece is to stand in, at its beginning.

    Raises:
        ContentError: the ciphertext is not whole blocks, or its padding is wrong (as it is under a wrong IV or key).
    """
    decryptor = Cipher(algorithms.AES(secrets.key), modes.CBC(secrets.iv)).decryptor()
    held = b""  # the padding is in the last block, and which that is shows only at the end
    for piece in _slices(parts):
        buffer = free()
        buffer[: len(held)] = held
        end = len(held) + decryptor.update_into(piece, buffer[len(held) :])
        kept = max(end - CIPHER_BLOCK, 0)
        held = bytes(buffer[kept:end])
        yield buffer[:kept]
    try:
        decryptor.finalize()
    except ValueError:
        raise ContentError("the parts together are no whole number of cipher blocks") from None
    rest, buffer = _unpadded(held), free()
    buffer[: len(rest)] = rest
    yield buffer[: len(rest)]


def _slices(parts: Iterable[bytes]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        yield from (view[start : start + _SLICE] for start in range(0, len(view), _SLICE))


def _unpadded(block: bytes) -> bytes:
    count = block[-1] if block else 0
    if not 1 <= count <= CIPHER_BLOCK or block[-count:] != bytes([count]) * count:
        raise ContentError("the padding at the end of the ciphertext is wrong")
    return block[:-count]


_PIECES_AHEAD = 4


_TAR_BUFFER = 1024 * 1024  # has room for several of the pieces that are inflated


_PARTS_AHEAD = 1  # of one thread that inflates; one hashes faster than that


_MOST_HASHING = 6  # parts at once where nothing is inflated; each is in memory


def open_bundle(
    manifest: bytes,
    parts: PartSource,
    private_key: RSAPrivateKey,
    output: Path,
    *,
    certificate: Certificate | None = None,
    side_file: bytes | None = None,
    side_key: Ed25519PublicKey | None = None,
    reporter: ProgressCallback = unheard,
) -> OpenResult:
    """Write a bundle's image to a file, holes as holes.

    Args:
        manifest: its XML.
        parts: where the parts are.
        private_key: the user's or the service's.
        output: where the image goes; it appears there only after the last check.
        certificate: the signer's; a signature that does not hold is fatal then.
        side_file: the side file where there is one; it is insisted on.
        side_key: whose side files are wanted; it is an error then if there is none.
        reporter: told how far it is.

    Raises:
        DamagedError: something does not hold; nothing is left at the output.
        PartMissingError: a part cannot be read.
        WrongKeyError: the key opens neither slot.
        OutputError: the image cannot be written.
    """
    opened = open_bundle_to(
        partial(image_file, output), manifest, parts, private_key,
        certificate=certificate, side_file=side_file, side_key=side_key, reporter=reporter,
    )  # fmt: skip
    return OpenResult(opened.manifest, opened.checks, output)


def open_bundle_to(
    make_image: ImageMaker,
    manifest: bytes,
    parts: PartSource,
    private_key: RSAPrivateKey,
    *,
    certificate: Certificate | None = None,
    side_file: bytes | None = None,
    side_key: Ed25519PublicKey | None = None,
    reporter: ProgressCallback = unheard,
    ahead: int | None = None,
) -> VerifyResult:
    """Give a bundle's image to whatever writes it.

    Args:
        make_image: makes the image, which is begun only after every check that needs no part.
        manifest: its XML.
        parts: and the rest, like the errors: as for ``open_bundle``.
        private_key: as there.
        certificate: as there.
        side_file: as there.
        side_key: as there.
        reporter: as there.
        ahead: how many parts are read at once, each in memory; None is as many as suit a disk.
    """
    believed = verify_manifest(manifest, side_file, Trust(certificate, side_key, private_key.public_key()))
    return open_believed_into(make_image, believed, parts, private_key, reporter=reporter, ahead=ahead)


def open_believed_into(
    make_image: ImageMaker,
    believed: VerifiedManifest,
    parts: PartSource,
    private_key: RSAPrivateKey,
    *,
    reporter: ProgressCallback = unheard,
    ahead: int | None = None,
) -> VerifyResult:
    """Give the image of a bundle to whatever writes it; its manifest was read and checked by `believe`.

    Arguments and errors as for ``open_bundle_into``.
    """
    secrets = _secrets(believed, private_key)
    plain = closing(_plain_image(believed, parts, secrets, reporter, ahead or _PARTS_AHEAD))
    with make_image(believed.manifest.size) as image, plain as runs:
        for offset, data in without_zeros(runs):
            image.write(offset, data)
    return VerifyResult(believed.manifest, (*believed.checks, *_checks(believed, deciphered=True)))


def verify_bundle(
    manifest: bytes,
    parts: PartSource,
    private_key: RSAPrivateKey | None = None,
    *,
    certificate: Certificate | None = None,
    side_file: bytes | None = None,
    side_key: Ed25519PublicKey | None = None,
    reporter: ProgressCallback = unheard,
    ahead: int | None = None,
) -> VerifyResult:
    """Check everything about a bundle that can be checked, and write nothing.

    Without a private key that is the signature, the structure and the parts' digests; with one the image's digest
    and size, too. Arguments and errors as for ``open_bundle_into``.
    """
    own_key = None if private_key is None else private_key.public_key()
    believed = verify_manifest(manifest, side_file, Trust(certificate, side_key, own_key))
    return verify_believed(believed, parts, private_key, reporter=reporter, ahead=ahead)


def verify_believed(
    believed: VerifiedManifest,
    parts: PartSource,
    private_key: RSAPrivateKey | None = None,
    *,
    reporter: ProgressCallback = unheard,
    ahead: int | None = None,
) -> VerifyResult:
    """Check the parts of a bundle whose manifest was read and checked by `believe`; see ``verify_bundle``."""
    if private_key is None:
        _exhaust_parts(believed, parts, reporter, ahead or min(os.cpu_count() or 1, _MOST_HASHING))
    else:
        secrets = _secrets(believed, private_key)
        with closing(_plain_image(believed, parts, secrets, reporter, ahead or _PARTS_AHEAD)) as runs:
            for _ in runs:
                pass
    return VerifyResult(believed.manifest, (*believed.checks, *_checks(believed, deciphered=private_key is not None)))


def _exhaust_parts(believed: VerifiedManifest, parts: PartSource, reporter: ProgressCallback, ahead: int) -> None:
    done = 0
    with Pipeline(ahead) as crew:
        for part in verified_parts(crew, believed, parts, ahead):
            done += len(part)
            reporter(done)


def _plain_image(
    believed: VerifiedManifest, parts: PartSource, secrets: BundleKey, reporter: ProgressCallback, ahead: int
) -> Generator[ImageRun]:
    """Yield the image's data; if it ends without an error the image is the one of the manifest."""
    tar_sha1 = hashlib.sha1(usedforsecurity=False)
    inflated_bytes = 0

    def counted(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        nonlocal inflated_bytes
        for piece in pieces:
            yield piece
            inflated_bytes += len(piece)

    def hashed(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        for piece in pieces:
            tar_sha1.update(piece)
            yield piece

    with Pipeline(ahead) as crew:
        ciphertext = verified_parts(crew, believed, parts, ahead)
        plain_buffers = BufferPool(crew, _PIECES_AHEAD + 2, BUFFER)
        plain = crew.ahead(deciphered(ciphertext, secrets, plain_buffers.free), _PIECES_AHEAD)
        tar_buffers = BufferPool(crew, 2 * _PIECES_AHEAD, _TAR_BUFFER)
        tar = crew.ahead(tar_buffers.filled(inflated(counted(plain_buffers.freed(plain)))), _PIECES_AHEAD)
        pieces = tar_buffers.freed(crew.ahead(hashed(tar), _PIECES_AHEAD))
        for run in image_runs(pieces, believed.manifest.size):
            yield run
            reporter(inflated_bytes)
    if tar_sha1.hexdigest() != believed.manifest.digest:
        raise ContentError("the SHA-1 of the tar stream is not the manifest's")
    reporter(believed.manifest.bundled_size)


def _secrets(believed: VerifiedManifest, private_key: RSAPrivateKey) -> BundleKey:
    return unlock((believed.manifest.user_slot, believed.manifest.ec2_slot), private_key)


def _checks(believed: VerifiedManifest, *, deciphered: bool) -> Iterator[CheckResult]:
    digests = "SHA-1 of each part" if believed.side is None else "SHA-1, SHA-256 and size of each part"
    yield CheckResult(CheckSubject.PART_DIGESTS, checked=True, detail=digests)
    reason = "no private key was given"
    yield CheckResult(CheckSubject.IMAGE_DIGEST, deciphered, "SHA-1 of the tar stream" if deciphered else reason)
    yield CheckResult(CheckSubject.IMAGE_SIZE, deciphered, f"{believed.manifest.size} bytes" if deciphered else reason)
