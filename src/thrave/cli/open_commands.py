"""Where `thrave open` puts the image: a raw file, an image in a format of QEMU's, or stdout.

It joins what writes images (`thrave.bundle`, `thrave.volumes`) and knows nothing of bundles.

`thrave open`, `verify` and `show`: bundles as files, wherever they lie, without any service.

The parts are always looked for beside their manifest; from afar several are fetched at once, and none is ever put on
the disk. What was checked and what could not be is part of every answer.
"""

from __future__ import annotations

import re
import secrets
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.cli.folders import FolderParts, parts_ahead
from thrave.cli.interrupts import cleans_up_on_signals
from thrave.cli.locations import LOCATION, read_documents, read_manifest_file
from thrave.cli.options import PRIVATE_KEY, certificate_option, side_key_option
from thrave.cli.output import format_size, output_option, print_result
from thrave.cli.progress import progress_bar

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
"""What can be written, in QEMU's words."""


def image_maker(path: Path | None, image_format: str, *, replace: bool) -> ImageMaker:
    """What writes the image.

    Args:
        path: The file; None for stdout.
        image_format: One of `FORMATS`.
        replace: Whether a file that is there may be replaced.

    Raises:
        click.UsageError: Stdout is a terminal, or is asked for something else than raw.
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
        raise click.UsageError(f"{image_format} cannot be written to a pipe: give a file with -o")
    if sys.stdout.isatty():
        raise click.UsageError("an image is not for a terminal: redirect stdout or give a file with -o")


@contextmanager
def _converted(path: Path, image_format: str, size: int, *, replace: bool) -> Iterator[ImageTarget]:
    """Write in the format at once, without a raw file in between."""
    from thrave.bundle.errors import OutputError
    from thrave.bundle.image_output import followed, new_file
    from thrave.volumes.errors import VolumeUnwritableError
    from thrave.volumes.qemu_nbd import new_image

    with new_file(followed(path), replace=replace) as file:
        try:
            with new_image(file.name, image_format, size) as image:
                yield image
        except VolumeUnwritableError as error:  # QEMU names the file as it was given to it
            raise OutputError(str(error).replace(str(file.name), str(path))) from error


_SEEDS = 2**32


class Percent(click.ParamType[float]):
    """`5%`, `0.5%`: above 0, to 100."""

    name = "percent"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Give the number. Fails the command line if it is none."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)%?", str(value), re.ASCII)
        if match is None or not 0 < float(match[1]) <= 100:
            self.fail(f"{value!r} is no share of the parts; write 5%", param, ctx)
        return float(match[1])


@click.command("open")
@click.argument("location", type=LOCATION)
@click.option("--key", type=PRIVATE_KEY, required=True, help="Private key (PEM, RSA) of the account or the service.")
@certificate_option
@side_key_option
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
@click.option("--force", is_flag=True, help="Replace the file at IMAGE.")
@output_option
@cleans_up_on_signals
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
    """Open the bundle at LOCATION, whoever made it, and write its image.

    LOCATION is its manifest: a file, s3://BUCKET/PREFIX.manifest.xml, or https://HOST/PREFIX.manifest.xml. A bucket is
    called with the keys and settings that every AWS tool finds; its parts are streamed, and no disk holds any.

    The image appears only after the last check; if anything fails, or the command is killed, nothing remains. Its
    folder must exist. A file that is there is not replaced without --force, unless it already holds this image. The
    image is readable by its owner alone. Without --certificate only a bundle that --key itself has signed is known to
    be unchanged; the report says which.

    Nothing can be taken back from a pipe: to stdout each byte goes when its part has been verified, and the last ones
    only after the last check. If that fails, the image ends too early and the exit code says so.

    \b
    Example:
      thrave open bundles/winami.manifest.xml --key pk.pem --certificate signer.pem -o disk.raw
      thrave open s3://my-bucket/winami.manifest.xml --key pk.pem --format qcow2 -o disk.qcow2

    Exit codes: 0 done, 1 the image cannot be written or the bundle not be reached, 2 wrong command line, 3 a file is
    missing, 4 not allowed to read it or the image exists, 10 damaged or forged, 11 wrong key, 12 a package for the
    image's format is not installed.
    """
    from thrave.bundle.opener import open_verified_to
    from thrave.bundle.verifier import Trust, ignore_progress, verify_manifest
    from thrave.cli.output import verified_document, verified_text

    target = _target(image, stdout=stdout)
    make_image = image_maker(target, image_format, replace=force)
    xml, side_file, _ = read_documents(location)
    believed = verify_manifest(xml, side_file, Trust(certificate, side_key, key.public_key()))
    said = believed.manifest
    with _warning_of_half_an_image(target), progress_bar("opening", said.bundled_size) as bar:
        opened = open_verified_to(
            make_image, believed, FolderParts(location.folder), key,
            # Where the answer is JSON on stderr, nothing else may be there.
            on_progress=ignore_progress if target is None and output == "json" else bar.update,
            read_ahead=parts_ahead(location.folder, said),
        )  # fmt: skip
    where = target or "stdout"
    document = {"image": target or "-", "format": image_format, "manifest": location, **verified_document(opened)}
    text = f"{verified_text(opened)}\n\n{where}: {format_size(opened.manifest.size)}"
    print_result(output, document, text, err=target is None)


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
@click.argument("location", type=LOCATION)
@click.option("--key", type=PRIVATE_KEY, help="Private key (PEM, RSA); with it the image is checked, too.")
@certificate_option
@side_key_option
@click.option("--sample", type=Percent(), metavar="5%", help="Read so many of the parts only, chosen at random.")
@click.option("--seed", type=click.IntRange(0), help="Of the choice, to draw the same sample again.")
@output_option
@cleans_up_on_signals
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
    """Check all of the bundle at LOCATION that can be checked, and write nothing.

    Without a key: signature, structure and the digests of the parts. With one also that they hold the image that the
    manifest describes. What could not be checked, and why, is listed. LOCATION is as for `thrave open`.

    With --sample signature, structure and side file are checked whole, each part's presence and size are asked for, and
    only the parts that the sample has are read. The seed that it was drawn with is in the answer.

    \b
    Example:
      thrave verify bundles/winami.manifest.xml --certificate signer.pem
      thrave verify s3://my-bucket/winami.manifest.xml --certificate signer.pem --sample 5%

    Exit codes: 0 nothing is wrong with what was checked, 1 the bundle cannot be reached, 2 wrong command line, 3 a file
    is missing, 4 not allowed to read it or the image exists, 10 damaged or forged, 11 wrong key.
    """
    from thrave.bundle.verifier import Trust, verify_manifest
    from thrave.cli.output import verified_document, verified_text

    if sample is not None and key is not None:
        raise click.UsageError("with --key the image is checked, and for that all of it is read: leave out --sample")
    xml, side_file, _ = read_documents(location)
    believed = verify_manifest(xml, side_file, Trust(certificate, side_key, None if key is None else key.public_key()))
    if sample is None:
        verified = _verify_all(believed, location.folder, key)
    else:
        verified = _verify_sample(
            believed, location.folder, sample, secrets.randbelow(_SEEDS) if seed is None else seed
        )
    print_result(output, {"manifest": location, **verified_document(verified)}, verified_text(verified))


def _verify_all(believed: VerifiedManifest, folder: Folder, key: RSAPrivateKey | None) -> VerifyResult:
    from thrave.bundle.opener import verify_parts

    said = believed.manifest
    with progress_bar("verifying", said.bundled_size) as bar:
        ahead = parts_ahead(folder, said)
        return verify_parts(believed, FolderParts(folder), key, on_progress=bar.update, read_ahead=ahead)


def _verify_sample(believed: VerifiedManifest, folder: Folder, percent: float, seed: int) -> VerifyResult:
    from thrave.bundle.verifier import Sample, verify_sample

    said, sample = believed.manifest, Sample(percent, seed)
    with progress_bar("verifying", int(said.bundled_size * percent / 100)) as bar:
        ahead = parts_ahead(folder, said) or 2
        return verify_sample(believed, FolderParts(folder), sample, on_progress=bar.update, read_ahead=ahead)


@click.command()
@click.argument("location", type=LOCATION)
@output_option
def show(location: Location[Folder], output: str) -> None:
    """Show what the manifest at LOCATION says, without believing or checking it. LOCATION is as for `thrave open`.

    \b
    Example:
      thrave show bundles/winami.manifest.xml --output json

    Exit codes: 0 shown, 1 it cannot be reached, 2 wrong command line, 3 it is not there, 4 not allowed to read it, 10
    it is no manifest.
    """
    from thrave.bundle.manifest import read_manifest
    from thrave.cli.output import manifest_document, manifest_text

    said = read_manifest(read_manifest_file(location))
    print_result(output, {"manifest": location, **manifest_document(said)}, manifest_text(said))
