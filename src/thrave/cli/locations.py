"""The address of a bundle on the command line: a manifest on the disk, in a bucket, or on a web server.

    FOLDER/PREFIX.manifest.xml
    s3://BUCKET/FOLDER/PREFIX.manifest.xml
    https://HOST/FOLDER/PREFIX.manifest.xml

Only the first may have another file name, as it always could. Nothing is opened here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar
from urllib.parse import unquote

import click

from thrave.bundle.model import MANIFEST_SUFFIX, bound_side_filename, side_filename
from thrave.cli.folders import FileMissingError, Folder, FolderRefusedError, LocalFolder, WritableFolder

if TYPE_CHECKING:
    from collections.abc import Callable

_PART = re.compile(r"(.+)\.part\.[0-9]+", re.DOTALL)
_Folder_co = TypeVar("_Folder_co", bound=Folder, covariant=True)
_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Location(Generic[_Folder_co]):
    """Where a bundle is: its folder, and the file name of its manifest there."""

    folder: _Folder_co
    manifest: str

    def __str__(self) -> str:
        return self.folder.where(self.manifest)

    @property
    def prefix(self) -> str | None:
        """The stem of its file names; None if the manifest's has not the form that one can be told from."""
        prefix = self.manifest.removesuffix(MANIFEST_SUFFIX)
        return None if prefix == self.manifest else prefix

    @property
    def side_file(self) -> str | None:
        """The usual file name of the side file that it may have."""
        return None if self.prefix is None else side_filename(self.prefix)

    def bound_side_file(self, xml: bytes) -> str | None:
        """The file name of the side file that belongs to this manifest alone, if it has such a one."""
        return None if self.prefix is None else bound_side_filename(self.prefix, xml)


class Address(click.ParamType["_Kind"]):
    """An address that is made something of.

    Args:
        read: makes it of the text; raises ValueError with a reason.
    """

    name = "location"

    def __init__(self, read: Callable[[str], _Kind]) -> None:
        self._read = read

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> _Kind:
        """Give what the address means. Fails the command line if it is none."""
        try:
            return self._read(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def readable_folder(address: str) -> Folder:
    """The folder of an address, to be read.

    Raises:
        ValueError: It is no address of a folder.
    """
    if address.startswith(("https://", "http://")):
        from thrave.cli.remote_folders import web_folder

        return web_folder(address)
    return writable_folder(address)


def writable_folder(address: str) -> WritableFolder:
    """The folder of an address, to be written.

    Raises:
        ValueError: It is no address of a folder, or one that nothing can be written to.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        return LocalFolder(Path(address))
    if scheme != "s3":
        raise ValueError(f"{address} is neither a folder on the disk nor in a bucket (s3://BUCKET/FOLDER)")
    from thrave.cli.remote_folders import s3_folder

    bucket, _, folder = rest.partition("/")
    return s3_folder(bucket, folder)


def readable_location(address: str) -> Location[Folder]:
    """The location of a bundle that is read.

    Raises:
        ValueError: It is none.
        FileMissingError: It is a file of the disk that does not exist.
    """
    if "://" not in address:
        path = Path(address)
        if path.is_dir():
            raise ValueError(f"{address} is a folder; give the manifest in it: {path / ('PREFIX' + MANIFEST_SUFFIX)}")
        if not path.exists():
            raise FileMissingError(f"{address} does not exist")
        return _local(path)
    folder, manifest = _split(address)
    return Location(readable_folder(folder), unquote(manifest) if address.startswith("http") else manifest)


def writable_location(address: str) -> Location[WritableFolder]:
    """The location of a bundle that may be changed, or of which something may be left.

    Raises:
        ValueError: It is none.
    """
    if "://" not in address:
        return _local(Path(address))
    folder, manifest = _split(address)
    return Location(writable_folder(folder), manifest)


def _local(path: Path) -> Location[LocalFolder]:
    return Location(LocalFolder(path.parent, path.name), path.name)


def _split(address: str) -> tuple[str, str]:
    folder, _, manifest = address.rpartition("/")
    if folder.endswith(("/", ":")) or not manifest.endswith(MANIFEST_SUFFIX) or manifest == MANIFEST_SUFFIX:
        raise ValueError(f"{address} is no address of a manifest: it would end in /PREFIX{MANIFEST_SUFFIX}")
    return folder, manifest


def read_manifest_file(location: Location[Folder]) -> bytes:
    """The manifest's bytes, one more of them than a manifest may have if it has more.

    Raises:
        ManifestError: It is a part of a bundle.
    """
    from thrave.bundle.errors import ManifestError
    from thrave.bundle.manifest_xml import MAX_MANIFEST_BYTES

    xml = location.folder.read(location.manifest, MAX_MANIFEST_BYTES)
    part = _PART.fullmatch(location.manifest)
    if part is not None and b"<manifest" not in xml[:1000]:
        manifest = location.folder.where(part[1] + MANIFEST_SUFFIX)
        raise ManifestError(f"{location} is a part of a bundle, not its manifest; give {manifest}")
    return xml


class Documents(NamedTuple):
    """The two files that make parts a bundle."""

    manifest: bytes
    side_file: bytes | None
    side_filename: str | None
    """The file name of the side file, if there is one."""


def read_documents(location: Location[Folder]) -> Documents:
    """The manifest's bytes, and those of the side file if there is one beside it.

    A side file that belongs to this manifest alone comes first: one of the usual name may be an earlier bundle's.
    """
    xml = read_manifest_file(location)
    for filename in (location.bound_side_file(xml), location.side_file):
        side_file = read_side_file_at(location, filename)
        if side_file is not None:
            return Documents(xml, side_file, filename)
    return Documents(xml, None, None)


def read_side_file_at(location: Location[Folder], filename: str | None) -> bytes | None:
    """The side file's bytes, hardly more of them than one may have; None if there is none.

    To those who may not list a bucket, S3 says of what is not there that they may not read it. Then there is none, and
    that is said: whoever could hide a side file behind such an answer could as well remove it.
    """
    from thrave.bundle.side_file import MAX_SIDE_FILE_BYTES

    if filename is None:
        return None
    try:
        return location.folder.read(filename, MAX_SIDE_FILE_BYTES)
    except FileMissingError:
        return None
    except FolderRefusedError as error:
        if filename == location.side_file:
            click.echo(f"thrave: as if there were no side file: {error}", err=True)
        return None


LOCATION = Address(readable_location)
OWN_LOCATION = Address(writable_location)
OWN_FOLDER = Address(writable_folder)
