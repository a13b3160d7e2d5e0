"""A chain of images, the one that is read and those that it stands on, and how QEMU's programs are told of it.

The whole graph is named, as JSON: each image with its format, its files, and what it stands on, and for one that stands
on nothing that too. Every file is a descriptor that is open already (`/proc/self/fd/N`), so QEMU follows no name that
is written in an image, and reads what was inspected even if a name leads elsewhere by now. QEMU has no option for the
files that a VMDK's descriptor names: it gets a new descriptor, in memory, that names the open files. The passphrase of
an encrypted image is read by QEMU's programs alone: it is never in a command line, an error or this process.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thrave.volumes.errors import VolumeEncryptedError, VolumeUnreadableError
from thrave.volumes.headers import Extent, Statement
from thrave.volumes.hostfile import HostFile, inheritable_number
from thrave.volumes.vmdk import descriptor

_SECRET = "passphrase"  # noqa: S105 (the name of QEMU's object, not what it holds)
_SECRET_OPTIONS = {"luks": "key-secret"}
_SECRET_OPTION = "encrypt.key-secret"  # noqa: S105 (of every other format)
_STANDING_ON_OTHERS = frozenset({"qcow2", "vmdk"})


@dataclass(frozen=True)
class Layer:
    """One image of a chain.

    Attributes:
        file: The image.
        format: In QEMU's words.
        statement: What it states.
        extents: The other files with its data, each as its descriptor says.
        descriptor: An open file in memory that stands for a descriptor.
    """

    file: HostFile
    format: str
    statement: Statement
    extents: tuple[tuple[Extent, HostFile], ...] = ()
    descriptor: int | None = None

    @property
    def path(self) -> Path:
        """Its name, for messages."""
        return self.file.path

    @property
    def files(self) -> list[HostFile]:
        """Every file of it, itself first."""
        return [self.file, *(file for _, file in self.extents)]


@dataclass(frozen=True)
class Arguments:
    """What follows a command of qemu-img or the options of qemu-nbd, and what the program must inherit for it."""

    words: list[str]
    descriptors: list[int] = field(default_factory=list)


def arguments(chain: Sequence[Layer], secret: HostFile | None) -> Arguments:
    """Name an image to a program.

    Args:
        chain: The image that is meant, and all below it; at least one.
        secret: Holds the passphrase of all that are encrypted.

    Raises:
        VolumeEncryptedError: One is encrypted, and there is no such file.
    """
    node: dict[str, object] | None = None
    for layer in reversed(chain):
        node = _node(layer, node)
    words, descriptors = [f"json:{json.dumps(node)}"], [fd for layer in chain for fd in _descriptors(layer)]
    locked = next((layer for layer in chain if layer.statement.encrypted), None)
    if locked is not None:
        if secret is None:
            raise VolumeEncryptedError(locked.path, "the file that holds its passphrase must be given")
        words = ["--object", f"secret,id={_SECRET},file={secret.name_for_programs}", *words]
        descriptors.append(secret.fd)
    return Arguments(words, descriptors)


def arguments_alone(layer: Layer) -> Arguments:
    """Name an image without what it stands on, and without a passphrase: enough to be asked for its size."""
    return Arguments([f"json:{json.dumps(_node(layer, None, locked=True))}"], _descriptors(layer))


def open_secret(path: Path, locked: Layer) -> HostFile:
    """Open the file that holds the passphrase of an image; it is read more than once, so it must be a regular file.

    Raises:
        VolumeEncryptedError: It cannot be opened, or is something else.
    """
    try:
        file = HostFile(path)
    except VolumeUnreadableError as error:
        raise VolumeEncryptedError(locked.path, str(error), files=(path,)) from error
    if file.is_device:
        file.close()
        raise VolumeEncryptedError(locked.path, f"{path} is not a regular file", files=(path,))
    return file


def in_memory(statement: Statement, extents: Sequence[tuple[Extent, HostFile]]) -> int:
    """Open a new descriptor in memory for a VMDK whose data lie in these files."""
    assert statement.identity is not None
    text = descriptor(statement.identity, [(extent, file.name_for_programs) for extent, file in extents])
    fd = inheritable_number(os.memfd_create("descriptor", os.MFD_CLOEXEC))
    os.write(fd, text)
    return fd


def _node(layer: Layer, below: dict[str, object] | None, *, locked: bool = False) -> dict[str, object]:
    """The image as QEMU's block layer names it."""
    in_file = layer.file.name_for_programs if layer.descriptor is None else f"/proc/self/fd/{layer.descriptor}"
    on_device = layer.file.is_device and layer.descriptor is None
    file = {"driver": "host_device" if on_device else "file", "filename": in_file}
    node: dict[str, object] = {"driver": layer.format, "file": file, **layer.statement.options}
    if layer.format in _STANDING_ON_OTHERS:
        node["backing"] = below
    if layer.statement.encrypted and not locked:
        node[_SECRET_OPTIONS.get(layer.format, _SECRET_OPTION)] = _SECRET
    return node


def _descriptors(layer: Layer) -> list[int]:
    return [*(file.fd for file in layer.files), *([] if layer.descriptor is None else [layer.descriptor])]
