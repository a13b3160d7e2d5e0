"""Which files are a bundle's: those that may be copied or removed in its name, and no other.

A manifest may be hostile. Every known bundler calls parts `PREFIX.part.N`, and Thrave also `PREFIX.TOKEN.part.N`, where
all parts have the same token. A manifest that names anything else, or the parts of another bundle, is refused before a
file is touched.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from thrave.bundle.errors import ManifestError
from thrave.bundle.names import manifest_filename

_MIDDLE = r"\.[A-Za-z0-9_-]+"  # the token

if TYPE_CHECKING:
    from collections.abc import Iterable

    from thrave.cli.folders import Folder
    from thrave.cli.locations import Location


def own_part_filenames(location: Location[Folder], filenames: Iterable[str]) -> tuple[str, ...]:
    """The file names of a bundle's parts, if they are the parts of the bundle at that location.

    Raises:
        click.UsageError: The manifest's own file name does not say which bundle it is.
        ManifestError: It names another file.
    """
    if location.prefix is None:
        raise click.UsageError(f"{location} is not called PREFIX.manifest.xml, so nobody knows which files are its own")
    own = re.compile(f"({re.escape(location.prefix)}({_MIDDLE})?)" + r"\.part\.[0-9]+")
    names, stems = tuple(filenames), set()
    for name in names:
        match = own.fullmatch(name)
        if match is None:
            raise ManifestError(f"{name!r} is no part of the bundle {location.prefix!r}: nothing was touched")
        stems.add(match[1])
    if len(stems) > 1:
        raise ManifestError(f"the parts have names of several bundles, {sorted(stems)[:3]}: nothing was touched")
    for stem in stems - {location.prefix}:
        # What looks like a token may be the end of another bundle's name.
        if location.folder.size(manifest_filename(stem)) is not None:
            raise ManifestError(f"its parts have the names of the bundle {stem!r}: nothing was touched")
    return names
