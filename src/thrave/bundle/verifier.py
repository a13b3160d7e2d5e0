"""What a reader of a bundle has checked, and what could not be checked and why.

Data only. A check that fails is an error, never an entry here.

Decides whether to believe a bundle, from the manifest outwards.

The order is fixed: the manifest's signature, its structure, the side file, each part's digests, and only then is
anything deciphered (``opening.py``). Nothing here writes.

Verifies a sample of a bundle's parts, and of the others that they are there and have their size.

For a bundle of many gigabytes that is looked at often. It never calls a bundle verified of which it has read only a
part: the report says what was not read, and with which seed the sample was drawn.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.x509 import Certificate

from thrave.bundle.base import PartSource
from thrave.bundle.errors import ManifestError, PartDamagedError, SideFileError
from thrave.bundle.manifest import Manifest, ManifestPart, manifest_of, signature_of
from thrave.bundle.manifest_xml import is_signed_with, read_fields, rsa_key, verify
from thrave.bundle.side_file import Digest, SideFile, read_side_file
from thrave.pipeline import Pipeline


class CheckSubject(StrEnum):
    """What can be checked, in the order in which it is."""

    SIGNATURE = "signature"
    STRUCTURE = "structure"
    SIDE_FILE = "sideFile"
    SIDE_KEY = "sideKey"
    PART_SIZES = "partSizes"
    PART_DIGESTS = "partDigests"
    IMAGE_DIGEST = "imageDigest"
    IMAGE_SIZE = "imageSize"


@dataclass(frozen=True)
class CheckResult:
    """One line of the report.

    Attributes:
        subject: what it is about.
        checked: True: it holds; False: it could not be checked.
        detail: what was found, or why nothing could be.
    """

    subject: CheckSubject
    checked: bool
    detail: str


@dataclass(frozen=True)
class VerifyResult:
    """A bundle in which nothing was found wrong.

    Attributes:
        manifest: what it says.
        checks: one for each subject that was looked at, in their order.
    """

    manifest: Manifest
    checks: tuple[CheckResult, ...]


@dataclass(frozen=True)
class OpenResult(VerifyResult):
    """A bundle that has been opened.

    Attributes:
        output: where its image is.
    """

    output: Path


@dataclass(frozen=True)
class Trust:
    """What the reader already believes.

    Attributes:
        certificate: the signer's; without one it is not known who should have signed the manifest.
        side_key: whose side files are wanted; with one there must be a side file.
        own_key: public half of the reader's key. Without a certificate it is tried for the signature: who opens a
            bundle has often made it. A signature that it did not make is no error.
    """

    certificate: Certificate | None = None
    side_key: Ed25519PublicKey | None = None
    own_key: RSAPublicKey | None = None


@dataclass(frozen=True)
class VerifiedManifest:
    """A manifest that has passed all checks that need no part.

    Attributes:
        manifest: what it says.
        side: the side file where there is one.
        checks: what has been checked so far.
    """

    manifest: Manifest
    side: SideFile | None
    checks: tuple[CheckResult, ...]


def verify_manifest(xml: bytes, side_file: bytes | None, trust: Trust) -> VerifiedManifest:
    """Check a manifest and its side file.

    Raises:
        ManifestError: it is no manifest, or contradicts itself.
        SignatureError: it is not signed with the certificate's key.
        SideFileError: the side file is missing though a side key was given, is damaged, or contradicts the manifest.
    """
    fields = read_fields(xml)
    signature, signer = _check_signature(xml, signature_of(fields), trust)
    manifest = manifest_of(fields)
    parts = f"{len(manifest.parts)} parts, {manifest.bundled_size} bytes, names and indexes in order"
    structure = CheckResult(CheckSubject.STRUCTURE, checked=True, detail=parts)
    if side_file is None:
        return VerifiedManifest(manifest, None, (signature, structure, *_no_side_file(trust)))
    side = read_side_file(side_file)
    _compare(xml, manifest, side)
    detail = "SHA-256 of the manifest, names of the parts"
    listed = CheckResult(CheckSubject.SIDE_FILE, checked=True, detail=detail)
    return VerifiedManifest(manifest, side, (signature, structure, listed, _check_side_key(side, trust, signer)))


def verified_parts(crew: Pipeline, believed: VerifiedManifest, parts: PartSource, ahead: int) -> Iterator[bytes]:
    """Yield the parts in order, none before its digests are known to be right; so many are read ahead.

    Raises:
        PartMissingError: one cannot be read.
        PartDamagedError: a digest or a size is wrong.
        ManifestError: their sizes together are not the bundle's.
    """
    done = 0

    def verified(part: ManifestPart) -> bytes:
        data = parts.read(part.filename)
        check_part(part, data, believed.side)
        return data

    for data in crew.map(verified, believed.manifest.parts, ahead):
        yield data
        done += len(data)
    if done != believed.manifest.bundled_size:
        raise ManifestError(f"the parts have {done} bytes together, not {believed.manifest.bundled_size}")


def check_part(part: ManifestPart, data: bytes, side: SideFile | None) -> None:
    """Check a part's digests.

    Raises:
        PartDamagedError: one is not the manifest's, or not the side file's.
    """
    if hashlib.sha1(data, usedforsecurity=False).hexdigest() != part.sha1:
        raise PartDamagedError(part.filename, f"its SHA-1 is not the manifest's ({len(data)} bytes)")
    if side is not None and side.parts[part.filename] != Digest.of(data):
        raise PartDamagedError(part.filename, "its SHA-256 or size is not the side file's")


def _check_signature(xml: bytes, signature: bytes, trust: Trust) -> tuple[CheckResult, RSAPublicKey | None]:
    """Return the line of the report, and the signer's key where the signature holds."""
    if trust.certificate is not None:
        verify(xml, signature, trust.certificate)
        holds = CheckResult(CheckSubject.SIGNATURE, checked=True, detail="made with the certificate's key")
        return holds, rsa_key(trust.certificate)
    if not signature:
        return CheckResult(CheckSubject.SIGNATURE, checked=False, detail="the bundle is not signed"), None
    if trust.own_key is None:
        return CheckResult(CheckSubject.SIGNATURE, checked=False, detail="no signer's certificate was given"), None
    if is_signed_with(xml, signature, trust.own_key):
        holds = CheckResult(CheckSubject.SIGNATURE, checked=True, detail="made with the private key that was given")
        return holds, trust.own_key
    reason = (
        "not made with the private key that was given: the signer is unknown, or the manifest was changed;"
        " the signer's certificate decides (--certificate)"
    )
    return CheckResult(CheckSubject.SIGNATURE, checked=False, detail=reason), None


