"""`thrave open`, `verify` and `show`: read a bundle from a folder, a bucket or a web server, without the service.

The parts must be in the folder of their manifest. Remote parts are fetched several at a time, and never stored on disk.
The output lists what was checked and what could not be checked.
"""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.cli.error_output import print_warning
from thrave.cli.folders import FolderParts, read_ahead
from thrave.cli.interrupts import clean_up_on_signals
from thrave.cli.locations import LOCATION, read_documents, read_manifest_file
from thrave.cli.options import PRIVATE_KEY, certificate_option, side_key_option
from thrave.cli.output import format_size, output_option, print_result
from thrave.cli.progress import progress_bar
from thrave.concurrency import random_below

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate

    from thrave.bundle.base import ImageMaker, ImageTarget
    from thrave.bundle.verifier import VerifiedManifest, VerifyResult
    from thrave.cli.folders import Folder
    from thrave.cli.locations import Location


FORMATS = ("raw", "qcow2", "vmdk", "vpc")
"""Formats that can be written, as QEMU names them."""


def image_maker(path: Path | None, image_format: str, *, replace: bool) -> ImageMaker:
    """Return a function that creates the image.

    Args:
        path: The file; None for stdout.
        image_format: One of `FORMATS`.
        replace: Whether an existing file may be replaced.

    Raises:
        click.UsageError: Stdout is a terminal, or the format is not raw.
    """
    from thrave.bundle.image_output import image_file, image_stream

    if path is None:
        _check_stdout(image_format)
        return partial(image_stream, sys.stdout.fileno())
    if image_format == "raw":
        return partial(image_file, path, replace=replace)
    return partial(_converted, path, image_format, replace=replace)


def _check_stdout(image_format: str) -> None:
    if image_format != "raw":
        raise click.UsageError(f"{image_format} cannot be written to stdout. Pass a file with -o.")
    if sys.stdout.isatty():
        raise click.UsageError("cannot write an image to a terminal. Redirect stdout, or pass a file with -o.")


@contextmanager
def _converted(path: Path, image_format: str, size: int, *, replace: bool) -> Iterator[ImageTarget]:
    """Write the format directly, without an intermediate raw file."""
    from thrave.bundle.errors import OutputError
    from thrave.bundle.image_output import new_file, resolve_links
    from thrave.volumes.errors import VolumeUnwritableError
    from thrave.volumes.qemu_nbd import create_image

    with new_file(resolve_links(path), replace=replace) as file:
        try:
            with create_image(file.name, image_format, size) as image:
                yield image
        except VolumeUnwritableError as error:  # QEMU's message names the temporary file
            raise OutputError(str(error).replace(str(file.name), str(path))) from error


_SEEDS = 2**32


class Percent(click.ParamType[float]):
    """A percentage such as `5%` or `0.5%`: above 0, at most 100."""

    name = "percent"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Fails if the value is not a percentage."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)%?", str(value), re.ASCII)
        if match is None or not 0 < float(match[1]) <= 100:
            self.fail(f"Invalid percentage {value!r}. Example: 5%.", param, ctx)
        return float(match[1])


@click.command("open", short_help="Open a bundle, made by any tool, and write its image.")
@click.argument("location", type=LOCATION)
@click.option("--key", type=PRIVATE_KEY, required=True, help="Private key (PEM, RSA) of the account or the service.")
@certificate_option
@side_key_option
@click.option(
    "-o", "image", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path), help="Image to write; - is stdout."
)
@click.option("--stdout", is_flag=True, help="Write the image to stdout and the report to stderr.")
@click.option(
    "--format",
    "image_format",
    type=click.Choice(FORMATS),
    default="raw",
    show_default=True,
    help="Format of the image.",
)
@click.option("--force", is_flag=True, help="Replace the file at IMAGE.")
@output_option
@clean_up_on_signals
def open_(
    *,
    location: Location[Folder],
    key: RSAPrivateKey,
    certificate: Certificate | None,
    side_key: Ed25519PublicKey | None,
    image: Path | None,
    stdout: bool,
    image_format: str,
    force: bool,
    output: str,
) -> None:
    """Open the bundle at LOCATION, made by any tool, and write its image.

    LOCATION is the manifest: a file, s3://BUCKET/PREFIX.manifest.xml, or https://HOST/PREFIX.manifest.xml. For a bucket
    Thrave uses the credentials and settings of the AWS tools. Parts are streamed and never stored on disk.

    The image appears only after the last check. If the command fails or is killed, no file remains. The folder of the
    image must exist. An existing file is replaced only with --force, unless it already has this content. Only its
    owner can read the image. Without --certificate, only a bundle that was signed with --key is verified to be
    unchanged; the report says which.

    With --stdout each byte is written when its part has been verified, and the last bytes only after the last check.
    If a check fails, the image is truncated and the exit code is not 0.

    \b
    Example:
      thrave open bundles/winami.manifest.xml --key pk.pem --certificate signer.pem -o disk.raw
      thrave open s3://my-bucket/winami.manifest.xml --key pk.pem --format qcow2 -o disk.qcow2

    Exit codes: 0 done, 1 the image cannot be written or the bundle cannot be reached, 2 wrong command line, 3 a file is
    missing, 4 access denied or the image exists, 10 damaged or forged, 11 wrong key, 12 a package for the image's
    format is not installed.
    """
    from thrave.bundle.opener import open_verified_to
    from thrave.bundle.verifier import Trust, ignore_progress, verify_manifest
    from thrave.cli.output import verified_document, verified_text

    target = _target(image, stdout=stdout)
    make_image = image_maker(target, image_format, replace=force)
    xml, side_file, _ = read_documents(location)
    verified_manifest = verify_manifest(xml, side_file, Trust(certificate, side_key, key.public_key()))
    manifest = verified_manifest.manifest
    with _warn_about_incomplete_image(target), progress_bar("opening", manifest.bundled_size) as bar:
        opened = open_verified_to(
            make_image, verified_manifest, FolderParts(location.folder), key,
            # No progress bar if stderr carries the JSON document.
            on_progress=ignore_progress if target is None and output == "json" else bar.update,
            read_ahead=read_ahead(location.folder, manifest),
        )  # fmt: skip
    where = target or "stdout"
    document = {"image": target or "-", "format": image_format, "manifest": location, **verified_document(opened)}
    text = f"{verified_text(opened)}\n\n{where}: {format_size(opened.manifest.size)}"
    print_result(output, document, text, err=target is None)


