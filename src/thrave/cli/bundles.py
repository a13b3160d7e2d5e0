"""`thrave bundle`, `open`, `verify` and `show`: bundles as files in a folder, without any server.

A bundle is `PREFIX.part.N`, `PREFIX.manifest.json` and, written last, `PREFIX.manifest.xml`; the parts are always
looked for beside their manifest. What was checked and what could not be is part of every answer.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.cli.bundle_image import FORMATS, image_maker
from thrave.cli.output import emit, output_option
from thrave.cli.pem import CERTIFICATE, ED25519_PRIVATE_KEY, ED25519_PUBLIC_KEY, PRIVATE_KEY
from thrave.cli.progress import progress_bar
from thrave.cli.sizes import words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate

    from thrave.bundle.zlibs import Level
    from thrave.volumes.opening import Skip

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_IMAGE = click.Path(exists=True, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)

_certificate_option = click.option(
    "--certificate",
    type=CERTIFICATE,
    metavar="SIGNER",
    help="Signer's certificate (PEM); the signature must hold for it.",
)
_side_key_option = click.option(
    "--side-key", type=ED25519_PUBLIC_KEY, help="Ed25519 public key (PEM) that must have signed the side file."
)


@click.command()
@click.argument("image", type=_IMAGE)
@click.option("--prefix", required=True, help="Name of the image and stem of all file names.")
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
    "--level", type=click.Choice(["fast", "small"]), default="fast", show_default=True, help="Of compression."
)
@click.option(
    "--skip",
    type=click.Choice(["nothing", "unused"]),
    default="nothing",
    show_default=True,
    help="Leave out what NTFS does not use: free clusters, page and hibernation files.",
)
@output_option
def bundle(
    *,
    image: Path,
    prefix: str,
    folder: Path,
    account: str,
    user_certificate: Certificate,
    service_certificate: Certificate,
    signing_key: RSAPrivateKey,
    side_key: Ed25519PrivateKey | None,
    architecture: str,
    image_format: str,
    level: Level,
    skip: Skip,
    output: str,
) -> None:
    """Seal the disk image IMAGE into a bundle, without any server.

    Nobody may write to the image meanwhile. Its holes stay holes. The manifest is written last: where it is, the bundle
    is complete. If anything fails, what was written is removed. With --skip unused, a disk of which it is not certain
    what its NTFS uses is refused: Windows must have been shut down fully.

    \b
    Example:
      thrave bundle disk.raw --prefix winami --to bundles --account 123456789012
          --user-certificate cert.pem --service-certificate ec2.pem --signing-key pk.pem

    Exit codes: 0 done, 1 the image or the folder failed, 2 wrong command line, 4 the bundle exists already, 12 a
    package that this needs is not installed.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from thrave.bundle.names import checked_account_id, checked_architecture, checked_prefix
    from thrave.bundle.sealing import Sealing
    from thrave.bundle.sidefile import write_side_file
    from thrave.bundle.writing import write_manifest
    from thrave.cli.bundle_folder import new_bundle
    from thrave.cli.bundle_words import sealed_document, sealed_text
    from thrave.volumes.opening import open_volume

    checked_account_id(account)
    checked_architecture(architecture)
    checked_prefix(prefix)
    with open_volume(image, image_format, skip=skip) as volume, new_bundle(folder, prefix) as files:
        sealing = Sealing(volume, prefix, level=level)
        with progress_bar("sealing", sealing.data_size) as bar, bar.following(lambda: sealing.progress):
            files.write_parts(sealing)
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
    emit(output, sealed_document(files, sealing.sealed), sealed_text(files, sealing.sealed))


