"""What is looked at before an image is served: the image itself and every image that it stands on.

An image's header can name other files of the host (a backing file, a data file, extents), and the program that serves
it reads whatever is named there (CVE-2024-32498, OpenStack). A guest can write its disk's content but not that header,
unless a format is probed; so nothing is probed: the chain is walked by hand, each image is opened alone, and each must
say which format the local image below it has. Each is locked before it is looked at, so that what was found stays true.
qemu-img's check also finds images that are cut short, which QEMU would otherwise serve with zeros in place of the rest.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from thrave import programs
from thrave.programs import Finished
from thrave.volumes import chain
from thrave.volumes.chain import Layer
from thrave.volumes.errors import (
    ComponentMissingError,
    VolumeEncryptedError,
    VolumeError,
    VolumeInUseError,
    VolumeUnreadableError,
)
from thrave.volumes.locking import ImageLocks

PACKAGE = "qemu-utils"
CHAIN_LIMIT = 32
_SECONDS = 120  # for one look at one image; its metadata can be gigabytes on a slow disk
_CHECK_ACCEPTS = (0, 3, 63)  # qemu-img(1): 0 clean, 3 only leaked clusters, 63 the format has no check


class _Extent(TypedDict):
    filename: str


_Details = TypedDict("_Details", {"data-file": NotRequired[str], "extents": NotRequired[list[_Extent]]})


class _Specific(TypedDict):
    data: NotRequired[_Details]


# The keys of `qemu-img info --output=json` that are looked at.
_Information = TypedDict(
    "_Information",
    {
        "backing-filename": NotRequired[str],
        "full-backing-filename": NotRequired[str],
        "backing-filename-format": NotRequired[str],
        "encrypted": NotRequired[bool],
        "format-specific": NotRequired[_Specific],
    },
)


def program(name: str) -> str:
    """The full path of one of QEMU's programs.

    Raises:
        ComponentMissingError: It is not on PATH.
    """
    found = shutil.which(name)
    if found is None:
        raise ComponentMissingError(name, PACKAGE)
    return found


def inspect_chain(path: Path, image_format: str, locks: ImageLocks, secret_file: Path | None = None) -> list[Layer]:
    """Refuse an image that is damaged, in use, or stands on something that must not be read.

    Args:
        path: The topmost image; absolute.
        image_format: Its format, in QEMU's words.
        locks: Take every file that the chain consists of.
        secret_file: Holds the passphrase of the images that are encrypted.

    Returns:
        The chain, the topmost image first.

    Raises:
        VolumeError: With the reason, and the image of the chain that it is about.
    """
    # The check of one image opens all that are below it, so the whole chain is walked first.
    layers = list(_chain(Layer(path, image_format), locks))
    for depth in range(len(layers)):
        _check(layers[depth:], secret_file)
    return layers


def _chain(top: Layer, locks: ImageLocks) -> Iterator[Layer]:
    layer: Layer | None = top
    for _ in range(CHAIN_LIMIT + 1):
        if layer is None:
            return
        locks.take(layer.path)
        information = _information(layer)
        for extent in _extents(layer, information):
            locks.take(extent)
        yield layer._replace(encrypted=layer.format == "luks" or information.get("encrypted", False))
        layer = _backing(layer, information)
    raise VolumeUnreadableError(top.path, f"it stands on more than {CHAIN_LIMIT} images")


def _information(layer: Layer) -> _Information:
    """What qemu-img says of one image; the ones below it are not opened, and no passphrase is needed."""
    done = _qemu_img(layer, "info", "--output=json", *chain.arguments([layer], None))
    if done.status:
        raise _failure(layer, done)
    information: _Information = json.loads(done.out)
    return information


def _check(layers: Sequence[Layer], secret_file: Path | None) -> None:
    done = _qemu_img(layers[0], "check", "-q", *chain.arguments(layers, secret_file))
    if done.status not in _CHECK_ACCEPTS:
        raise _failure(layers[0], done, secret_file)


def _extents(layer: Layer, information: _Information) -> set[Path]:
    """The other files that an image keeps its data in: vmdk's, which must lie beside it."""
    details = _details(information)
    if "data-file" in details:
        raise VolumeUnreadableError(layer.path, "it keeps its data in another file, which is not supported")
    extents = {Path(extent["filename"]) for extent in details.get("extents", [])}
    for extent in extents:
        if extent.parent != layer.path.parent:
            raise VolumeUnreadableError(layer.path, f"it names {extent}, outside its own folder")
    return extents - {layer.path}


def _details(information: _Information) -> _Details:
    return information.get("format-specific", {}).get("data", {})


def _backing(layer: Layer, information: _Information) -> Layer | None:
    """The image below, None if there is none."""
    if "backing-filename" not in information:
        return None
    below = information.get("full-backing-filename", information["backing-filename"])
    if not below.startswith("/"):
        raise VolumeUnreadableError(layer.path, f"it stands on {below}, which is not a local file")
    if "backing-filename-format" not in information:
        raise VolumeUnreadableError(layer.path, f"it does not say which format {below} has: qemu-img rebase -u -F")
    return Layer(Path(below), information["backing-filename-format"])


def _qemu_img(layer: Layer, command: str, *arguments: str) -> Finished:
    argv = [program("qemu-img"), command, *arguments]
    try:
        return programs.run(argv, timeout=_SECONDS, max_memory=programs.MAX_MEMORY)
    except programs.ProgramTimeoutError as error:
        raise VolumeUnreadableError(layer.path, f"qemu-img {command} took more than {_SECONDS} seconds") from error
    except programs.ProgramError as error:
        raise VolumeUnreadableError(layer.path, f"qemu-img {command} {error.reason}") from error


def _failure(layer: Layer, done: Finished, secret_file: Path | None = None) -> VolumeError:
    if '"write" lock' in done.error_text:
        return VolumeInUseError(layer.path)
    if "Invalid password" in done.error_text:
        return VolumeEncryptedError(
            layer.path, f"what {secret_file} holds does not open it; every byte counts, also a newline at the end"
        )
    lines = done.error_text.strip().splitlines() or [f"qemu-img ended with {done.status}"]
    return VolumeUnreadableError(layer.path, lines[0].removeprefix("qemu-img: "))