def _target(image: Path | None, *, stdout: bool) -> Path | None:
    """The file for the image, None for stdout."""
    if (image is None) is not stdout:
        raise click.UsageError("pass either -o IMAGE or --stdout")
    return None if image is None or str(image) == "-" else image


@contextmanager
def _warn_about_incomplete_image(target: Path | None) -> Iterator[None]:
    try:
        yield
    except Exception:
        if target is None:
            print_warning("the image on stdout is incomplete. Do not use it.")
        raise


@click.command()
@click.argument("location", type=LOCATION)
@click.option("--key", type=PRIVATE_KEY, help="Private key (PEM, RSA); with it the image is verified, too.")
@certificate_option
@side_key_option
@click.option("--sample", type=Percent(), metavar="5%", help="Read only this share of the parts, chosen at random.")
@click.option("--seed", type=click.IntRange(0), help="Seed of the random choice, to repeat a sample.")
@output_option
@clean_up_on_signals
def verify(
    *,
    location: Location[Folder],
    key: RSAPrivateKey | None,
    certificate: Certificate | None,
    side_key: Ed25519PublicKey | None,
    sample: float | None,
    seed: int | None,
    output: str,
) -> None:
    """Verify the bundle at LOCATION without writing anything. LOCATION is as for `thrave open`.

    Without a key: signature, structure and the digests of the parts. With a key also that the parts contain the image
    that the manifest describes. The report lists what could not be checked, and why.

    With --sample, signature, structure and side file are verified completely. Existence and size of each part are
    checked, and only the sampled parts are read. The report contains the seed of the sample.

    \b
    Example:
      thrave verify bundles/winami.manifest.xml --certificate signer.pem
      thrave verify s3://my-bucket/winami.manifest.xml --certificate signer.pem --sample 5%

    Exit codes: 0 all checks succeeded, 1 the bundle cannot be reached, 2 wrong command line, 3 a file is missing, 4
    access denied, 10 damaged or forged, 11 wrong key.
    """
    from thrave.bundle.verifier import Trust, verify_manifest
    from thrave.cli.output import verified_document, verified_text

    if sample is not None and key is not None:
        raise click.UsageError("--key verifies the whole image, so --sample is not possible with it")
    xml, side_file, _ = read_documents(location)
    verified_manifest = verify_manifest(
        xml, side_file, Trust(certificate, side_key, None if key is None else key.public_key())
    )
    if sample is None:
        verified = _verify_all(verified_manifest, location.folder, key)
    else:
        verified = _verify_sample(
            verified_manifest, location.folder, sample, random_below(_SEEDS) if seed is None else seed
        )
    print_result(output, {"manifest": location, **verified_document(verified)}, verified_text(verified))


def _verify_all(verified_manifest: VerifiedManifest, folder: Folder, key: RSAPrivateKey | None) -> VerifyResult:
    from thrave.bundle.opener import verify_parts

    manifest = verified_manifest.manifest
    with progress_bar("verifying", manifest.bundled_size) as bar:
        ahead = read_ahead(folder, manifest)
        return verify_parts(verified_manifest, FolderParts(folder), key, on_progress=bar.update, read_ahead=ahead)


def _verify_sample(verified_manifest: VerifiedManifest, folder: Folder, percent: float, seed: int) -> VerifyResult:
    from thrave.bundle.verifier import Sample, verify_sample

    manifest, sample = verified_manifest.manifest, Sample(percent, seed)
    with progress_bar("verifying", int(manifest.bundled_size * percent / 100)) as bar:
        ahead = read_ahead(folder, manifest) or 2
        return verify_sample(verified_manifest, FolderParts(folder), sample, on_progress=bar.update, read_ahead=ahead)


@click.command()
@click.argument("location", type=LOCATION)
@output_option
def show(location: Location[Folder], output: str) -> None:
    """Show a manifest without verifying it. LOCATION is as for `thrave open`.

    \b
    Example:
      thrave show bundles/winami.manifest.xml --output json

    Exit codes: 0 shown, 1 the manifest cannot be reached, 2 wrong command line, 3 no such file, 4 access denied, 10 not
    a manifest.
    """
    from thrave.bundle.manifest import read_manifest
    from thrave.cli.output import manifest_document, manifest_text

    manifest = read_manifest(read_manifest_file(location))
    print_result(output, {"manifest": location, **manifest_document(manifest)}, manifest_text(manifest))
