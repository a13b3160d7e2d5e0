"""Opens and verifies bundles, whoever made them.

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
from cryptography.x509 import Certificate

from thrave.bundle.buffers import Buffers
from thrave.bundle.crew import Crew
from thrave.bundle.deciphering import BUFFER, deciphered
from thrave.bundle.deflate import inflated
from thrave.bundle.errors import ContentError
from thrave.bundle.holes import without_zeros
from thrave.bundle.output import ImageMaker, image_file
from thrave.bundle.partsource import PartSource
from thrave.bundle.report import Check, Opened, Subject, Verified
from thrave.bundle.secrets import BundleSecrets, unlock
from thrave.bundle.untar import Run, image_runs
from thrave.bundle.verifying import Believed, Trust, believe, verified_parts

_PIECES_AHEAD = 4
_TAR_BUFFER = 1024 * 1024  # has room for several of the pieces that are inflated
_PARTS_AHEAD = 1  # of one thread that inflates; one hashes faster than that
_MOST_HASHING = 6  # parts at once where nothing is inflated; each is in memory

Reporter = Callable[[int], None]
"""Told, in the caller's thread, how many bytes of the bundle's parts are done; never fewer than before."""


def unheard(_done: int) -> None:
    """A reporter that tells nobody."""


def open_bundle(
    manifest: bytes,
    parts: PartSource,
    private_key: RSAPrivateKey,
    output: Path,
    *,
    certificate: Certificate | None = None,
    side_file: bytes | None = None,
    side_key: Ed25519PublicKey | None = None,
    reporter: Reporter = unheard,
) -> Opened:
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
    opened = open_bundle_into(
        partial(image_file, output), manifest, parts, private_key,
        certificate=certificate, side_file=side_file, side_key=side_key, reporter=reporter,
    )  # fmt: skip
    return Opened(opened.manifest, opened.checks, output)


def open_bundle_into(
    make_image: ImageMaker,
    manifest: bytes,
    parts: PartSource,
    private_key: RSAPrivateKey,
    *,
    certificate: Certificate | None = None,
    side_file: bytes | None = None,
    side_key: Ed25519PublicKey | None = None,
    reporter: Reporter = unheard,
    ahead: int | None = None,
) -> Verified:
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
    believed = believe(manifest, side_file, Trust(certificate, side_key, private_key.public_key()))
    return open_believed_into(make_image, believed, parts, private_key, reporter=reporter, ahead=ahead)


def open_believed_into(
    make_image: ImageMaker,
    believed: Believed,
    parts: PartSource,
    private_key: RSAPrivateKey,
    *,
    reporter: Reporter = unheard,
    ahead: int | None = None,
) -> Verified:
    """Give the image of a bundle to whatever writes it; its manifest was read and checked by `believe`.

    Arguments and errors as for ``open_bundle_into``.
    """
    secrets = _secrets(believed, private_key)
    plain = closing(_plain_image(believed, parts, secrets, reporter, ahead or _PARTS_AHEAD))
    with make_image(believed.manifest.size) as image, plain as runs:
        for offset, data in without_zeros(runs):
            image.write(offset, data)
    return Verified(believed.manifest, (*believed.checks, *_checks(believed, deciphered=True)))


def verify_bundle(
    manifest: bytes,
    parts: PartSource,
    private_key: RSAPrivateKey | None = None,
    *,
    certificate: Certificate | None = None,
    side_file: bytes | None = None,
    side_key: Ed25519PublicKey | None = None,
    reporter: Reporter = unheard,
    ahead: int | None = None,
) -> Verified:
    """Check everything about a bundle that can be checked, and write nothing.

    Without a private key that is the signature, the structure and the parts' digests; with one the image's digest
    and size, too. Arguments and errors as for ``open_bundle_into``.
    """
    own_key = None if private_key is None else private_key.public_key()
    believed = believe(manifest, side_file, Trust(certificate, side_key, own_key))
    return verify_believed(believed, parts, private_key, reporter=reporter, ahead=ahead)


def verify_believed(
    believed: Believed,
    parts: PartSource,
    private_key: RSAPrivateKey | None = None,
    *,
    reporter: Reporter = unheard,
    ahead: int | None = None,
) -> Verified:
    """Check the parts of a bundle whose manifest was read and checked by `believe`; see ``verify_bundle``."""
    if private_key is None:
        _exhaust_parts(believed, parts, reporter, ahead or min(os.cpu_count() or 1, _MOST_HASHING))
    else:
        secrets = _secrets(believed, private_key)
        with closing(_plain_image(believed, parts, secrets, reporter, ahead or _PARTS_AHEAD)) as runs:
            for _ in runs:
                pass
    return Verified(believed.manifest, (*believed.checks, *_checks(believed, deciphered=private_key is not None)))


def _exhaust_parts(believed: Believed, parts: PartSource, reporter: Reporter, ahead: int) -> None:
    done = 0
    with Crew(ahead) as crew:
        for part in verified_parts(crew, believed, parts, ahead):
            done += len(part)
            reporter(done)


def _plain_image(
    believed: Believed, parts: PartSource, secrets: BundleSecrets, reporter: Reporter, ahead: int
) -> Generator[Run]:
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

    with Crew(ahead) as crew:
        ciphertext = verified_parts(crew, believed, parts, ahead)
        plain_buffers = Buffers(crew, _PIECES_AHEAD + 2, BUFFER)
        plain = crew.ahead(deciphered(ciphertext, secrets, plain_buffers.free), _PIECES_AHEAD)
        tar_buffers = Buffers(crew, 2 * _PIECES_AHEAD, _TAR_BUFFER)
        tar = crew.ahead(tar_buffers.filled(inflated(counted(plain_buffers.freed(plain)))), _PIECES_AHEAD)
        pieces = tar_buffers.freed(crew.ahead(hashed(tar), _PIECES_AHEAD))
        for run in image_runs(pieces, believed.manifest.size):
            yield run
            reporter(inflated_bytes)
    if tar_sha1.hexdigest() != believed.manifest.digest:
        raise ContentError("the SHA-1 of the tar stream is not the manifest's")
    reporter(believed.manifest.bundled_size)


def _secrets(believed: Believed, private_key: RSAPrivateKey) -> BundleSecrets:
    return unlock((believed.manifest.user_slot, believed.manifest.ec2_slot), private_key)


def _checks(believed: Believed, *, deciphered: bool) -> Iterator[Check]:
    digests = "SHA-1 of each part" if believed.side is None else "SHA-1, SHA-256 and size of each part"
    yield Check(Subject.PART_DIGESTS, checked=True, detail=digests)
    reason = "no private key was given"
    yield Check(Subject.IMAGE_DIGEST, deciphered, "SHA-1 of the tar stream" if deciphered else reason)
    yield Check(Subject.IMAGE_SIZE, deciphered, f"{believed.manifest.size} bytes" if deciphered else reason)
