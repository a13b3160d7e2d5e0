"""A chain of images, the one that is read and those that it stands on, and how QEMU's programs are told of it.

A chain that is not encrypted is told by its topmost image and that image's format: each image names the next. An
encrypted one is told image by image, with the file that holds the passphrase. The passphrase itself is read by QEMU's
programs alone: it is never in a command line, an error or this process.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from thrave.volumes.errors import VolumeEncryptedError, VolumeUnreadableError
from thrave.volumes.hostfile import open_file

_SECRET = "passphrase"  # noqa: S105 (the name of QEMU's object, not what it holds)
_SECRET_OPTIONS = {"luks": "key-secret"}
_SECRET_OPTION = "encrypt.key-secret"  # noqa: S105 (of every other format)


class Layer(NamedTuple):
    """One image of a chain."""

    path: Path
    format: str
    """In QEMU's words."""
    encrypted: bool = False


def arguments(chain: Sequence[Layer], secret_file: Path | None) -> list[str]:
    """What follows a command of qemu-img or the options of qemu-nbd.

    Args:
        chain: The image that is meant, and all below it; at least one.
        secret_file: Holds the passphrase of all that are encrypted.

    Raises:
        VolumeEncryptedError: One is encrypted, and there is no such file.
    """
    locked = next((layer for layer in chain if layer.encrypted), None)
    if locked is None:
        return [f"--format={chain[0].format}", str(chain[0].path)]
    secret = f"secret,id={_SECRET},file={_escaped(_readable(secret_file, locked))}"
    options = [option for depth, layer in enumerate(chain) for option in _options("backing." * depth, layer)]
    return ["--object", secret, "--image-opts", ",".join(options)]


def _options(prefix: str, layer: Layer) -> list[str]:
    protocol = "host_device" if layer.path.is_block_device() else "file"
    options = [f"driver={layer.format}", f"file.driver={protocol}", f"file.filename={_escaped(layer.path)}"]
    if layer.encrypted:
        options.append(f"{_SECRET_OPTIONS.get(layer.format, _SECRET_OPTION)}={_SECRET}")
    return [prefix + option for option in options]


def _readable(secret_file: Path | None, layer: Layer) -> Path:
    if secret_file is None:
        raise VolumeEncryptedError(layer.path, "the file that holds its passphrase must be given")
    try:
        file, mode = open_file(secret_file)
    except VolumeUnreadableError as error:
        raise VolumeEncryptedError(layer.path, str(error)) from error
    os.close(file)
    # It is read more than once, each time by another program.
    if not stat.S_ISREG(mode):
        raise VolumeEncryptedError(layer.path, f"{secret_file} is not a regular file")
    return secret_file.absolute()


def _escaped(path: Path) -> str:
    """As QEMU wants a value that ends with the next comma."""
    return str(path).replace(",", ",,")
