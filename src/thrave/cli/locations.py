"""The location of a bundle on the command line: a manifest on the disk, in a bucket or on a web server.

    FOLDER/PREFIX.manifest.xml
    s3://BUCKET/FOLDER/PREFIX.manifest.xml
    https://HOST/FOLDER/PREFIX.manifest.xml

A manifest on the disk may have any file name. Parsing a location opens no file and no connection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar
from urllib.parse import unquote

import click

from thrave.bundle.model import MANIFEST_SUFFIX, bound_side_filename, side_filename
from thrave.cli.error_output import print_warning
from thrave.cli.folders import FileMissingError, Folder, FolderRefusedError, LocalFolder, WritableFolder

if TYPE_CHECKING:
    from collections.abc import Callable

REMOVAL_SUFFIX = ".removal.json"
_PART = re.compile(r"(.+)\.part\.[0-9]+", re.DOTALL)
_Folder_co = TypeVar("_Folder_co", bound=Folder, covariant=True)
_Parsed = TypeVar("_Parsed")


@dataclass(frozen=True)
class Location(Generic[_Folder_co]):
    """Where a bundle is: its folder, and the file name of its manifest."""

    folder: _Folder_co
    manifest: str

    def __str__(self) -> str:
        return self.folder.display_name(self.manifest)

    @property
    def prefix(self) -> str | None:
        """Prefix of the bundle; None if the manifest is not called PREFIX.manifest.xml."""
        prefix = self.manifest.removesuffix(MANIFEST_SUFFIX)
        return None if prefix == self.manifest else prefix

    @property
    def side_file(self) -> str | None:
        """File name of the side file, `PREFIX.manifest.json`; None if the prefix is unknown."""
        return None if self.prefix is None else side_filename(self.prefix)

    @property
    def removal_record(self) -> str | None:
        """File name of the record of an interrupted removal; None if the prefix is unknown."""
        return None if self.prefix is None else self.prefix + REMOVAL_SUFFIX

    def bound_side_file(self, xml: bytes) -> str | None:
        """Return the file name of a side file that is bound to this manifest; None if the prefix is unknown."""
        return None if self.prefix is None else bound_side_filename(self.prefix, xml)


class Address(click.ParamType["_Parsed"]):
    """A path or URL.

    Args:
        parse: Returns the value of the parameter; raises ValueError with a reason.
    """

    name = "location"

    def __init__(self, parse: Callable[[str], _Parsed]) -> None:
        self._parse = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> _Parsed:
        """Return the parsed value. Fails if the address is invalid."""
        try:
            return self._parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def readable_folder(address: str) -> Folder:
    """Return the folder with this address, for reading.

    Raises:
        ValueError: The address is invalid.
    """
    if address.startswith(("https://", "http://")):
        from thrave.cli.remote_folders import web_folder

        return web_folder(address)
    return writable_folder(address)


def writable_folder(address: str) -> WritableFolder:
    """Return the folder with this address, for reading and writing.

    Raises:
        ValueError: The address is invalid, or that of a web server.
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
    """Return the location of a bundle that is only read.

    Raises:
        ValueError: The address is invalid.
        FileMissingError: A file on the disk does not exist.
    """
    if "://" not in address:
        path = Path(address)
        if path.is_dir():
            raise ValueError(f"{address} is a folder. Pass the manifest: {path / ('PREFIX' + MANIFEST_SUFFIX)}")
        if not path.exists():
            raise FileMissingError(f"{address} does not exist")
        return _local_location(path)
    folder, manifest = _split(address)
    return Location(readable_folder(folder), unquote(manifest) if address.startswith("http") else manifest)


def writable_location(address: str) -> Location[WritableFolder]:
    """Return the location of a bundle that is changed or removed. The manifest need not exist.

    Raises:
        ValueError: The address is invalid, or that of a web server.
    """
    if "://" not in address:
        return _local_location(Path(address))
    folder, manifest = _split(address)
    return Location(writable_folder(folder), manifest)


def _local_location(path: Path) -> Location[LocalFolder]:
    return Location(LocalFolder(path.parent, path.name), path.name)


def _split(address: str) -> tuple[str, str]:
    folder, _, manifest = address.rpartition("/")
    if folder.endswith(("/", ":")) or not manifest.endswith(MANIFEST_SUFFIX) or manifest == MANIFEST_SUFFIX:
        raise ValueError(f"{address} is not the address of a manifest. It must end in /PREFIX{MANIFEST_SUFFIX}.")
    return folder, manifest


def read_manifest_file(location: Location[Folder]) -> bytes:
    """Return the manifest's bytes, at most one more than a manifest may have.

    Raises:
        ManifestError: The file is a part of a bundle.
    """
    from thrave.bundle.errors import ManifestError
    from thrave.bundle.manifest_xml import MAX_MANIFEST_BYTES

    xml = location.folder.read(location.manifest, MAX_MANIFEST_BYTES)
    part = _PART.fullmatch(location.manifest)
    if part is not None and b"<manifest" not in xml[:1000]:
        manifest = location.folder.display_name(part[1] + MANIFEST_SUFFIX)
        raise ManifestError(f"{location} is a part of a bundle, not its manifest. Pass {manifest}.")
    return xml


class Documents(NamedTuple):
    """Manifest and side file of a bundle."""

    manifest: bytes
    side_file: bytes | None
    side_filename: str | None
    """File name of the side file; None without one."""


def read_documents(location: Location[Folder]) -> Documents:
    """Read the manifest and, if there is one, the side file.

    A side file that is bound to this manifest is preferred: `PREFIX.manifest.json` may be that of an earlier bundle.
    """
    xml = read_manifest_file(location)
    for filename in (location.bound_side_file(xml), location.side_file):
        side_file = read_side_file_at(location, filename)
        if side_file is not None:
            return Documents(xml, side_file, filename)
    return Documents(xml, None, None)


def read_side_file_at(location: Location[Folder], filename: str | None) -> bytes | None:
    """Return the side file's bytes, at most one more than a side file may have; None if there is none.

    To a client that may not list the bucket, S3 answers "access denied" for an object that does not exist. This counts
    as no side file, with a message. Security does not change: an attacker who can cause this response could also delete
    the side file.
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
            print_warning(f"continuing without a side file: {error}")
        return None


LOCATION = Address(readable_location)
WRITABLE_LOCATION = Address(writable_location)
WRITABLE_FOLDER = Address(writable_folder)
