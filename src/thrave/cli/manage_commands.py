"""`thrave copy`, `delete` and `migrate`: work on one bundle without decrypting its parts.

A manifest may be hostile: one that names files other than its own `PREFIX.part.N` is refused before any change. copy
verifies each part and writes the manifest last. delete removes the manifest first, because its presence means that the
bundle is complete, and the side file last, because it lists the parts that an interrupted removal must still delete.
migrate replaces only manifest and side file; either the old or the new recipients can open the bundle at every moment.
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import click

from thrave.bundle.errors import ManifestError
from thrave.bundle.model import MANIFEST_SUFFIX, part_pattern
from thrave.cli.bundle_command import BundleExists
from thrave.cli.folders import FileMissingError, FolderParts, WritableFolder, read_ahead
from thrave.cli.interrupts import clean_up_on_signals
from thrave.cli.locations import (
    LOCATION,
    WRITABLE_FOLDER,
    WRITABLE_LOCATION,
    Address,
    Location,
    read_documents,
    read_manifest_file,
    read_side_file_at,
    writable_folder,
)
from thrave.cli.options import (
    CERTIFICATE,
    ED25519_PRIVATE_KEY,
    PRIVATE_KEY,
    certificate_option,
    confirm_deletion,
    side_key_option,
    yes_option,
)
from thrave.cli.output import format_size, output_option, print_result
from thrave.cli.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate

    from thrave.bundle.manifest import ManifestPart
    from thrave.bundle.migrate import MigratedBundle
    from thrave.bundle.verifier import VerifiedManifest, VerifyResult
    from thrave.cli.folders import Folder


def own_part_filenames(location: Location[Folder], filenames: Iterable[str]) -> tuple[str, ...]:
    """Return the file names of the parts, if all of them belong to the bundle at this location.

    Raises:
        click.UsageError: The manifest is not called PREFIX.manifest.xml, so its prefix is unknown.
        ManifestError: The manifest names another file.
    """
    if location.prefix is None:
        raise click.UsageError(f"{location} is not called PREFIX.manifest.xml, so its part names are unknown")
    own = part_pattern(location.prefix)
    names = tuple(filenames)
    for name in names:
        if not own.fullmatch(name):
            raise ManifestError(f"{name!r} is not a part of the bundle {location.prefix!r}. Nothing was changed.")
    return names


_DISK_READ_AHEAD = 2  # parts that are copied at once between folders on disks


@dataclass(frozen=True)
class Destination:
    """The target of a copy: a folder, and the manifest's file name if the address contains one."""

    folder: WritableFolder
    manifest: str | None


def parse_destination(address: str) -> Destination:
    """Return the destination with this address.

    Raises:
        ValueError: The address is not that of a writable folder.
    """
    folder, _, manifest = address.rpartition("/")
    if manifest.endswith(MANIFEST_SUFFIX):
        return Destination(writable_folder(folder or "."), manifest)
    return Destination(writable_folder(address), None)


@click.command(short_help="Copy a bundle to another folder or bucket.")
@click.argument("location", type=LOCATION, metavar="LOCATION")
@click.argument("to", type=Address(parse_destination), metavar="FOLDER")
@certificate_option
@side_key_option
@output_option
@clean_up_on_signals
def copy(
    *,
    location: Location[Folder],
    to: Destination,
    certificate: Certificate | None,
    side_key: Ed25519PublicKey | None,
    output: str,
) -> None:
    """Copy the bundle at LOCATION to FOLDER, on the disk or in a bucket (s3://BUCKET/FOLDER).

    LOCATION is as for `thrave open`. Signature, names and the digest of each part are verified. Nothing is decrypted,
    so you need no private key. The manifest is written last: if it exists, the bundle is complete. If the copy is
    interrupted, run the same command again to resume it.

    The file names do not change. The signed manifest contains them, so a bundle can be copied to another folder but not
    renamed.

    \b
    Example:
      thrave copy bundles/winami.manifest.xml s3://my-bucket/2026 --certificate signer.pem

    Exit codes: 0 done, 1 a folder cannot be reached or written, 2 wrong command line, 3 a file or bucket is missing, 4
    access denied or another bundle of this name exists, 10 damaged or forged.
    """
    from thrave.bundle.verifier import Trust, verify_manifest

    if to.manifest not in {None, location.manifest}:
        raise click.UsageError(
            f"a bundle cannot be renamed, because its signed manifest contains the file names. Omit {to.manifest}."
        )
    xml, side_file, side_filename = read_documents(location)
    verified = verify_manifest(xml, side_file, Trust(certificate, side_key))
    own_part_filenames(location, (part.filename for part in verified.manifest.parts))
    target = Location(to.folder, location.manifest)
    _check_free(target, xml)
    # Otherwise `thrave prune` could finish an interrupted removal of the same parts. Without a record nothing is
    # removed: a key that may only read and write is enough to copy.
    if target.removal_record and to.folder.size(target.removal_record) is not None:
        to.folder.remove([target.removal_record])
    with progress_bar("copying", verified.manifest.bundled_size) as bar:
        sent = _copy_parts(verified, location.folder, to.folder, bar.update)
    if side_file is not None and side_filename is not None:
        to.folder.write(side_filename, side_file)
    to.folder.write(location.manifest, xml)
    print_result(output, _copy_document(location, target, verified, sent), _copy_text(target, verified, sent))