@click.command("open")
@click.argument("manifest", type=_FILE)
@click.option("--key", type=PRIVATE_KEY, required=True, help="Private key (PEM, RSA) of the account or the service.")
@_certificate_option
@_side_key_option
@click.option(
    "-o", "image", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path), help="Image to write; - is stdout."
)
@click.option("--stdout", is_flag=True, help="Write the image to stdout, and what was checked to stderr.")
@click.option(
    "--format",
    "image_format",
    type=click.Choice(FORMATS),
    default="raw",
    show_default=True,
    help="Of the image to write.",
)
@output_option
def open_(
    *,
    manifest: Path,
    key: RSAPrivateKey,
    certificate: Certificate | None,
    side_key: Ed25519PublicKey | None,
    image: Path | None,
    stdout: bool,
    image_format: str,
    output: str,
) -> None:
    """Open the bundle of MANIFEST, whoever made it, and write its image.

    The image appears (and replaces what was there) only after the last check; if anything fails nothing is left. It is
    readable by its owner alone. Without --certificate nobody knows who made the bundle, and that is said.

    Nothing can be taken back from a pipe: to stdout each byte goes when its part has been verified, and the last ones
    only after the last check. If that fails, the image ends too early and the exit code says so.

    \b
    Example:
      thrave open bundles/winami.manifest.xml --key pk.pem --certificate signer.pem -o disk.raw
      thrave open bundles/winami.manifest.xml --key pk.pem --format qcow2 -o disk.qcow2

    Exit codes: 0 done, 1 the image cannot be written, 2 wrong command line, 3 a part is missing, 10 damaged or forged,
    11 wrong key, 12 a package for the image's format is not installed.
    """
    from thrave.bundle.opening import open_bundle_into
    from thrave.bundle.partsource import DirectoryParts
    from thrave.bundle.reading import read_manifest
    from thrave.cli.bundle_folder import read_documents
    from thrave.cli.bundle_words import verified_document, verified_text

    target = _target(image, stdout=stdout)
    make_image = image_maker(target, image_format)
    xml, side_file = read_documents(manifest)
    with _warning_of_half_an_image(target), progress_bar("opening", read_manifest(xml).bundled_size) as bar:
        opened = open_bundle_into(
            make_image, xml, DirectoryParts(manifest.parent), key,
            certificate=certificate, side_file=side_file, side_key=side_key, reporter=bar.update,
        )  # fmt: skip
    where = target or "stdout"
    document = {"image": target or "-", "format": image_format, "manifest": manifest, **verified_document(opened)}
    text = f"{verified_text(opened)}\n\n{where}: {words(opened.manifest.size)}"
    emit(output, document, text, err=target is None)


def _target(image: Path | None, *, stdout: bool) -> Path | None:
    """Where the image goes, None for stdout."""
    if (image is None) is not stdout:
        raise click.UsageError("give either -o IMAGE or --stdout")
    return None if image is None or str(image) == "-" else image


@contextmanager
def _warning_of_half_an_image(target: Path | None) -> Iterator[None]:
    try:
        yield
    except Exception:
        if target is None:
            click.echo("thrave: what came out of stdout is not the whole image: do not use it", err=True)
        raise


@click.command()
@click.argument("manifest", type=_FILE)
@click.option("--key", type=PRIVATE_KEY, help="Private key (PEM, RSA); with it the image is checked, too.")
@_certificate_option
@_side_key_option
@output_option
def verify(
    *,
    manifest: Path,
    key: RSAPrivateKey | None,
    certificate: Certificate | None,
    side_key: Ed25519PublicKey | None,
    output: str,
) -> None:
    """Check all of the bundle of MANIFEST that can be checked, and write nothing.

    Without a key: signature, structure and the digests of the parts. With one also that they hold the image that the
    manifest describes. What could not be checked, and why, is listed.

    \b
    Example:
      thrave verify bundles/winami.manifest.xml --certificate signer.pem

    Exit codes: 0 nothing is wrong, 2 wrong command line, 3 a part is missing, 10 damaged or forged, 11 wrong key.
    """
    from thrave.bundle.opening import verify_bundle
    from thrave.bundle.partsource import DirectoryParts
    from thrave.bundle.reading import read_manifest
    from thrave.cli.bundle_folder import read_documents
    from thrave.cli.bundle_words import verified_document, verified_text

    xml, side_file = read_documents(manifest)
    with progress_bar("verifying", read_manifest(xml).bundled_size) as bar:
        verified = verify_bundle(
            xml, DirectoryParts(manifest.parent), key,
            certificate=certificate, side_file=side_file, side_key=side_key, reporter=bar.update,
        )  # fmt: skip
    emit(output, {"manifest": manifest, **verified_document(verified)}, verified_text(verified))


@click.command()
@click.argument("manifest", type=_FILE)
@output_option
def show(manifest: Path, output: str) -> None:
    """Show what MANIFEST says, without believing or checking it.

    \b
    Example:
      thrave show bundles/winami.manifest.xml --output json

    Exit codes: 0 shown, 2 wrong command line, 10 it is no manifest.
    """
    from thrave.bundle.reading import read_manifest
    from thrave.cli.bundle_folder import read_manifest_file
    from thrave.cli.bundle_words import manifest_document, manifest_text

    said = read_manifest(read_manifest_file(manifest))
    emit(output, {"manifest": manifest, **manifest_document(said)}, manifest_text(said))
