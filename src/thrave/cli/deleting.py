"""`thrave delete`: removes exactly one bundle.

The manifest goes first, since its presence means that the bundle is complete; the side file last, since its list says
what is left of a removal that was cut off. Nothing is removed that those two do not name as the bundle's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from thrave.cli.bundle_files import own_part_filenames
from thrave.cli.bundle_options import certificate_option
from thrave.cli.folders import FileMissingError
from thrave.cli.locations import OWN_LOCATION, read_manifest_file, read_side_file_at
from thrave.cli.output import emit, output_option
from thrave.cli.progress import progress_bar
from thrave.cli.signals import cleans_up_on_signals

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cryptography.x509 import Certificate

    from thrave.cli.folders import WritableFolder
    from thrave.cli.locations import Location

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
    emit(output, {"removed": not dry_run, "files": where}, said)


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
    if certificate is not None and not side.is_vouched_for_by(rsa_key(certificate)):
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
