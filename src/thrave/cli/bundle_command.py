"""`thrave bundle`: seals a disk image into files in a folder, without a server.

A bundle is `PREFIX.part.N`, `PREFIX.manifest.json` and, written last, `PREFIX.manifest.xml`. An existing bundle is
never overwritten. If the command fails, it removes what it has written.
"""

from __future__ import annotations

from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.bundle.errors import OutputError
from thrave.bundle.image_output import new_file
from thrave.bundle.model import manifest_filename, side_filename
from thrave.cli.error_output import print_warning
from thrave.cli.exit_codes import Exit
from thrave.cli.folders import FolderError
from thrave.cli.interrupts import clean_up_on_signals
from thrave.cli.options import CERTIFICATE, ED25519_PRIVATE_KEY, PRIVATE_KEY, ExistingPath
from thrave.cli.output import format_size, output_option, print_result
from thrave.cli.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate

    from thrave.bundle.gzip_stream import Compression
    from thrave.bundle.model import SealedBundle
    from thrave.bundle.sealer import Sealer


class BundleExists(click.ClickException):
    """The folder contains a bundle of this name."""

    exit_code = Exit.REFUSED


class NewBundle:
    """The files of one bundle that is being written."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.manifest = folder / manifest_filename(prefix)
        self.side_file = folder / side_filename(prefix)
        self._folder = folder
        self._written: list[Path] = []

    def write_parts(self, sealer: Sealer) -> None:
        """Write each part as soon as it is sealed."""
        with closing(sealer.parts()) as parts:
            for part in parts:
                self.write(self._folder / part.filename, part.data)

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """Write one file of the bundle; it is durable on return."""
        self._written.append(path)
        with new_file(path, replace=True) as file:
            file.write(0, memoryview(data))

    def remove(self) -> None:
        """Remove every file that was written."""
        for path in self._written:
            path.unlink(missing_ok=True)


@contextmanager
def new_bundle(folder: Path, prefix: str) -> Iterator[NewBundle]:
    """Yield a new bundle in a folder; its files are removed if the block fails.

    Raises:
        BundleExists: The folder contains a manifest of this name.
        FolderError: The folder cannot be created or written.
    """
    bundle = NewBundle(folder, prefix)
    if bundle.manifest.exists():
        raise BundleExists(f"{bundle.manifest} exists. Remove the bundle, or choose another prefix.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield bundle
    except (OSError, OutputError) as error:
        bundle.remove()
        reason = error.strerror if isinstance(error, OSError) else error
        raise FolderError(f"cannot write to {folder}: {reason}") from error
    except BaseException:
        bundle.remove()
        raise


def sealed_document(bundle: NewBundle, sealed: SealedBundle, warnings: Sequence[str]) -> dict[str, object]:
    """A new bundle as JSON, with warnings about the image."""
    return {
        "manifest": bundle.manifest,
        "sideFile": bundle.side_file,
        "prefix": sealed.prefix,
        "size": sealed.size,
        "bundledSize": sealed.bundled_size,
        "digest": sealed.digest,
        "warnings": list(warnings),
        "parts": [
            {
                "index": part.index,
                "filename": part.filename,
                "size": part.size,
                "sha1": part.sha1,
                "sha256": part.sha256,
            }
            for part in sealed.parts
        ],
    }


def sealed_text(bundle: NewBundle, sealed: SealedBundle) -> str:
    """A new bundle in two lines."""
    share = 100 * sealed.bundled_size / sealed.size
    size, bundled_size = format_size(sealed.size), format_size(sealed.bundled_size)
    return f"{size} sealed into {len(sealed.parts)} parts of {bundled_size} ({share:.0f} %)\n{bundle.manifest}"


_IMAGE = ExistingPath(path_type=Path)
_SECRET_FILE = ExistingPath(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.argument("image", type=_IMAGE)
@click.option("--prefix", required=True, help="Name of the image and first part of all file names.")
@click.option(
    "--any-name", is_flag=True, help="Allow other characters in --prefix; some old tools cannot open such a bundle."
)
@click.option(
    "--to", "folder", type=_FOLDER, required=True, metavar="DIR", help="Folder for the bundle; created if needed."
)
@click.option("--account", required=True, metavar="ID", help="Account id, 12 digits.")
@click.option(
    "--user-certificate",
    type=CERTIFICATE,
    required=True,
    help="Certificate of the account (PEM); its key opens the bundle.",
)
@click.option(
    "--service-certificate",
    type=CERTIFICATE,
    required=True,
    help="Certificate of the service (PEM); its key opens the bundle, too.",
)
@click.option("--signing-key", type=PRIVATE_KEY, required=True, help="RSA private key (PEM) that signs the manifest.")
@click.option(
    "--side-key", type=ED25519_PRIVATE_KEY, help="Ed25519 private key (PEM) for the side file.  [default: a new one]"
)
@click.option(
    "--architecture", default="x86_64", show_default=True, help="Architecture of the machine that boots the image."
)
@click.option(
    "--format", "image_format", default="raw", show_default=True, help="Format of the image: raw, qcow2, vmdk, …"
)
@click.option(
    "--secret-file",
    type=_SECRET_FILE,
    metavar="FILE",
    help="File with the passphrase of an encrypted image: qcow2, luks.",
)
@click.option(
    "--compression",
    type=click.Choice(["fast", "small"]),
    default="fast",
    show_default=True,
    help="fast: as fast as the disk. small: a few percent smaller, at a quarter of the speed.",
)
@click.option(
    "--skip-unused",
    is_flag=True,
    help="Skip what NTFS does not use: free clusters, page and hibernation files.",
)
@click.option(
    "--image-dir",
    "directories",
    type=ExistingPath(file_okay=False, path_type=Path),
    multiple=True,
    metavar="DIR",
    help="Folder of files to which the image may refer, in addition to its own folder. Repeatable.",
)
@output_option
@clean_up_on_signals
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
    """Seal the disk image IMAGE into a bundle, without a server.

    No program may write to the image while the command runs. An image that a QEMU guest uses is refused, and QEMU
    cannot start a guest on the image. Sparse ranges are not stored. The manifest is written last: if it exists, the
    bundle is complete. If the command fails, or the image has changed, the written files are removed. An image is
    refused if its metadata says that it is not a whole disk, or if it refers to a file outside its own folder and every
    --image-dir. With --skip-unused a disk is refused if it is not certain which clusters NTFS uses: Windows must have
    been shut down fully.

    The prefix consists of letters, digits, dots, dashes and underscores, as for BundleInstance, because old tools pass
    it to a shell. With --any-name other characters are accepted.

    \b
    Example:
      thrave bundle disk.raw --prefix winami --to bundles --account 123456789012
          --user-certificate cert.pem --service-certificate ec2.pem --signing-key pk.pem

    Exit codes: 0 done, 1 the image cannot be read or the folder cannot be written, 2 wrong command line, 3 a file does
    not exist, 4 the bundle exists already, 12 a required package is not installed.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from thrave.bundle.manifest import write_manifest
    from thrave.bundle.model import validate_account_id, validate_architecture, validate_prefix
    from thrave.bundle.sealer import Sealer
    from thrave.bundle.side_file import write_side_file
    from thrave.volumes.formats import open_volume

    validate_account_id(account)
    validate_architecture(architecture)
    validate_prefix(prefix)
    if not any_name:
        _check_portable(prefix)
    _warn_about_unrelated_key(signing_key, user_certificate, service_certificate)
    warnings: list[str] = []
    with ExitStack() as image_stack:
        volume = image_stack.enter_context(
            open_volume(
                image,
                image_format,
                skip_unused=skip_unused,
                secret_file=secret_file,
                directories=directories,
                on_warning=lambda warning: warnings.append(warning.text),
            )
        )
        for warning in warnings:
            print_warning(f"{warning}.")
        with new_bundle(folder, prefix) as new:
            sealer = Sealer(volume, prefix, compression=compression)
            with progress_bar("sealing", sealer.data_size) as bar, bar.following(lambda: sealer.progress):
                new.write_parts(sealer)
            image_stack.close()  # raises if the image has changed, before a manifest exists
            manifest = write_manifest(
                sealer.sealed,
                account_id=account,
                architecture=architecture,
                user_certificate=user_certificate,
                service_certificate=service_certificate,
                signing_key=signing_key,
            )
            side_key = side_key or Ed25519PrivateKey.generate()
            side_file = write_side_file(sealer.sealed, manifest, side_key=side_key, signing_key=signing_key)
            new.write(new.side_file, side_file)
            new.write(new.manifest, manifest)
    print_result(output, sealed_document(new, sealer.sealed, warnings), sealed_text(new, sealer.sealed))


def _check_portable(prefix: str) -> None:
    """Raise NamingError for a prefix that BundleInstance refuses."""
    from thrave.buckets.base import split_prefix
    from thrave.buckets.errors import InvalidArgument
    from thrave.bundle.errors import NamingError

    try:
        split_prefix(prefix)
    except InvalidArgument as error:
        raise NamingError(
            f"{prefix!r}: {error.message}. --any-name accepts it, but old tools may not open the bundle"
        ) from None


def _warn_about_unrelated_key(
    signing_key: RSAPrivateKey, user_certificate: Certificate, service_certificate: Certificate
) -> None:
    """Warn if neither certificate can verify the signature."""
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    own = signing_key.public_key().public_numbers()
    keys = (certificate.public_key() for certificate in (user_certificate, service_certificate))
    if all(not isinstance(key, RSAPublicKey) or key.public_numbers() != own for key in keys):
        print_warning(
            "the signing key belongs to neither certificate. To verify the signature, a reader needs the certificate "
            "of this key."
        )
