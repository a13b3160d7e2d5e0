"""Verifies a bundle from the manifest outwards, and reports what was checked and what could not be checked.

The order is fixed: signature of the manifest, its structure, the side file, the digests of each part. Only then may
`thrave.bundle.opener` decrypt anything. Nothing here writes.
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
from thrave.bundle.manifest import Manifest, ManifestPart, parse_manifest, parse_signature
from thrave.bundle.manifest_xml import is_signed_with, read_fields, rsa_key, verify_signature
from thrave.bundle.side_file import Digest, SideFile, read_side_file
from thrave.pipeline import Pipeline

ProgressCallback = Callable[[int], None]
"""Called in the caller's thread with the number of bytes of the parts that are done. The number never decreases."""


def ignore_progress(_done: int) -> None:
    """Progress callback that does nothing."""


class CheckSubject(StrEnum):
    """What can be checked, in the order of the checks."""

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
    """Result of one check. A failed check is an exception, never a result.

    Attributes:
        subject: What was checked.
        checked: True: correct. False: could not be checked.
        detail: What was found, or why nothing could be checked.
    """

    subject: CheckSubject
    checked: bool
    detail: str


@dataclass(frozen=True)
class VerifyResult:
    """A bundle in which no check failed.

    Attributes:
        manifest: Its manifest.
        checks: In the order of the checks.
    """

    manifest: Manifest
    checks: tuple[CheckResult, ...]


@dataclass(frozen=True)
class OpenResult(VerifyResult):
    """A bundle that was opened to a file.

    Attributes:
        output: Path of the image.
    """

    output: Path


@dataclass(frozen=True)
class Trust:
    """The keys that a reader trusts.

    Attributes:
        certificate: Of the signer. Without one, the expected signer is unknown.
        side_key: The key that must have signed the side file. With one, a missing side file is an error.
        own_key: Public half of the reader's key. It is tried for the signature if there is no certificate, since the
            reader has often made the bundle. A signature of another key is then no error.
    """

    certificate: Certificate | None = None
    side_key: Ed25519PublicKey | None = None
    own_key: RSAPublicKey | None = None


@dataclass(frozen=True)
class VerifiedManifest:
    """A manifest that has passed all checks that need no part.

    Attributes:
        manifest: Its data.
        side: The side file, if the bundle has one.
        checks: Results so far.
    """

    manifest: Manifest
    side: SideFile | None
    checks: tuple[CheckResult, ...]


def verify_manifest(xml: bytes, side_file: bytes | None, trust: Trust) -> VerifiedManifest:
    """Check a manifest and its side file.

    Raises:
        ManifestError: It is not a manifest, or contradicts itself.
        SignatureError: It is not signed with the key of the trusted certificate.
        SideFileError: The side file is damaged, contradicts the manifest, or is missing although a side key is given.
    """
    fields = read_fields(xml)
    signature, signer = _check_signature(xml, parse_signature(fields), trust)
    manifest = parse_manifest(fields)
    parts = f"{len(manifest.parts)} parts, {manifest.bundled_size} bytes, names and indexes in order"
    structure = CheckResult(CheckSubject.STRUCTURE, checked=True, detail=parts)
    if side_file is None:
        return VerifiedManifest(manifest, None, (signature, structure, *_check_no_side_file(trust)))
    side = read_side_file(side_file)
    if side.manifest != Digest.of(xml):
        raise SideFileError("the side file describes another manifest: the SHA-256 differs")
    if list(side.parts) != [part.filename for part in manifest.parts]:
        raise SideFileError("the side file lists other parts than the manifest")
    detail = "SHA-256 of the manifest, names of the parts"
    contents = CheckResult(CheckSubject.SIDE_FILE, checked=True, detail=detail)
    return VerifiedManifest(manifest, side, (signature, structure, contents, _check_side_key(side, trust, signer)))


def _check_signature(xml: bytes, signature: bytes, trust: Trust) -> tuple[CheckResult, RSAPublicKey | None]:
    """Return the result, and the signer's key if the signature was verified."""
    if trust.certificate is not None:
        verify_signature(xml, signature, trust.certificate)
        result = CheckResult(CheckSubject.SIGNATURE, checked=True, detail="made with the certificate's key")
        return result, rsa_key(trust.certificate)
    if not signature:
        return CheckResult(CheckSubject.SIGNATURE, checked=False, detail="the bundle is not signed"), None
    if trust.own_key is None:
        return CheckResult(CheckSubject.SIGNATURE, checked=False, detail="no signer's certificate was given"), None
    if is_signed_with(xml, signature, trust.own_key):
        result = CheckResult(CheckSubject.SIGNATURE, checked=True, detail="made with the private key that was given")
        return result, trust.own_key
    reason = (
        "not made with the private key that was given: the signer is unknown, or the manifest was changed."
        " Pass the signer's certificate with --certificate to find out"
    )
    return CheckResult(CheckSubject.SIGNATURE, checked=False, detail=reason), None


def _check_no_side_file(trust: Trust) -> tuple[CheckResult, ...]:
    if trust.side_key is not None:
        raise SideFileError("a side key was given, but there is no side file")
    reason = "there is no side file"
    return tuple(
        CheckResult(subject, checked=False, detail=reason)
        for subject in (CheckSubject.SIDE_FILE, CheckSubject.SIDE_KEY)
    )


