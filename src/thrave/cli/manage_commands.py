"""Which files are a bundle's: those that may be copied or removed in its name, and no other.

A manifest may be hostile. Every known bundler calls parts `PREFIX.part.N`. A manifest that names anything else is
refused before a file is touched.

`thrave copy`: a bundle from one folder, bucket or web server to another, as it is.

Nothing is decrypted and no private key is wanted. Each part is verified on its way, so what arrives is what the
manifest describes; the manifest goes last. A part that is there already is read there and not sent again.

`thrave delete`: removes exactly one bundle.

The manifest goes first, since its presence means that the bundle is complete; the side file last, since its list says
what is left of a removal that was cut off. Nothing is removed that those two do not name as the bundle's own.

`thrave migrate`: a bundle made out to another service, its parts untouched.

Only the two documents are written anew. The side file is out of the way while the manifest is replaced, so that the
bundle can be opened at every moment, by the old readers or by the new ones.
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
from thrave.cli.folders import FileMissingError, FolderParts, WritableFolder, parts_ahead
from thrave.cli.interrupts import cleans_up_on_signals
from thrave.cli.locations import (
    LOCATION,
    OWN_FOLDER,
    OWN_LOCATION,
    Address,
    Location,
    read_documents,
    read_manifest_file,
    read_side_file_at,
    writable_folder,
)
from thrave.cli.options import CERTIFICATE, ED25519_PRIVATE_KEY, PRIVATE_KEY, certificate_option, side_key_option
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
    """The file names of a bundle's parts, if they are the parts of the bundle at that location.

    Raises:
        click.UsageError: The manifest's own file name does not say which bundle it is.
        ManifestError: It names another file.
    """
    if location.prefix is None:
        raise click.UsageError(f"{location} is not called PREFIX.manifest.xml, so nobody knows which files are its own")
    own = part_pattern(location.prefix)
    names = tuple(filenames)
    for name in names:
        if not own.fullmatch(name):
            raise ManifestError(f"{name!r} is no part of the bundle {location.prefix!r}: nothing was touched")
    return names


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
    # EMPTY

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
    print_result(output, _document(location, target, believed, sent), _text(target, believed, sent))


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
    with Pipeline(ahead) as pipeline:
        for size, was_sent in pipeline.map(partial(_copied, believed, source, target), manifest.parts, ahead):
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
    from thrave.cli.output import verified_document

    where = {"source": source, "manifest": target, "partsSent": sent}
    return {**where, **verified_document(_report(believed))}


def _text(target: Location[WritableFolder], believed: VerifiedManifest, sent: int) -> str:
    from thrave.cli.output import verified_text

    size, there = format_size(believed.manifest.bundled_size), len(believed.manifest.parts) - sent
    return f"{verified_text(_report(believed))}\n\n{target}: {size}; parts sent: {sent}, there already: {there}"


def _report(believed: VerifiedManifest) -> VerifyResult:
    """What a copy has checked: all that can be without a private key."""
    from thrave.bundle.verifier import CheckResult, CheckSubject, VerifyResult

    digests = CheckResult(
        CheckSubject.PART_DIGESTS, checked=True, detail="of each part, on its way or where it was already"
    )
    return VerifyResult(believed.manifest, (*believed.checks, digests))


_AT_ONCE = 1000  # files; S3's limit for one request


@click.command()
@click.argument("location", type=OWN_LOCATION)
@certificate_option
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@output_option
@cleans_up_on_signals
def delete(*, location: Location[WritableFolder], certificate: Certificate | None, dry_run: bool, output: str) -> None:
    """Remove the bundle at LOCATION: its manifest, the parts that it names, its side file. Nothing else.

    LOCATION is a manifest on the disk or in a bucket (s3://BUCKET/PREFIX.manifest.xml). With --certificate it is
    removed only if that signer made it. A manifest that names anything but its own PREFIX.part.N is refused. If the
    removal of a bundle with a side file is cut off, the same command goes on with it.

    \b
    Example:
      thrave delete s3://my-bucket/winami.manifest.xml --dry-run

    Exit codes: 0 removed, 1 it cannot be reached or removed, 2 wrong command line, 3 it is not there, 4 not allowed, 10
    no manifest, a forged one, or one that names other files.
    """
    xml, parts = _manifest_and_parts(location, certificate)
    bound = None if xml is None else location.bound_side_file(xml)
    side_file = None if bound is None else read_side_file_at(location, bound)
    side_files = [location.side_file] if location.side_file else []
    if not dry_run:
        if side_file is not None and bound is not None:  # its name is lost with the manifest
            location.folder.write(side_files[0], side_file)
            location.folder.remove([bound])
        _remove(location.folder, [[location.manifest], *_batches(parts), side_files])
    filenames = [location.manifest, *parts, *([bound] if side_file is not None and bound is not None else side_files)]
    where = [location.folder.where(filename) for filename in filenames]
    said = "\n".join(["would be removed:", *where]) if dry_run else f"removed: {location} and {len(parts)} parts"
    print_result(output, {"removed": not dry_run, "files": where}, said)


def _manifest_and_parts(
    location: Location[WritableFolder], certificate: Certificate | None
) -> tuple[bytes | None, Sequence[str]]:
    """The manifest, and the parts that it names; where it is gone already, those that the side file does."""
    from thrave.bundle.verifier import Trust, verify_manifest

    try:
        xml = read_manifest_file(location)
    except FileMissingError:
        return None, own_part_filenames(location, _left_over(location, certificate))
    parts = verify_manifest(xml, None, Trust(certificate)).manifest.parts
    return xml, own_part_filenames(location, (part.filename for part in parts))


def _left_over(location: Location[WritableFolder], certificate: Certificate | None) -> Iterable[str]:
    from thrave.bundle.errors import SideFileError
    from thrave.bundle.manifest_xml import rsa_key
    from thrave.bundle.side_file import read_side_file

    data = read_side_file_at(location, location.side_file)
    if data is None:
        raise FileMissingError(f"{location} is not there, nor a side file that names its parts")
    side = read_side_file(data)
    if certificate is not None and not side.is_certified_by(rsa_key(certificate)):
        raise SideFileError("the certificate's owner does not vouch for the side file, and the manifest is gone")
    return side.parts


def _batches(filenames: Sequence[str]) -> Iterable[Sequence[str]]:
    return [filenames[start : start + _AT_ONCE] for start in range(0, len(filenames), _AT_ONCE)]


def _remove(folder: WritableFolder, batches: Sequence[Sequence[str]]) -> None:
    done = 0
    with progress_bar("removing", sum(map(len, batches))) as bar:
        for batch in batches:
            folder.remove(batch)
            done += len(batch)
            bar.update(done)


_INSTEAD = """Open it and bundle it again under another name:
  thrave open {} --key KEY --certificate SIGNER -o IMAGE
  thrave bundle IMAGE --prefix NAME --to FOLDER --account ID --user-certificate CERTIFICATE
      --service-certificate CERTIFICATE --signing-key KEY"""


@click.command()
@click.argument("location", type=LOCATION)
@click.option("--key", type=PRIVATE_KEY, required=True, help="Private key (PEM, RSA) that opens the bundle now.")
@click.option(
    "--certificate", type=CERTIFICATE, required=True, metavar="SIGNER", help="Certificate (PEM) of who signed it."
)
@click.option("--service-certificate", type=CERTIFICATE, required=True, help="The new service's (PEM).")
@click.option("--signing-key", type=PRIVATE_KEY, required=True, help="RSA private key (PEM) that signs it now.")
@click.option("--user-certificate", type=CERTIFICATE, help="The account's (PEM), if another than now is to open it.")
@click.option("--account", metavar="ID", help="Account id, 12 digits, if the bundle is to be another's.")
@click.option("--kernel-id", metavar="ID", help="The new service's name of the kernel; an empty one takes it out.")
@click.option("--ramdisk-id", metavar="ID", help="… and of the RAM disk.")
@click.option(
    "--side-key", type=ED25519_PRIVATE_KEY, help="Ed25519 private key (PEM) for the side file, else a new one."
)
@click.option(
    "--to", "folder", type=OWN_FOLDER, metavar="FOLDER", help="Write manifest and side file there, and replace nothing."
)
@output_option
@cleans_up_on_signals
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
    """Make the bundle at LOCATION out to another service, without touching its parts.

    The key and IV are encrypted to the new service's certificate, manifest and side file are signed again and replaced.
    Signature and side file must hold before. Without --user-certificate the user's slot stays as it is. Whoever could
    open the bundle before and has kept the old manifest still can: the parts are the same.

    \b
    Example:
      thrave migrate s3://my-bucket/winami.manifest.xml --key pk.pem --certificate cert.pem
          --service-certificate new-service.pem --signing-key pk.pem

    Exit codes: 0 done, 1 it cannot be reached or written, 2 wrong command line, 3 it is not there, 4 not allowed, 10
    damaged or forged, 11 wrong key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from thrave.bundle import migrate as migrating
    from thrave.bundle.errors import UnwritableValueError

    name = location.manifest
    target = Location(_writable(location.folder), name) if folder is None else _new(folder, name)
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
        raise click.ClickException(f"{error}. {_INSTEAD.format(shlex.quote(str(location)))}") from None
    side_filename = target.side_file
    if folder is None and old_side_filename not in {None, target.side_file}:
        side_filename = _replace_bound(target, migrated, old_side_filename)
    else:
        _replace(target, migrated, old_side_file if folder is None else None)
    side_file = None if migrated.side_file is None else target.folder.where(side_filename or "")
    without = "" if side_file else "\nThe bundle has no side file: for one, its parts would have to be read."
    print_result(output, {"manifest": target, "sideFile": side_file}, f"{target}{without}")


def _writable(folder: Folder) -> WritableFolder:
    if not isinstance(folder, WritableFolder):
        raise click.UsageError("nothing can be written to a web server: say with --to where the documents go")
    return folder


def _new(folder: WritableFolder, manifest: str) -> Location[WritableFolder]:
    target = Location(folder, manifest)
    if folder.size(manifest) is not None:
        raise BundleExists(f"{target} exists; give another folder, or leave --to out to have it replaced")
    return target


def _replace_bound(target: Location[WritableFolder], migrated: MigratedBundle, old: str | None) -> str | None:
    """Replace the documents of a bundle whose side file belongs to its manifest alone; return the new one's name."""
    new = target.bound_side_file(migrated.manifest)
    if new is not None and migrated.side_file is not None:
        target.folder.write(new, migrated.side_file)
    target.folder.write(target.manifest, migrated.manifest)
    if old is not None:
        target.folder.remove([old])
    return new


def _replace(target: Location[WritableFolder], migrated: MigratedBundle, old_side_file: bytes | None) -> None:
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