def _no_side_file(trust: Trust) -> tuple[CheckResult, ...]:
    if trust.side_key is not None:
        raise SideFileError("a side key was given, but there is no side file")
    reason = "there is no side file"
    return tuple(
        CheckResult(subject, checked=False, detail=reason)
        for subject in (CheckSubject.SIDE_FILE, CheckSubject.SIDE_KEY)
    )


def _compare(xml: bytes, manifest: Manifest, side: SideFile) -> None:
    if side.manifest != Digest.of(xml):
        raise SideFileError("the manifest is not the one that the side file describes (SHA-256)")
    if list(side.parts) != [part.filename for part in manifest.parts]:
        raise SideFileError("the side file lists other parts than the manifest")


def _check_side_key(side: SideFile, trust: Trust, signer: RSAPublicKey | None) -> CheckResult:
    if trust.side_key is not None and side.public_key != trust.side_key:
        raise SideFileError("the side file was signed with another key than the given one")
    if signer is not None and not side.is_vouched_for_by(signer):
        raise SideFileError("the signer of the manifest does not vouch for the side file's key")
    if trust.side_key is not None:
        return CheckResult(CheckSubject.SIDE_KEY, checked=True, detail="it is the given one")
    if signer is not None:
        return CheckResult(CheckSubject.SIDE_KEY, checked=True, detail="the manifest's signer vouches for it")
    reason = "neither a side key nor a signer's certificate was given"
    return CheckResult(CheckSubject.SIDE_KEY, checked=False, detail=reason)


