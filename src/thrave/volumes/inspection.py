"""What is looked at before an image is served: the image itself and every image that it stands on.

An image's header can name other files of the host (a backing file, a data file, extents), and the program that serves
it reads whatever is named there (CVE-2024-32498, OpenStack). A guest can write its disk's content but not that header,
unless a format is probed; so nothing is probed: the chain is walked by hand, each image is opened alone, and each must
say which format the local image below it has. qemu-img's check also finds images that are cut short, which QEMU would
otherwise serve with zeros in place of the rest.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

from thrave.volumes.errors import ComponentMissingError, VolumeInUseError, VolumeUnreadableError

PACKAGE = "qemu-utils"
CHAIN_LIMIT = 32
_SECONDS = 120  # for one look at one image; its metadata can be gigabytes on a slow disk
_CHECK_ACCEPTS = (0, 3, 63)  # qemu-img(1): 0 clean, 3 only leaked clusters, 63 the format has no check


class Layer(NamedTuple):
    """One image of a chain."""

    path: Path
    format: str


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


def inspect_chain(path: Path, image_format: str) -> None:
    """Refuse an image that is damaged, in use, or stands on something that must not be read.

    Args:
        path: The topmost image.
        image_format: Its format, in QEMU's words.

    Raises:
        VolumeError: With the reason, and the image of the chain that it is about.
    """
    # The check of one image opens all that are below it, so the whole chain is walked first.
    for layer in list(_chain(Layer(path, image_format))):
        _check(layer)


def _chain(top: Layer) -> Iterator[Layer]:
    layer: Layer | None = top
    for _ in range(CHAIN_LIMIT + 1):
        if layer is None:
            return
        yield layer
        layer = _backing(layer, _information(layer))
    raise VolumeUnreadableError(top.path, f"it stands on more than {CHAIN_LIMIT} images")


def _information(layer: Layer) -> _Information:
    """What qemu-img says of one image; the ones below it are not opened."""
    done = _qemu_img("info", layer)
    if done.returncode:
        raise _failure(layer, done)
    information: _Information = json.loads(done.stdout)
    return information


def _check(layer: Layer) -> None:
    done = _qemu_img("check", layer)
    if done.returncode not in _CHECK_ACCEPTS:
        raise _failure(layer, done)


def _backing(layer: Layer, information: _Information) -> Layer | None:
    """The image below, None if there is none; what else the image names is refused."""
    details = information.get("format-specific", {}).get("data", {})
    if "data-file" in details:
        raise VolumeUnreadableError(layer.path, "it keeps its data in another file, which is not supported")
    for extent in details.get("extents", []):
        if Path(extent["filename"]).parent != layer.path.parent:
            raise VolumeUnreadableError(layer.path, f"it names {extent['filename']}, outside its own folder")
    if "backing-filename" not in information:
        return None
    below = information.get("full-backing-filename", information["backing-filename"])
    if not below.startswith("/"):
        raise VolumeUnreadableError(layer.path, f"it stands on {below}, which is not a local file")
    if "backing-filename-format" not in information:
        raise VolumeUnreadableError(layer.path, f"it does not say which format {below} has: qemu-img rebase -u -F")
    return Layer(Path(below), information["backing-filename-format"])


def _qemu_img(command: str, layer: Layer) -> subprocess.CompletedProcess[str]:
    options = ["--output=json"] if command == "info" else ["-q"]
    argv = [program("qemu-img"), command, *options, "-f", layer.format, str(layer.path)]
    try:
        return subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise VolumeUnreadableError(layer.path, f"qemu-img {command} took more than {_SECONDS} seconds") from error


def _failure(layer: Layer, done: subprocess.CompletedProcess[str]) -> VolumeInUseError | VolumeUnreadableError:
    if '"write" lock' in done.stderr:
        return VolumeInUseError(layer.path)
    lines = done.stderr.strip().splitlines() or [f"qemu-img ended with {done.returncode}"]
    return VolumeUnreadableError(layer.path, lines[0].removeprefix("qemu-img: "))
