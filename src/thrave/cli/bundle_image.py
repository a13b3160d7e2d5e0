"""Where `thrave open` puts the image: a raw file, an image in a format of QEMU's, or stdout.

It joins what writes images (`thrave.bundle`, `thrave.volumes`) and knows nothing of bundles.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from thrave.bundle.base import ImageMaker, ImageTarget

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