ProgressCallback = Callable[[int], None]
"""Told, in the caller's thread, how many bytes of the bundle's parts are done; never fewer than before."""


def unheard(_done: int) -> None:
    """A reporter that tells nobody."""


class MeasuredParts(PartSource, Protocol):
    """Parts whose size is known without reading them."""

    def size(self, filename: str) -> int:
        """Return a part's size in bytes.

        Raises:
            PartMissingError: it is not there or cannot be asked for.
        """
        ...


@dataclass(frozen=True)
class Sample:
    """How a sample is drawn: the same of the same bundle each time.

    Attributes:
        percent: of the parts, rounded up; above 0, to 100.
        seed: of the random choice.
    """

    percent: float
    seed: int

    def of(self, manifest: Manifest) -> Sequence[ManifestPart]:
        """Return the parts of the sample, in their order."""
        count = min(math.ceil(len(manifest.parts) * self.percent / 100), len(manifest.parts))
        chosen = Random(self.seed).sample(manifest.parts, count)  # noqa: S311 - a sample, no secret
        return sorted(chosen, key=lambda part: part.index)


def verify_sample(
    believed: VerifiedManifest,
    parts: MeasuredParts,
    sample: Sample,
    *,
    reporter: ProgressCallback = unheard,
    ahead: int,
) -> VerifyResult:
    """Check the size of each part of a bundle, and the digests of some.

    Args:
        believed: its manifest, read and checked by `believe`; errors are as for ``verify_bundle``.
        parts: where the parts are.
        sample: which of them are read.
        reporter: told how many bytes have been read.
        ahead: how many parts are asked for at once, each in memory.
    """
    chosen = sample.of(believed.manifest)
    with Pipeline(ahead) as crew:
        _check_sizes(believed, list(crew.map(lambda part: parts.size(part.filename), believed.manifest.parts, ahead)))
        done = 0
        for size in crew.map(lambda part: _verified_size(parts, part, believed), chosen, ahead):
            done += size
            reporter(done)
    return VerifyResult(believed.manifest, (*believed.checks, *_checks(believed.manifest, sample, len(chosen))))


def _check_sizes(believed: VerifiedManifest, sizes: Sequence[int]) -> None:
    if sum(sizes) != believed.manifest.bundled_size:
        raise ManifestError(f"the parts have {sum(sizes)} bytes together, not {believed.manifest.bundled_size}")
    for part, size in zip(believed.manifest.parts, sizes, strict=True):
        if believed.side is not None and believed.side.parts[part.filename].size != size:
            raise PartDamagedError(part.filename, "its size is not the side file's")


def _verified_size(parts: PartSource, part: ManifestPart, believed: VerifiedManifest) -> int:
    data = parts.read(part.filename)
    check_part(part, data, believed.side)
    return len(data)


def _checks(manifest: Manifest, sample: Sample, verified: int) -> tuple[CheckResult, ...]:
    count = len(manifest.parts)
    there = f"{count} parts are there, {manifest.bundled_size} bytes together"
    drawn = f"{verified} of {count} parts, drawn with seed {sample.seed}, hold; {count - verified} have not been read"
    reason = "only a sample was read"
    return (
        CheckResult(CheckSubject.PART_SIZES, checked=True, detail=there),
        CheckResult(CheckSubject.PART_DIGESTS, checked=verified == count, detail=drawn),
        CheckResult(CheckSubject.IMAGE_DIGEST, checked=False, detail=reason),
        CheckResult(CheckSubject.IMAGE_SIZE, checked=False, detail=reason),
    )
