"""Decides whether to believe a bundle, from the manifest outwards.

The order is fixed: the manifest's signature, its structure, the side file, each part's digests, and only then is
anything deciphered (``opening.py``). Nothing here writes.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.x509 import Certificate

from thrave.bundle.crew import Crew
from thrave.bundle.errors import ManifestError, PartDamagedError, SideFileError
from thrave.bundle.manifest import Manifest, ManifestPart
from thrave.bundle.partsource import PartSource
from thrave.bundle.reading import manifest_of, signature_of
from thrave.bundle.report import Check, Subject
from thrave.bundle.sidefile import Digest, SideFile, read_side_file
from thrave.bundle.signatures import is_signed_with, rsa_key, verify
from thrave.bundle.xmlreading import read_fields


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
class Believed:
    """A manifest that has passed all checks that need no part.

    Attributes:
        manifest: what it says.
        side: the side file where there is one.
        checks: what has been checked so far.
    """

    manifest: Manifest
    side: SideFile | None
    checks: tuple[Check, ...]


def believe(xml: bytes, side_file: bytes | None, trust: Trust) -> Believed:
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
    structure = Check(Subject.STRUCTURE, checked=True, detail=parts)
    if side_file is None:
        return Believed(manifest, None, (signature, structure, *_no_side_file(trust)))
    side = read_side_file(side_file)
    _compare(xml, manifest, side)
    detail = "SHA-256 of the manifest, names of the parts"
    listed = Check(Subject.SIDE_FILE, checked=True, detail=detail)
    return Believed(manifest, side, (signature, structure, listed, _check_side_key(side, trust, signer)))


def verified_parts(crew: Crew, believed: Believed, parts: PartSource, ahead: int) -> Iterator[bytes]:
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


def _check_signature(xml: bytes, signature: bytes, trust: Trust) -> tuple[Check, RSAPublicKey | None]:
    """Return the line of the report, and the signer's key where the signature holds."""
    if trust.certificate is not None:
        verify(xml, signature, trust.certificate)
        holds = Check(Subject.SIGNATURE, checked=True, detail="made with the certificate's key")
        return holds, rsa_key(trust.certificate)
    if not signature:
        return Check(Subject.SIGNATURE, checked=False, detail="the bundle is not signed"), None
    if trust.own_key is None:
        return Check(Subject.SIGNATURE, checked=False, detail="no signer's certificate was given"), None
    if is_signed_with(xml, signature, trust.own_key):
        holds = Check(Subject.SIGNATURE, checked=True, detail="made with the private key that was given")
        return holds, trust.own_key
    reason = (
        "not made with the private key that was given: the signer is unknown, or the manifest was changed;"
        " the signer's certificate decides (--certificate)"
    )
    return Check(Subject.SIGNATURE, checked=False, detail=reason), None


def _no_side_file(trust: Trust) -> tuple[Check, ...]:
    if trust.side_key is not None:
        raise SideFileError("a side key was given, but there is no side file")
    reason = "there is no side file"
    return tuple(Check(subject, checked=False, detail=reason) for subject in (Subject.SIDE_FILE, Subject.SIDE_KEY))


def _compare(xml: bytes, manifest: Manifest, side: SideFile) -> None:
    if side.manifest != Digest.of(xml):
        raise SideFileError("the manifest is not the one that the side file describes (SHA-256)")
    if list(side.parts) != [part.filename for part in manifest.parts]:
        raise SideFileError("the side file lists other parts than the manifest")


def _check_side_key(side: SideFile, trust: Trust, signer: RSAPublicKey | None) -> Check:
    if trust.side_key is not None and side.public_key != trust.side_key:
        raise SideFileError("the side file was signed with another key than the given one")
    if signer is not None and not side.is_vouched_for_by(signer):
        raise SideFileError("the signer of the manifest does not vouch for the side file's key")
    if trust.side_key is not None:
        return Check(Subject.SIDE_KEY, checked=True, detail="it is the given one")
    if signer is not None:
        return Check(Subject.SIDE_KEY, checked=True, detail="the manifest's signer vouches for it")
    reason = "neither a side key nor a signer's certificate was given"
    return Check(Subject.SIDE_KEY, checked=False, detail=reason)