def _check_free(target: Location[WritableFolder], xml: bytes) -> None:
    try:
        existing = target.folder.read(target.manifest, len(xml))
    except FileMissingError:
        return
    if existing != xml:
        raise BundleExists(f"{target} is another bundle. Remove it (thrave delete), or choose another folder.")


def _copy_parts(
    verified: VerifiedManifest, source: Folder, target: WritableFolder, reporter: Callable[[int], None]
) -> int:
    """Copy the missing parts; return their number."""
    from thrave.bundle.errors import ManifestError
    from thrave.pipeline import Pipeline

    manifest = verified.manifest
    ahead = read_ahead(source, manifest) or read_ahead(target, manifest) or _DISK_READ_AHEAD
    done = sent = 0
    with Pipeline(ahead) as pipeline:
        for size, was_sent in pipeline.map(partial(_copy_part, verified, source, target), manifest.parts, ahead):
            done += size
            sent += was_sent
            reporter(done)
    if done != manifest.bundled_size:
        raise ManifestError(f"the parts have {done} bytes in total, not {manifest.bundled_size}")
    return sent


def _copy_part(
    verified: VerifiedManifest, source: Folder, target: WritableFolder, part: ManifestPart
) -> tuple[int, bool]:
    """Copy a part unless the target has it; return its size, and whether it was sent."""
    from thrave.bundle.errors import BundleError

    if target.size(part.filename) is not None:
        with suppress(BundleError):  # the part in the target is damaged: send it again
            return len(_read_verified(target, part, verified)), False
    data = _read_verified(source, part, verified)
    target.write(part.filename, data)
    return len(data), True


def _read_verified(folder: Folder, part: ManifestPart, verified: VerifiedManifest) -> bytes:
    from thrave.bundle.verifier import check_part

    data = FolderParts(folder).read(part.filename)
    check_part(part, data, verified.side)
    return data


def _copy_document(
    source: Location[Folder], target: Location[WritableFolder], verified: VerifiedManifest, sent: int
) -> dict[str, object]:
    from thrave.cli.output import verified_document

    where = {"source": source, "manifest": target, "partsSent": sent}
    return {**where, **verified_document(_copy_report(verified))}


def _copy_text(target: Location[WritableFolder], verified: VerifiedManifest, sent: int) -> str:
    from thrave.cli.output import verified_text

    size, existing = format_size(verified.manifest.bundled_size), len(verified.manifest.parts) - sent
    return f"{verified_text(_copy_report(verified))}\n\n{target}: {size}; parts sent: {sent}, already there: {existing}"


def _copy_report(verified: VerifiedManifest) -> VerifyResult:
    """The checks of a copy: all that need no private key."""
    from thrave.bundle.verifier import CheckResult, CheckSubject, VerifyResult

    digests = CheckResult(
        CheckSubject.PART_DIGESTS, checked=True, detail="of each part, copied or already in the target"
    )
    return VerifyResult(verified.manifest, (*verified.checks, digests))


_BATCH_SIZE = 1000  # files; S3's limit for one request


