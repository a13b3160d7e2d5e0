"""A chain of images, the one that is read and those that it stands on, and how QEMU's programs are told of it.

The whole graph is named, as JSON: each image with its format, its files, and what it stands on, and for one that stands
on nothing that too. Every file is a descriptor that is open already (`/proc/self/fd/N`), so QEMU follows no name that
is written in an image, and reads what was inspected even if a name leads elsewhere by now. QEMU has no option for the
files that a VMDK's descriptor names: it gets a new descriptor, in memory, that names the open files. The passphrase of
an encrypted image is read by QEMU's programs alone: it is never in a command line, an error or this process.

What is looked at before an image is read: the image itself and every image and file that it stands on.

An image's header can name other files of the host (a backing file, a data file, extents), and the program that serves
it reads whatever is named there (CVE-2024-32498, OpenStack). A guest can write its disk's content but not that header,
unless a format is probed; so nothing is probed. Each image is opened once, locked, and asked what it states; the table
`marks` decides; a file that it refers to must lie where it may (`hostfile`). Then QEMU checks each image, by its open
file: that finds images that are cut short, which QEMU would otherwise serve with zeros in place of the rest.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from thrave import programs
from thrave.programs import Finished
from thrave.volumes import image_headers, vhd_headers, vmdk_headers
from thrave.volumes.base import Interruption
from thrave.volumes.errors import (
    ImageRefusedError,
    ToolNotInstalled,
    UnknownFormatError,
    VolumeEncryptedError,
    VolumeError,
    VolumeInUseError,
    VolumeUnreadableError,
)
from thrave.volumes.host_files import AllowedFolders, FileId, HostFile, HostFiles, inheritable_number
from thrave.volumes.image_headers import Extent, Reference, Statement
from thrave.volumes.image_locks import ImageLocks
from thrave.volumes.image_rules import Decision, row
from thrave.volumes.vmdk_headers import descriptor

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


PACKAGE = "qemu-utils"


CHAIN_LIMIT = 32


EXTENT_LIMIT = 1024


MAX_SIZE = 1 << 50  # bytes; qemu-nbd is asked for the holes of 2 GiB at a time, and a tiny file can claim any size


_SECONDS = 120  # for one look at one image; its metadata can be gigabytes on a slow disk


_CHECK_ACCEPTS = (0, 3, 63)  # qemu-img(1): 0 clean, 3 only leaked clusters, 63 the format has no check


READERS: dict[str, image_headers.Reader] = {
    "raw": image_headers.read_raw,
    "qcow2": image_headers.read_qcow2,
    "vhdx": vhd_headers.read_vhdx,
    "vmdk": vmdk_headers.read_vmdk,
    "vpc": vhd_headers.read_vhd,
    "luks": image_headers.read_luks,
}
"""What reads the header of an image of each format that can be opened."""


ENDS: dict[str, Callable[[HostFile], list[tuple[str, str]]]] = {
    "qcow2": image_headers.read_qcow2_end,
    "vmdk": vmdk_headers.read_end,
}
"""What finds that a file ends within its last data, where neither its header nor `qemu-img check` tells."""


class Warned(NamedTuple):
    """A mark of an image that its owner is told of; `public` without the names of folders."""

    text: str
    public: str


class Inspection:
    """The files of one volume, open, and what they state. Close it in the end.

    Args:
        path: The topmost image.
        image_format: Its format, in QEMU's words.
        directories: Where files may lie that it refers to, besides its own folder.
        to_read: Lock every file, and judge as of a machine that is off; else only look, though the machine may run.
        interruption: Unlocks the files, and ends programs that are looking at them, from another thread.
    """

    def __init__(
        self,
        path: Path,
        image_format: str,
        directories: Sequence[Path] = (),
        *,
        to_read: bool,
        interruption: Interruption | None = None,
    ) -> None:
        if image_format not in READERS:
            raise UnknownFormatError(image_format, tuple(READERS))
        self.path = path
        self.warnings: list[Warned] = []
        self.layers: list[Layer] = []
        self._directories = directories
        self._to_read = to_read
        self._locks = ImageLocks()
        self.interruption = interruption or Interruption()
        self.interruption.add(self._locks.close)
        self._files = HostFiles()
        self._memory: list[int] = []
        try:
            self._walk(path, image_format)
        except BaseException:
            self.close()
            raise

    @property
    def file_ids(self) -> list[FileId]:
        """Which files the volume lies in; those that its machine writes to come first, see `written_ids`."""
        return [file.id for layer in self.layers for file in layer.files]

    @property
    def written_ids(self) -> list[FileId]:
        """Which of them its machine writes to: those of the topmost image."""
        return [file.id for file in self.layers[0].files]

    def check(self, secret_file: Path | None) -> HostFile | None:
        """Have QEMU check each image.

        Returns:
            The open file with the passphrase, if one is needed.

        Raises:
            VolumeError: With the reason, and the image that it is about.
        """
        secret = None
        locked = next((layer for layer in self.layers if layer.statement.encrypted), None)
        if locked is not None and secret_file is not None:
            secret = open_secret(secret_file, locked)
            self._files.opened.append(secret)
        for depth in range(len(self.layers)):
            _check(self.layers[depth:], secret, secret_file, self.interruption)
        for layer in self.layers:
            for file in layer.files:
                if (read_end := ENDS.get(layer.format)) is not None:
                    self._judge(layer, file, read_end(file))
        for layer in self.layers[1:]:  # of the topmost one the size is seen when it is served
            if layer.format != "raw":
                check_size(layer, _virtual_size(layer, self.interruption))
        return secret

    def check_unchanged(self) -> None:
        """Compare every file with what it was when it was opened. Raises VolumeChangedError."""
        self._files.check_unchanged()

    def close(self) -> None:
        """Unlock and close every file. May be said again."""
        self._locks.close()
        self._files.close()
        while self._memory:
            os.close(self._memory.pop())

    def _walk(self, path: Path, image_format: str) -> None:
        top = self._open(path, None)
        places = AllowedFolders(None if top.is_device else top.real.parent, self._directories)
        file: HostFile | None = top
        for _ in range(CHAIN_LIMIT + 1):
            if file is None:
                break
            layer = self._layer(file, image_format, places)
            self._judge_parent(layer)
            self.layers.append(layer)
            file, backing = None, layer.statement.backing
            if backing is not None:
                image_format = self._format_of(layer, backing)
                file = self._open(self._named(layer, backing.name), places)
        if file is not None:
            raise VolumeUnreadableError(path, f"it stands on more than {CHAIN_LIMIT} images")

    def _open(self, path: Path, places: AllowedFolders | None) -> HostFile:
        file = self._files.open(path, places, to_compare=self._to_read)
        if self._to_read:
            self._locks.take(file)
        return file

    def _layer(self, file: HostFile, image_format: str, places: AllowedFolders) -> Layer:
        statement = READERS[image_format](file)
        layer = Layer(file, image_format, statement)
        self._judge(layer, file, statement.marks)
        if image_format != "vmdk" or not statement.extents or file.read(0, 4) == b"KDMV":
            return layer
        if len(statement.extents) > EXTENT_LIMIT:
            raise VolumeUnreadableError(file.path, f"it names more than {EXTENT_LIMIT} files")
        extents = tuple((extent, self._extent(layer, extent, places)) for extent in statement.extents)
        descriptor = in_memory(statement, extents)
        self._memory.append(descriptor)
        return Layer(file, image_format, statement, extents, descriptor)

    def _extent(self, layer: Layer, extent: Extent, places: AllowedFolders) -> HostFile:
        file = self._open(self._named(layer, extent.name), places)
        self._judge(layer, file, vmdk_headers.read_extent(file, extent))
        return file

    def _judge(self, layer: Layer, file: HostFile, marks: Sequence[tuple[str, str]]) -> None:
        """Refuse a file, or note what its owner is told, by the table."""
        for name, particulars in marks:
            mark = row(layer.format, name)
            if mark.while_running and not self._to_read:
                continue
            why = f"{mark.reason} ({particulars})" if particulars else mark.reason
            if mark.decision is Decision.REFUSE:
                raise ImageRefusedError(file.path, why)
            if mark.decision is Decision.WARN:
                self.warnings.append(Warned(f"{file.path}: {why}", f"{file.path.name}: {why}"))

    def _judge_parent(self, layer: Layer) -> None:
        """A VMDK and its parent must belong together."""
        if not self.layers or self.layers[-1].format != "vmdk" or layer.statement.identity is None:
            return
        child = self.layers[-1].statement.identity
        if child is not None and child.parent_id != layer.statement.identity.content_id:
            self._judge(self.layers[-1], self.layers[-1].file, [("parent was changed", "")])

    def _format_of(self, layer: Layer, backing: Reference) -> str:
        if backing.format is None:
            raise ImageRefusedError(layer.path, row(layer.format, "backing file without a format").reason)
        if backing.format not in READERS:
            why = row(layer.format, "image of another format").reason
            raise ImageRefusedError(layer.path, f"{why} ({backing.format})")
        return backing.format

    def _named(self, layer: Layer, name: str) -> Path:
        """The path that an image means by a name: QEMU's rule, from the folder by whose name the image was found."""
        if image_headers.names_a_protocol(name):
            why = row(layer.format, "other protocol").reason
            raise ImageRefusedError(layer.path, f"{why} ({name})", files=(name,))
        return layer.path.parent / name


