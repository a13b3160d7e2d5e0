"""Opens bundles of any known bundler: verifies, decrypts and decompresses the parts, and writes the image.

Everything in a bundle is untrusted until verified. `_open_stream` joins the stages: a pool reads parts and checks
their digests; a thread each decrypts, decompresses, and hashes the tar stream; the caller's thread reads the image
from the tar stream. The image gets its name only after the last check. The checks are in `thrave.bundle.verifier`.
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
from thrave.bundle.gzip_stream import inflate
from thrave.bundle.image_output import image_file, skip_zeros
from thrave.bundle.model import CIPHER_BLOCK, BundleKey, decrypt_key
from thrave.bundle.tar_reader import ImageRun, image_runs
from thrave.bundle.verifier import (
    CheckResult,
    CheckSubject,
    OpenResult,
    ProgressCallback,
    Trust,
    VerifiedManifest,
    VerifyResult,
    ignore_progress,
    read_verified_parts,
    verify_manifest,
)
from thrave.pipeline import BufferPool, Pipeline

_PIECES_AHEAD = 4
_TAR_BUFFER = 1024 * 1024  # several decompressed pieces fit
_PARTS_AHEAD = 1  # decompression is one thread; one other thread hashes faster than that
_MAX_PARALLEL_HASHING = 6  # parts at once if nothing is decompressed; each is in memory

_SLICE = 1024 * 1024  # stays in the processor's cache until the next stage has read it
BUFFER = _SLICE + 2 * CIPHER_BLOCK
"""Bytes of a buffer of `decrypt`: the block held back, a slice, and one block more, which ``update_into`` requires."""


def open_bundle(
    manifest: bytes,
    parts: PartSource,
    private_key: RSAPrivateKey,
    output: Path,
    *,
    certificate: Certificate | None = None,
    side_file: bytes | None = None,
    side_key: Ed25519PublicKey | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> OpenResult:
    """Write the image of a bundle to a sparse file.

    Args:
        manifest: Its XML.
        parts: Where the parts are read.
        private_key: Of the user or of the service.
        output: Path of the image. The file appears only after the last check; a file at this path is replaced.
        certificate: Of the signer. With one, a missing or wrong signature is an error.
        side_file: The side file, if the bundle has one. It must then be correct.
        side_key: The key that must have signed the side file. With one, a missing side file is an error.
        on_progress: Called with the number of bytes processed.

    Raises:
        DamagedError: A check failed. Nothing remains at the output path.
        PartMissingError: A part cannot be read.
        WrongKeyError: The key decrypts neither slot.
        OutputError: The image cannot be written.
    """
    result = open_bundle_to(
        partial(image_file, output), manifest, parts, private_key,
        certificate=certificate, side_file=side_file, side_key=side_key, on_progress=on_progress,
    )  # fmt: skip
    return OpenResult(result.manifest, result.checks, output)


def open_bundle_to(
    make_image: ImageMaker,
    manifest: bytes,
    parts: PartSource,
    private_key: RSAPrivateKey,
    *,
    certificate: Certificate | None = None,
    side_file: bytes | None = None,
    side_key: Ed25519PublicKey | None = None,
    on_progress: ProgressCallback = ignore_progress,
    read_ahead: int | None = None,
) -> VerifyResult:
    """Write the image of a bundle to any target.

    Arguments and errors are those of `open_bundle`, except `make_image`, which creates the target after every check
    that needs no part, and `read_ahead`: how many parts to read at once, each in memory (None: as suits a disk).
    """
    verified = verify_manifest(manifest, side_file, Trust(certificate, side_key, private_key.public_key()))
    return open_verified_to(make_image, verified, parts, private_key, on_progress=on_progress, read_ahead=read_ahead)


def open_verified_to(
    make_image: ImageMaker,
    verified: VerifiedManifest,
    parts: PartSource,
    private_key: RSAPrivateKey,
    *,
    on_progress: ProgressCallback = ignore_progress,
    read_ahead: int | None = None,
) -> VerifyResult:
    """Write the image of a bundle whose manifest `verify_manifest` has checked; see `open_bundle_to`."""
    bundle_key = _decrypt_bundle_key(verified, private_key)
    stream = closing(_open_stream(verified, parts, bundle_key, on_progress, read_ahead or _PARTS_AHEAD))
    with make_image(verified.manifest.size) as image, stream as runs:
        for offset, data in skip_zeros(runs):
            image.write(offset, data)
    return VerifyResult(verified.manifest, (*verified.checks, *_check_results(verified, decrypted=True)))


def verify_bundle(
    manifest: bytes,
    parts: PartSource,
    private_key: RSAPrivateKey | None = None,
    *,
    certificate: Certificate | None = None,
    side_file: bytes | None = None,
    side_key: Ed25519PublicKey | None = None,
    on_progress: ProgressCallback = ignore_progress,
    read_ahead: int | None = None,
) -> VerifyResult:
    """Check everything about a bundle that can be checked, and write nothing.

    Without a private key: the signature, the structure and the digests of the parts. With one, also the digest and
    size of the image. Arguments and errors are those of `open_bundle_to`.
    """
    own_key = None if private_key is None else private_key.public_key()
    verified = verify_manifest(manifest, side_file, Trust(certificate, side_key, own_key))
    return verify_parts(verified, parts, private_key, on_progress=on_progress, read_ahead=read_ahead)


def verify_parts(
    verified: VerifiedManifest,
    parts: PartSource,
    private_key: RSAPrivateKey | None = None,
    *,
    on_progress: ProgressCallback = ignore_progress,
    read_ahead: int | None = None,
) -> VerifyResult:
    """Check the parts of a bundle whose manifest `verify_manifest` has checked; see `verify_bundle`."""
    if private_key is None:
        _read_all_parts(verified, parts, on_progress, read_ahead or min(os.cpu_count() or 1, _MAX_PARALLEL_HASHING))
    else:
        bundle_key = _decrypt_bundle_key(verified, private_key)
        with closing(_open_stream(verified, parts, bundle_key, on_progress, read_ahead or _PARTS_AHEAD)) as runs:
            for _ in runs:
                pass
    checks = _check_results(verified, decrypted=private_key is not None)
    return VerifyResult(verified.manifest, (*verified.checks, *checks))


def _read_all_parts(
    verified: VerifiedManifest, parts: PartSource, on_progress: ProgressCallback, read_ahead: int
) -> None:
    done = 0
    with Pipeline(read_ahead) as pipeline:
        for part in read_verified_parts(pipeline, verified, parts, read_ahead):
            done += len(part)
            on_progress(done)


def _open_stream(
    verified: VerifiedManifest, parts: PartSource, bundle_key: BundleKey, on_progress: ProgressCallback, read_ahead: int
) -> Generator[ImageRun]:
    """Yield the data of the image. If the generator ends without an error, the image is the one of the manifest."""
    tar_sha1 = hashlib.sha1(usedforsecurity=False)
    compressed_bytes = 0

    def count(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        nonlocal compressed_bytes
        for piece in pieces:
            yield piece
            compressed_bytes += len(piece)

    def hash_each(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        for piece in pieces:
            tar_sha1.update(piece)
            yield piece

    with Pipeline(read_ahead) as pipeline:
        ciphertext = read_verified_parts(pipeline, verified, parts, read_ahead)
        # One buffer each for the stages on both sides of the queue, besides those in the queue.
        gzip_buffers = BufferPool(pipeline, _PIECES_AHEAD + 2, BUFFER)
        gzip = pipeline.prefetch(decrypt(ciphertext, bundle_key, gzip_buffers.acquire), _PIECES_AHEAD)
        tar_buffers = BufferPool(pipeline, 2 * _PIECES_AHEAD, _TAR_BUFFER)
        decompressed = inflate(count(gzip_buffers.release_each(gzip)))
        tar = pipeline.prefetch(tar_buffers.fill(decompressed), _PIECES_AHEAD)
        pieces = tar_buffers.release_each(pipeline.prefetch(hash_each(tar), _PIECES_AHEAD))
        for run in image_runs(pieces, verified.manifest.size):
            yield run
            on_progress(compressed_bytes)
    if tar_sha1.hexdigest() != verified.manifest.digest:
        raise ContentError("SHA-1 of the tar stream differs from the manifest")
    on_progress(verified.manifest.bundled_size)


def new_buffer() -> memoryview:
    """Return a new buffer for `decrypt`."""
    return memoryview(bytearray(BUFFER))


def decrypt(
    parts: Iterable[bytes], bundle_key: BundleKey, acquire: Callable[[], memoryview] = new_buffer
) -> Iterator[memoryview]:
    """Decrypt parts with AES-128-CBC as one stream, and remove its PKCS#7 padding.

    CBC could be decrypted on every core, but one core decrypts ten times as fast as one core decompresses.

    Args:
        parts: The ciphertext, cut anywhere. Its digests must have been verified.
        bundle_key: Key and IV.
        acquire: Returns a buffer of `BUFFER` bytes; the next piece is at its beginning.

    Raises:
        ContentError: The ciphertext is not whole blocks, or the padding is wrong, as with a wrong key or IV.
    """
    decryptor = Cipher(algorithms.AES(bundle_key.key), modes.CBC(bundle_key.iv)).decryptor()
    held = b""  # the last block so far, which holds the padding if no more data follows
    for piece in _slices(parts):
        buffer = acquire()
        buffer[: len(held)] = held
        end = len(held) + decryptor.update_into(piece, buffer[len(held) :])
        kept = max(end - CIPHER_BLOCK, 0)
        held = bytes(buffer[kept:end])
        yield buffer[:kept]
    try:
        decryptor.finalize()
    except ValueError:
        raise ContentError("the total size of the parts is not a multiple of the cipher block") from None
    last, buffer = _remove_padding(held), acquire()
    buffer[: len(last)] = last
    yield buffer[: len(last)]


def _slices(parts: Iterable[bytes]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        yield from (view[start : start + _SLICE] for start in range(0, len(view), _SLICE))


def _remove_padding(block: bytes) -> bytes:
    count = block[-1] if block else 0
    if not 1 <= count <= CIPHER_BLOCK or block[-count:] != bytes([count]) * count:
        raise ContentError("the padding at the end of the ciphertext is wrong")
    return block[:-count]


def _decrypt_bundle_key(verified: VerifiedManifest, private_key: RSAPrivateKey) -> BundleKey:
    return decrypt_key((verified.manifest.user_slot, verified.manifest.ec2_slot), private_key)


def _check_results(verified: VerifiedManifest, *, decrypted: bool) -> Iterator[CheckResult]:
    digests = "SHA-1 of each part" if verified.side is None else "SHA-1, SHA-256 and size of each part"
    yield CheckResult(CheckSubject.PART_DIGESTS, checked=True, detail=digests)
    reason = "no private key was given"
    yield CheckResult(CheckSubject.IMAGE_DIGEST, decrypted, "SHA-1 of the tar stream" if decrypted else reason)
    yield CheckResult(CheckSubject.IMAGE_SIZE, decrypted, f"{verified.manifest.size} bytes" if decrypted else reason)
