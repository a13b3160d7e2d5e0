"""`thrave migrate`: a bundle made out to another service, its parts untouched.

Only the two documents are written anew. The side file is out of the way while the manifest is replaced, so that the
bundle can be opened at every moment, by the old readers or by the new ones.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from thrave.cli.bundle_folder import BundleExists
from thrave.cli.folders import WritableFolder
from thrave.cli.locations import LOCATION, OWN_FOLDER, Location, read_documents
from thrave.cli.output import emit, output_option
from thrave.cli.pem import CERTIFICATE, ED25519_PRIVATE_KEY, PRIVATE_KEY
from thrave.cli.signals import cleans_up_on_signals

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate

    from thrave.bundle.migrate import Migrated
    from thrave.cli.folders import Folder

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
    emit(output, {"manifest": target, "sideFile": side_file}, f"{target}{without}")


def _writable(folder: Folder) -> WritableFolder:
    if not isinstance(folder, WritableFolder):
        raise click.UsageError("nothing can be written to a web server: say with --to where the documents go")
    return folder


def _new(folder: WritableFolder, manifest: str) -> Location[WritableFolder]:
    target = Location(folder, manifest)
    if folder.size(manifest) is not None:
        raise BundleExists(f"{target} exists; give another folder, or leave --to out to have it replaced")
    return target


def _replace_bound(target: Location[WritableFolder], migrated: Migrated, old: str | None) -> str | None:
    """Replace the documents of a bundle whose side file belongs to its manifest alone; return the new one's name."""
    new = target.bound_side_file(migrated.manifest)
    if new is not None and migrated.side_file is not None:
        target.folder.write(new, migrated.side_file)
    target.folder.write(target.manifest, migrated.manifest)
    if old is not None:
        target.folder.remove([old])
    return new


def _replace(target: Location[WritableFolder], migrated: Migrated, old_side_file: bytes | None) -> None:
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