def program(name: str) -> str:
    """The full path of one of QEMU's programs.

    Raises:
        ComponentMissingError: It is not on PATH.
    """
    found = shutil.which(name)
    if found is None:
        raise ToolNotInstalled(name, PACKAGE)
    return found


def check_size(layer: Layer, read: int) -> None:
    """Compare the size that QEMU reads with MAX_SIZE and with the stated one. Raises ImageRefusedError."""
    if read > MAX_SIZE:
        raise ImageRefusedError(layer.path, f"{row(layer.format, 'too large').reason} ({read} bytes)")
    stated = layer.statement.size
    if stated is not None and stated != read:
        raise ImageRefusedError(layer.path, f"{row(layer.format, 'another size').reason} ({stated} bytes and {read})")


def _virtual_size(layer: Layer, interruption: Interruption) -> int:
    done = _qemu_img(layer, "info", ["--output=json"], arguments_alone(layer), interruption)
    if done.status:
        raise _failure(layer, done)
    size: int = json.loads(done.out)["virtual-size"]
    return size


def _check(
    layers: Sequence[Layer], secret: HostFile | None, secret_file: Path | None, interruption: Interruption
) -> None:
    done = _qemu_img(layers[0], "check", ["-q"], arguments(layers, secret), interruption)
    if done.status not in _CHECK_ACCEPTS:
        raise _failure(layers[0], done, secret_file)