def _check_side_key(side: SideFile, trust: Trust, signer: RSAPublicKey | None) -> CheckResult:
    if trust.side_key is not None and side.public_key != trust.side_key:
        raise SideFileError("the side file was signed with another key than the given one")
    if signer is not None and not side.is_certified_by(signer):
        raise SideFileError("the signer of the manifest has not certified the side file's key")
    if trust.side_key is not None:
        return CheckResult(CheckSubject.SIDE_KEY, checked=True, detail="the given side key")
    if signer is not None:
        return CheckResult(CheckSubject.SIDE_KEY, checked=True, detail="certified by the signer of the manifest")
    reason = "neither a side key nor a signer's certificate was given"
    return CheckResult(CheckSubject.SIDE_KEY, checked=False, detail=reason)


def read_verified_parts(
    pipeline: Pipeline, verified: VerifiedManifest, parts: PartSource, read_ahead: int
) -> Iterator[bytes]:
    """Yield the parts in order, each after its digests have been verified. Reads up to `read_ahead` parts at once.

    Raises:
        PartMissingError: A part cannot be read.
        PartDamagedError: A digest or a size is wrong.
        ManifestError: The total size differs from the manifest.
    """
    done = 0

    def read_part(part: ManifestPart) -> bytes:
        data = parts.read(part.filename)
        check_part(part, data, verified.side)
        return data

    for data in pipeline.map(read_part, verified.manifest.parts, read_ahead):
        yield data
        done += len(data)
    if done != verified.manifest.bundled_size:
        raise ManifestError(f"the parts have {done} bytes together, not {verified.manifest.bundled_size}")


def check_part(part: ManifestPart, data: bytes, side: SideFile | None) -> None:
    """Check the digests of a part.

    Raises:
        PartDamagedError: A digest differs from the manifest or from the side file.
    """
    if hashlib.sha1(data, usedforsecurity=False).hexdigest() != part.sha1:
        raise PartDamagedError(part.filename, f"SHA-1 differs from the manifest ({len(data)} bytes)")
    if side is not None and side.parts[part.filename] != Digest.of(data):
        raise PartDamagedError(part.filename, "SHA-256 or size differs from the side file")


class SizedPartSource(PartSource, Protocol):
    """Parts whose size is available without reading them."""

    def size(self, filename: str) -> int:
        """Return the size of a part in bytes.

        Raises:
            PartMissingError: The part does not exist, or its size cannot be requested.
        """
        ...


@dataclass(frozen=True)
class Sample:
    """A random sample of the parts, the same for the same bundle and seed.

    Attributes:
        percent: Share of the parts, rounded up; above 0, up to 100.
        seed: Seed of the random choice.
    """

    percent: float
    seed: int

    def choose(self, manifest: Manifest) -> Sequence[ManifestPart]:
        """Return the parts of the sample in their order."""
        count = min(math.ceil(len(manifest.parts) * self.percent / 100), len(manifest.parts))
        chosen = Random(self.seed).sample(manifest.parts, count)  # noqa: S311 - a sample, not a secret
        return sorted(chosen, key=lambda part: part.index)


def verify_sample(
    verified: VerifiedManifest,
    parts: SizedPartSource,
    sample: Sample,
    *,
    on_progress: ProgressCallback = ignore_progress,
    read_ahead: int,
) -> VerifyResult:
    """Check the size of every part, and the digests of a sample. For large bundles that are verified often.

    The result says which share was not read, and the seed of the sample. Errors are those of `verify_bundle`.

    Args:
        verified: The manifest, checked by `verify_manifest`.
        parts: Where the parts are read.
        sample: The parts to read.
        on_progress: Called with the number of bytes that were read.
        read_ahead: Number of parts to request at once, each in memory.
    """
    chosen = sample.choose(verified.manifest)
    with Pipeline(read_ahead) as pipeline:
        sizes = pipeline.map(lambda part: parts.size(part.filename), verified.manifest.parts, read_ahead)
        _check_sizes(verified, list(sizes))
        done = 0
        for size in pipeline.map(lambda part: _read_and_check(parts, part, verified), chosen, read_ahead):
            done += size
            on_progress(done)
    return VerifyResult(verified.manifest, (*verified.checks, *_sample_checks(verified.manifest, sample, len(chosen))))


def _check_sizes(verified: VerifiedManifest, sizes: Sequence[int]) -> None:
    if sum(sizes) != verified.manifest.bundled_size:
        raise ManifestError(f"the parts have {sum(sizes)} bytes together, not {verified.manifest.bundled_size}")
    for part, size in zip(verified.manifest.parts, sizes, strict=True):
        if verified.side is not None and verified.side.parts[part.filename].size != size:
            raise PartDamagedError(part.filename, "size differs from the side file")


def _read_and_check(parts: SizedPartSource, part: ManifestPart, verified: VerifiedManifest) -> int:
    data = parts.read(part.filename)
    check_part(part, data, verified.side)
    return len(data)


def _sample_checks(manifest: Manifest, sample: Sample, read: int) -> tuple[CheckResult, ...]:
    count = len(manifest.parts)
    sizes = f"{count} parts exist, {manifest.bundled_size} bytes together"
    digests = f"{read} of {count} parts are correct (sample with seed {sample.seed}); {count - read} were not read"
    reason = "only a sample was read"
    return (
        CheckResult(CheckSubject.PART_SIZES, checked=True, detail=sizes),
        CheckResult(CheckSubject.PART_DIGESTS, checked=read == count, detail=digests),
        CheckResult(CheckSubject.IMAGE_DIGEST, checked=False, detail=reason),
        CheckResult(CheckSubject.IMAGE_SIZE, checked=False, detail=reason),
    )
