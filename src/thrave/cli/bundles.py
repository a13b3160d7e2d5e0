"""`thrave bundle`: a disk image sealed into files in a folder, without any server.

A bundle is `PREFIX.part.N`, `PREFIX.manifest.json` and, written last, `PREFIX.manifest.xml`. Nothing is ever
overwritten.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.cli.bundle_options import ExistingPath
from thrave.cli.output import emit, output_option
from thrave.cli.pem import CERTIFICATE, ED25519_PRIVATE_KEY, PRIVATE_KEY
from thrave.cli.progress import progress_bar
from thrave.cli.signals import cleans_up_on_signals

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate

    from thrave.bundle.gzip_stream import Compression

_IMAGE = ExistingPath(path_type=Path)
_SECRET_FILE = ExistingPath(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.argument("image", type=_IMAGE)
@click.option("--prefix", required=True, help="Name of the image and stem of all file names.")
@click.option("--any-name", is_flag=True, help="Accept a prefix that not every old tool can open.")
@click.option(
    "--to", "folder", type=_FOLDER, required=True, metavar="DIR", help="Folder for the bundle; made if needed."
)
@click.option("--account", required=True, metavar="ID", help="Account id, 12 digits.")
@click.option("--user-certificate", type=CERTIFICATE, required=True, help="Whose key can open it: the account's (PEM).")
@click.option("--service-certificate", type=CERTIFICATE, required=True, help="… and the service's, EC2's own (PEM).")
@click.option("--signing-key", type=PRIVATE_KEY, required=True, help="RSA private key (PEM) that signs the manifest.")
@click.option(
    "--side-key", type=ED25519_PRIVATE_KEY, help="Ed25519 private key (PEM) for the side file, else a new one."
)
@click.option("--architecture", default="x86_64", show_default=True, help="Of the machine that the image boots on.")
@click.option("--format", "image_format", default="raw", show_default=True, help="Of the image: raw, qcow2, vmdk, …")
@click.option(
    "--secret-file", type=_SECRET_FILE, metavar="FILE", help="Holds the passphrase of an encrypted image: qcow2, luks."
)
@click.option(
    "--compression",
    type=click.Choice(["fast", "small"]),
    default="fast",
    show_default=True,
    help="fast: at the speed of the disk. small: a few percent smaller, at a quarter of that speed.",
)
@click.option(
    "--skip-unused",
    is_flag=True,
    help="Leave out what NTFS does not use: free clusters, page and hibernation files.",
)
@click.option(
    "--image-dir",
    "directories",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    metavar="DIR",
    help="Where files may lie that the image refers to, besides its own folder.",
)
@output_option
@cleans_up_on_signals
def bundle(
    *,
    image: Path,
    prefix: str,
    any_name: bool,
    folder: Path,
    account: str,
    user_certificate: Certificate,
    service_certificate: Certificate,
    signing_key: RSAPrivateKey,
    side_key: Ed25519PrivateKey | None,
    architecture: str,
    image_format: str,
    secret_file: Path | None,
    compression: Compression,
    skip_unused: bool,
    directories: tuple[Path, ...],
    output: str,
) -> None:
    """Seal the disk image IMAGE into a bundle, without any server.

    Nobody may write to the image meanwhile: one that a guest of QEMU's runs on is refused, and QEMU starts none on it.
    Its holes stay holes. The manifest is written last: where it is, the bundle is complete. If anything fails, or the
    image was changed meanwhile, what was written is removed. An image that is not a whole disk by its own words is
    refused, and so is one that refers to a file outside its own folder and every --image-dir. With --skip-unused,
    a disk of which it is not certain what its NTFS uses is refused: Windows must have been shut down fully.

    The prefix consists of letters, digits, dots, dashes and underscores, as for BundleInstance, because old tools hand
    it to a shell. With --any-name other characters are accepted.

    \b
    Example:
      thrave bundle disk.raw --prefix winami --to bundles --account 123456789012
          --user-certificate cert.pem --service-certificate ec2.pem --signing-key pk.pem

    Exit codes: 0 done, 1 the image or the folder failed, 2 wrong command line, 3 a file does not exist, 4 the
    bundle exists already, 12 a package that this needs is not installed.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from thrave.bundle.manifest import write_manifest
    from thrave.bundle.model import validate_account_id, validate_architecture, validate_prefix
    from thrave.bundle.sealer import Sealer
    from thrave.bundle.side_file import write_side_file
    from thrave.cli.bundle_folder import new_bundle
    from thrave.cli.bundle_words import sealed_document, sealed_text
    from thrave.volumes.formats import open_volume

    validate_account_id(account)
    validate_architecture(architecture)
    validate_prefix(prefix)
    if not any_name:
        _check_portable(prefix)
    _warn_of_stranger(signing_key, user_certificate, service_certificate)
    warnings: list[str] = []
    with ExitStack() as reading:
        volume = reading.enter_context(
            open_volume(
                image,
                image_format,
                skip_unused=skip_unused,
                secret_file=secret_file,
                directories=directories,
                warn=lambda warned: warnings.append(warned.text),
            )
        )
        for warning in warnings:
            click.echo(f"Warning: {warning}.", err=True)
        with new_bundle(folder, prefix) as files:
            sealing = Sealer(volume, prefix, compression=compression)
            with progress_bar("sealing", sealing.data_size) as bar, bar.following(lambda: sealing.progress):
                files.write_parts(sealing)
            reading.close()  # fails if the image was changed: before there is a manifest
            manifest = write_manifest(
                sealing.sealed,
                account_id=account,
                architecture=architecture,
                user_certificate=user_certificate,
                service_certificate=service_certificate,
                signing_key=signing_key,
            )
            side_key = side_key or Ed25519PrivateKey.generate()
            side_file = write_side_file(sealing.sealed, manifest, side_key=side_key, signing_key=signing_key)
            files.write(files.side_file, side_file)
            files.write(files.manifest, manifest)
    emit(output, sealed_document(files, sealing.sealed, warnings), sealed_text(files, sealing.sealed))


def _check_portable(prefix: str) -> None:
    """Refuse a prefix that BundleInstance refuses."""
    from thrave.buckets.base import split_prefix
    from thrave.buckets.errors import InvalidArgument
    from thrave.bundle.errors import NamingError

    try:
        split_prefix(prefix)
    except InvalidArgument as error:
        raise NamingError(f"{prefix!r}: {error.message}. --any-name accepts it; old tools may not open it") from None


def _warn_of_stranger(
    signing_key: RSAPrivateKey, user_certificate: Certificate, service_certificate: Certificate
) -> None:
    """Warn if neither certificate can verify the signature."""
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    own = signing_key.public_key().public_numbers()
    keys = (certificate.public_key() for certificate in (user_certificate, service_certificate))
    if all(not isinstance(key, RSAPublicKey) or key.public_numbers() != own for key in keys):
        click.echo(
            "Warning: the signing key belongs to neither certificate. Who opens the bundle needs its own certificate.",
            err=True,
        )