@click.command(short_help="Remove a bundle: its manifest, parts and side file.")
@click.argument("location", type=WRITABLE_LOCATION)
@certificate_option
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@yes_option
@output_option
@clean_up_on_signals
def delete(
    *, location: Location[WritableFolder], certificate: Certificate | None, dry_run: bool, yes: bool, output: str
) -> None:
    """Remove the bundle at LOCATION: its manifest, the parts that it names, and its side file.

    LOCATION is a manifest on the disk or in a bucket (s3://BUCKET/PREFIX.manifest.xml). With --certificate the bundle
    is removed only if this signer has signed it. A manifest that names files other than its own PREFIX.part.N is
    refused. If the removal of a bundle with a side file is interrupted, run the same command again to finish it.

    \b
    Example:
      thrave delete s3://my-bucket/winami.manifest.xml --dry-run

    Exit codes: 0 removed, 1 the bundle cannot be reached or removed, 2 wrong command line, 3 no such bundle, 4 access
    denied, 10 not a manifest, a forged one, or one that names other files.
    """
    xml, parts = _manifest_and_parts(location, certificate)
    bound = None if xml is None else location.bound_side_file(xml)
    side_file = None if bound is None else read_side_file_at(location, bound)
    side_files = [location.side_file] if location.side_file else []
    if not dry_run:
        confirm_deletion(f"the bundle {location} with {len(parts)} parts", yes=yes)
        if side_file is not None and bound is not None:  # its name is derived from the manifest, which is removed first
            location.folder.write(side_files[0], side_file)
            location.folder.remove([bound])
        batches = [parts[start : start + _BATCH_SIZE] for start in range(0, len(parts), _BATCH_SIZE)]
        _remove_files(location.folder, [[location.manifest], *batches, side_files])
    filenames = [location.manifest, *parts, *([bound] if side_file is not None and bound is not None else side_files)]
    paths = [location.folder.display_name(filename) for filename in filenames]
    text = "\n".join(["would be removed:", *paths]) if dry_run else f"removed: {location} and {len(parts)} parts"
    print_result(output, {"removed": not dry_run, "files": paths}, text)


def _manifest_and_parts(
    location: Location[WritableFolder], certificate: Certificate | None
) -> tuple[bytes | None, Sequence[str]]:
    """The manifest and the parts that it names; without a manifest, the parts that the side file names."""
    from thrave.bundle.verifier import Trust, verify_manifest

    try:
        xml = read_manifest_file(location)
    except FileMissingError:
        return None, own_part_filenames(location, _parts_of_side_file(location, certificate))
    parts = verify_manifest(xml, None, Trust(certificate)).manifest.parts
    return xml, own_part_filenames(location, (part.filename for part in parts))


def _parts_of_side_file(location: Location[WritableFolder], certificate: Certificate | None) -> Iterable[str]:
    from thrave.bundle.errors import SideFileError
    from thrave.bundle.manifest_xml import rsa_key
    from thrave.bundle.side_file import read_side_file

    data = read_side_file_at(location, location.side_file)
    if data is None:
        raise FileMissingError(f"{location} does not exist, and there is no side file that names its parts")
    side = read_side_file(data)
    if certificate is not None and not side.is_certified_by(rsa_key(certificate)):
        raise SideFileError("the side file is not signed by the owner of the certificate, and the manifest is missing")
    return side.parts


def _remove_files(folder: WritableFolder, batches: Sequence[Sequence[str]]) -> None:
    done = 0
    with progress_bar("removing", sum(map(len, batches))) as bar:
        for batch in batches:
            folder.remove(batch)
            done += len(batch)
            bar.update(done)


_REBUNDLE_HINT = """Open the bundle and bundle the image again under another name:
  thrave open {} --key KEY --certificate SIGNER -o IMAGE
  thrave bundle IMAGE --prefix NAME --to FOLDER --account ID --user-certificate CERTIFICATE
      --service-certificate CERTIFICATE --signing-key KEY"""


