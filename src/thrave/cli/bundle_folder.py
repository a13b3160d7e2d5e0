"""A new bundle as files in a folder: written whole or not at all.

It decides only where bytes go; what they are is the business of `thrave.bundle`.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import click

from thrave.bundle.errors import OutputError
from thrave.bundle.image_output import new_file
from thrave.bundle.model import manifest_filename, side_filename
from thrave.cli.exits import Exit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from thrave.bundle.sealer import Sealer


class BundleExists(click.ClickException):
    """There is a bundle of that name in the folder."""

    exit_code = Exit.REFUSED


class BundleFolder:
    """The files of one bundle that is being written."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.manifest = folder / manifest_filename(prefix)
        self.side_file = folder / side_filename(prefix)
        self._folder = folder
        self._written: list[Path] = []

    def write_parts(self, sealing: Sealer) -> None:
        """Write each part as it comes."""
        with closing(sealing.parts()) as parts:
            for part in parts:
                self.write(self._folder / part.filename, part.data)

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """Write one file of the bundle; it is on the disk when this returns."""
        self._written.append(path)
        with new_file(path, replace=True) as file:
            file.write(0, memoryview(data))

    def remove(self) -> None:
        """Remove everything that was written."""
        for path in self._written:
            path.unlink(missing_ok=True)


@contextmanager
def new_bundle(folder: Path, prefix: str) -> Iterator[BundleFolder]:
    """A folder to write a bundle to, from which everything is removed again if the block fails.

    Raises:
        BundleExists: There is a manifest of that name.
        click.ClickException: The folder cannot be made or written.
    """
    bundle = BundleFolder(folder, prefix)
    if bundle.manifest.exists():
        raise BundleExists(f"{bundle.manifest} exists; remove the bundle or choose another prefix")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield bundle
    except (OSError, OutputError) as error:
        bundle.remove()
        reason = error.strerror if isinstance(error, OSError) else error
        raise click.ClickException(f"cannot write to {folder}: {reason}") from error
    except BaseException:
        bundle.remove()
        raise