def _qemu_img(layer: Layer, command: str, options: list[str], image: Arguments, interruption: Interruption) -> Finished:
    argv = [program("qemu-img"), command, *options, *image.words]

    def go_on(_seconds: float) -> None:
        if interruption.is_requested:
            raise VolumeUnreadableError(layer.path, "nobody waits for it any more")

    try:
        return programs.run(
            argv, timeout=_SECONDS, max_memory=programs.MAX_MEMORY, pass_fds=image.descriptors, pause=go_on
        )
    except programs.ProgramTimeoutError as error:
        raise VolumeUnreadableError(layer.path, f"qemu-img {command} took more than {_SECONDS} seconds") from error
    except programs.ProgramError as error:
        raise VolumeUnreadableError(layer.path, f"qemu-img {command} {error.reason}") from error


def _failure(layer: Layer, done: Finished, secret_file: Path | None = None) -> VolumeError:
    if '"write" lock' in done.error_text:
        return VolumeInUseError(layer.path)
    if "Invalid password" in done.error_text:
        return VolumeEncryptedError(
            layer.path,
            f"what {secret_file} holds does not open it; every byte counts, also a newline at the end",
            files=(secret_file or "",),
        )
    lines = (done.error_text or done.text).strip().splitlines() or [f"qemu-img ended with {done.status}"]
    return VolumeUnreadableError(layer.path, _own_words(lines[0]))


def _own_words(line: str) -> str:
    """What QEMU says, without the JSON by which it was told of the image."""
    said = line.removeprefix("qemu-img: ")
    return said.rpartition("}': ")[2] if said.startswith("Could not open 'json:") else said


Warn = Callable[[Warned], object]