@click.command()
@click.argument("location", type=LOCATION)
@click.option("--key", type=PRIVATE_KEY, required=True, help="Private key (PEM, RSA) that opens the bundle at present.")
@click.option(
    "--certificate", type=CERTIFICATE, required=True, metavar="SIGNER", help="Certificate (PEM) of the present signer."
)
@click.option("--service-certificate", type=CERTIFICATE, required=True, help="Certificate of the new service (PEM).")
@click.option(
    "--signing-key", type=PRIVATE_KEY, required=True, help="RSA private key (PEM) that signs the new manifest."
)
@click.option(
    "--user-certificate", type=CERTIFICATE, help="New certificate of the account (PEM).  [default: the present one]"
)
@click.option("--account", metavar="ID", help="New account id, 12 digits.  [default: the present one]")
@click.option("--kernel-id", metavar="ID", help="Kernel id at the new service; an empty one removes it.")
@click.option("--ramdisk-id", metavar="ID", help="RAM disk id at the new service; an empty one removes it.")
@click.option(
    "--side-key", type=ED25519_PRIVATE_KEY, help="Ed25519 private key (PEM) for the side file.  [default: a new one]"
)
@click.option(
    "--to",
    "folder",
    type=WRITABLE_FOLDER,
    metavar="FOLDER",
    help="Write manifest and side file to this folder and replace nothing.",
)
@output_option
@clean_up_on_signals
def migrate(
    *,
    location: Location[Folder],
    key: RSAPrivateKey,
    certificate: Certificate,
    service_certificate: Certificate,
    signing_key: RSAPrivateKey,
    user_certificate: Certificate | None,
    account: str | None,
    kernel_id: str | None,
    ramdisk_id: str | None,
    side_key: Ed25519PrivateKey | None,
    folder: WritableFolder | None,
    output: str,
) -> None:
    """Encrypt the key of the bundle at LOCATION for another service. The parts do not change.

    The key and IV are encrypted for the new service's certificate. Manifest and side file are signed again and
    replaced. The present signature and side file must be valid. Without --user-certificate the account's certificate
    does not change. Anyone who could open the bundle before and has a copy of the old manifest still can, because the
    parts are the same.

    \b
    Example:
      thrave migrate s3://my-bucket/winami.manifest.xml --key pk.pem --certificate cert.pem
          --service-certificate new-service.pem --signing-key pk.pem

    Exit codes: 0 done, 1 the bundle cannot be reached or written, 2 wrong command line, 3 no such bundle, 4 access
    denied, 10 damaged or forged, 11 wrong key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from thrave.bundle import migrate as migrating
    from thrave.bundle.errors import UnwritableValueError

    name = location.manifest
    target = Location(_require_writable(location.folder), name) if folder is None else _new_location(folder, name)
    xml, old_side_file, old_side_filename = read_documents(location)
    try:
        migrated = migrating.migrate(
            xml,
            old_side_file,
            key,
            certificate=certificate,
            readers=migrating.NewReaders(service_certificate, user_certificate, account, kernel_id, ramdisk_id),
            signers=migrating.Signers(signing_key, side_key or Ed25519PrivateKey.generate()),
        )
    except UnwritableValueError as error:
        raise click.ClickException(f"{error}. {_REBUNDLE_HINT.format(shlex.quote(str(location)))}") from None
    side_filename = target.side_file
    if folder is None and old_side_filename not in {None, target.side_file}:
        side_filename = _replace_bound_documents(target, migrated, old_side_filename)
    else:
        _replace_documents(target, migrated, old_side_file if folder is None else None)
    side_file = None if migrated.side_file is None else target.folder.display_name(side_filename or "")
    without = "" if side_file else "\nThe bundle has no side file. Creating one would require reading the parts."
    print_result(output, {"manifest": target, "sideFile": side_file}, f"{target}{without}")


def _require_writable(folder: Folder) -> WritableFolder:
    if not isinstance(folder, WritableFolder):
        raise click.UsageError("cannot write to a web server. Pass a folder for the new manifest with --to.")
    return folder


def _new_location(folder: WritableFolder, manifest: str) -> Location[WritableFolder]:
    target = Location(folder, manifest)
    if folder.size(manifest) is not None:
        raise BundleExists(f"{target} exists. Pass another folder, or omit --to to replace it.")
    return target


def _replace_bound_documents(target: Location[WritableFolder], migrated: MigratedBundle, old: str | None) -> str | None:
    """Replace manifest and side file if the side file is bound to its manifest; return the new side file's name."""
    new = target.bound_side_file(migrated.manifest)
    if new is not None and migrated.side_file is not None:
        target.folder.write(new, migrated.side_file)
    target.folder.write(target.manifest, migrated.manifest)
    if old is not None:
        target.folder.remove([old])
    return new


def _replace_documents(target: Location[WritableFolder], migrated: MigratedBundle, old_side_file: bytes | None) -> None:
    folder, side_file = target.folder, target.side_file
    if side_file is None:
        folder.write(target.manifest, migrated.manifest)
        return
    folder.remove([side_file])
    try:
        folder.write(target.manifest, migrated.manifest)
    except BaseException:
        if old_side_file is not None:
            folder.write(side_file, old_side_file)
        raise
    if migrated.side_file is not None:
        folder.write(side_file, migrated.side_file)
