"""`thrave copy`: a bundle from one folder, bucket or web server to another, as it is.

Nothing is decrypted and no private key is wanted. Each part is verified on its way, so what arrives is what the
manifest describes; the manifest goes last. A part that is there already is read there and not sent again.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import click

from thrave.bundle.model import MANIFEST_SUFFIX
from thrave.cli.bundle_folder import BundleExists
from thrave.cli.bundle_options import certificate_option, side_key_option
from thrave.cli.folders import FileMissingError, FolderParts, WritableFolder, parts_ahead
from thrave.cli.locations import LOCATION, Address, Location, read_documents, writable_folder
from thrave.cli.output import emit, output_option
from thrave.cli.progress import progress_bar
from thrave.cli.signals import cleans_up_on_signals
from thrave.cli.sizes import words

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.x509 import Certificate

    from thrave.bundle.manifest import ManifestPart
    from thrave.bundle.verifier import VerifiedManifest, VerifyResult
    from thrave.cli.folders import Folder

_DISK_AHEAD = 2


@dataclass(frozen=True)
class Destination:
    """Where a bundle goes: a folder, and the manifest's file name if the user has said one."""

    folder: WritableFolder
    manifest: str | None


def destination(address: str) -> Destination:
    """Where a bundle goes.

    Raises:
        ValueError: It is no address of a folder that can be written to.
    """
    folder, _, manifest = address.rpartition("/")
    if manifest.endswith(MANIFEST_SUFFIX):
        return Destination(writable_folder(folder or "."), manifest)
    return Destination(writable_folder(address), None)


@click.command()
@click.argument("location", type=LOCATION, metavar="LOCATION")
@click.argument("to", type=Address(destination), metavar="FOLDER")
@certificate_option
@side_key_option
@output_option
@cleans_up_on_signals
def copy(
    *,
    location: Location[Folder],
    to: Destination,
    certificate: Certificate | None,
    side_key: Ed25519PublicKey | None,
    output: str,
) -> None:
    """Copy the bundle at LOCATION to FOLDER, on the disk or in a bucket (s3://BUCKET/FOLDER).

    LOCATION is as for `thrave open`. Signature, names and the digest of each part are verified on the way; nothing is
    decrypted, so no private key is wanted. The manifest goes last: where it is, the bundle is complete. If the copy is
    cut off, the same command goes on with it.

    The file names stay. They stand in the signed manifest, so a bundle can be put into another folder but not be
    renamed.

    \b
    Example:
      thrave copy bundles/winami.manifest.xml s3://my-bucket/2026 --certificate signer.pem

    Exit codes: 0 done, 1 a folder cannot be reached or written, 2 wrong command line, 3 a file or bucket is missing, 4
    another bundle of that name is there, or not allowed, 10 damaged or forged.
    """
    from thrave.bundle.verifier import Trust, verify_manifest
    from thrave.cli.bundle_files import own_part_filenames

    if to.manifest not in {None, location.manifest}:
        raise click.UsageError(
            f"a bundle cannot be renamed: its files' names stand in its signed manifest. Leave {to.manifest} out"
        )
    xml, side_file, side_filename = read_documents(location)
    believed = verify_manifest(xml, side_file, Trust(certificate, side_key))
    own_part_filenames(location, (part.filename for part in believed.manifest.parts))
    target = Location(to.folder, location.manifest)
    _check_free(target, xml)
    with progress_bar("copying", believed.manifest.bundled_size) as bar:
        sent = _copy_parts(believed, location.folder, to.folder, bar.update)
    if side_file is not None and side_filename is not None:
        to.folder.write(side_filename, side_file)
    to.folder.write(location.manifest, xml)
    emit(output, _document(location, target, believed, sent), _text(target, believed, sent))


def _check_free(target: Location[WritableFolder], xml: bytes) -> None:
    try:
        there = target.folder.read(target.manifest, len(xml))
    except FileMissingError:
        return
    if there != xml:
        raise BundleExists(f"{target} is another bundle: remove it (thrave delete) or choose another folder")


def _copy_parts(
    believed: VerifiedManifest, source: Folder, target: WritableFolder, reporter: Callable[[int], None]
) -> int:
    """Copy the parts that are not there, and give how many those were."""
    from thrave.bundle.errors import ManifestError
    from thrave.pipeline import Pipeline

    manifest = believed.manifest
    ahead = parts_ahead(source, manifest) or parts_ahead(target, manifest) or _DISK_AHEAD
    done = sent = 0
    with Pipeline(ahead) as crew:
        for size, was_sent in crew.map(partial(_copied, believed, source, target), manifest.parts, ahead):
            done += size
            sent += was_sent
            reporter(done)
    if done != manifest.bundled_size:
        raise ManifestError(f"the parts have {done} bytes together, not {manifest.bundled_size}")
    return sent


def _copied(believed: VerifiedManifest, source: Folder, target: WritableFolder, part: ManifestPart) -> tuple[int, bool]:
    """Copy a part unless it is there; give its size, and whether it was sent."""
    from thrave.bundle.errors import BundleError

    if target.size(part.filename) is not None:
        with suppress(BundleError):  # what is there is no good: it is sent again
            return len(_verified(target, part, believed)), False
    data = _verified(source, part, believed)
    target.write(part.filename, data)
    return len(data), True


def _verified(folder: Folder, part: ManifestPart, believed: VerifiedManifest) -> bytes:
    from thrave.bundle.verifier import check_part

    data = FolderParts(folder).read(part.filename)
    check_part(part, data, believed.side)
    return data


def _document(
    source: Location[Folder], target: Location[WritableFolder], believed: VerifiedManifest, sent: int
) -> dict[str, object]:
    from thrave.cli.bundle_words import verified_document

    where = {"source": source, "manifest": target, "partsSent": sent}
    return {**where, **verified_document(_report(believed))}


def _text(target: Location[WritableFolder], believed: VerifiedManifest, sent: int) -> str:
    from thrave.cli.bundle_words import verified_text

    size, there = words(believed.manifest.bundled_size), len(believed.manifest.parts) - sent
    return f"{verified_text(_report(believed))}\n\n{target}: {size}; parts sent: {sent}, there already: {there}"


def _report(believed: VerifiedManifest) -> VerifyResult:
    """What a copy has checked: all that can be without a private key."""
    from thrave.bundle.verifier import CheckResult, CheckSubject, VerifyResult

    digests = CheckResult(
        CheckSubject.PART_DIGESTS, checked=True, detail="of each part, on its way or where it was already"
    )
    return VerifyResult(believed.manifest, (*believed.checks, digests))
