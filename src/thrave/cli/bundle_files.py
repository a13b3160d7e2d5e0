"""Which files are a bundle's: those that may be copied or removed in its name, and no other.

A manifest may be hostile. Every known bundler calls parts `PREFIX.part.N`. A manifest that names anything else is
refused before a file is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from thrave.bundle.errors import ManifestError
from thrave.bundle.model import own_part

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
    own = own_part(location.prefix)
    names = tuple(filenames)
    for name in names:
        if not own.fullmatch(name):
            raise ManifestError(f"{name!r} is no part of the bundle {location.prefix!r}: nothing was touched")
    return names
