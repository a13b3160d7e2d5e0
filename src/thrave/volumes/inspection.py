"""What is looked at before an image is read: the image itself and every image and file that it stands on.

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
from pathlib import Path
from typing import NamedTuple

from thrave import programs
from thrave.programs import Finished
from thrave.volumes import chain, headers, vhd, vmdk
from thrave.volumes.chain import Arguments, Layer
from thrave.volumes.errors import (
    ComponentMissingError,
    ImageRefusedError,
    UnknownFormatError,
    VolumeEncryptedError,
    VolumeError,
    VolumeInUseError,
    VolumeUnreadableError,
)
from thrave.volumes.headers import Extent, Reference
from thrave.volumes.hostfile import FileId, HostFile, HostFiles, Places
from thrave.volumes.interruption import Interruption
from thrave.volumes.locking import ImageLocks
from thrave.volumes.marks import Decision, row

PACKAGE = "qemu-utils"
CHAIN_LIMIT = 32
EXTENT_LIMIT = 1024
MAX_SIZE = 1 << 50  # bytes; qemu-nbd is asked for the holes of 2 GiB at a time, and a tiny file can claim any size
_SECONDS = 120  # for one look at one image; its metadata can be gigabytes on a slow disk
_CHECK_ACCEPTS = (0, 3, 63)  # qemu-img(1): 0 clean, 3 only leaked clusters, 63 the format has no check

READERS: dict[str, headers.Reader] = {
    "raw": headers.read_raw,
    "qcow2": headers.read_qcow2,
    "vhdx": vhd.read_vhdx,
    "vmdk": vmdk.read_vmdk,
    "vpc": vhd.read_vhd,
    "luks": headers.read_luks,
}
"""What reads the header of an image of each format that can be opened."""

ENDS: dict[str, Callable[[HostFile], list[tuple[str, str]]]] = {
    "qcow2": headers.read_qcow2_end,
    "vmdk": vmdk.read_end,
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
            secret = chain.open_secret(secret_file, locked)
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
        places = Places(None if top.is_device else top.real.parent, self._directories)
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

    def _open(self, path: Path, places: Places | None) -> HostFile:
        file = self._files.open(path, places, to_compare=self._to_read)
        if self._to_read:
            self._locks.take(file)
        return file

    def _layer(self, file: HostFile, image_format: str, places: Places) -> Layer:
        statement = READERS[image_format](file)
        layer = Layer(file, image_format, statement)
        self._judge(layer, file, statement.marks)
        if image_format != "vmdk" or not statement.extents or file.read(0, 4) == b"KDMV":
            return layer
        if len(statement.extents) > EXTENT_LIMIT:
            raise VolumeUnreadableError(file.path, f"it names more than {EXTENT_LIMIT} files")
        extents = tuple((extent, self._extent(layer, extent, places)) for extent in statement.extents)
        descriptor = chain.in_memory(statement, extents)
        self._memory.append(descriptor)
        return Layer(file, image_format, statement, extents, descriptor)

    def _extent(self, layer: Layer, extent: Extent, places: Places) -> HostFile:
        file = self._open(self._named(layer, extent.name), places)
        self._judge(layer, file, vmdk.read_extent(file, extent))
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
        if headers.names_a_protocol(name):
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
        raise ComponentMissingError(name, PACKAGE)
    return found


def check_size(layer: Layer, read: int) -> None:
    """Compare the size that QEMU reads with MAX_SIZE and with the stated one. Raises ImageRefusedError."""
    if read > MAX_SIZE:
        raise ImageRefusedError(layer.path, f"{row(layer.format, 'too large').reason} ({read} bytes)")
    stated = layer.statement.size
    if stated is not None and stated != read:
        raise ImageRefusedError(layer.path, f"{row(layer.format, 'another size').reason} ({stated} bytes and {read})")


def _virtual_size(layer: Layer, interruption: Interruption) -> int:
    done = _qemu_img(layer, "info", ["--output=json"], chain.arguments_alone(layer), interruption)
    if done.status:
        raise _failure(layer, done)
    size: int = json.loads(done.out)["virtual-size"]
    return size


def _check(
    layers: Sequence[Layer], secret: HostFile | None, secret_file: Path | None, interruption: Interruption
) -> None:
    done = _qemu_img(layers[0], "check", ["-q"], chain.arguments(layers, secret), interruption)
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
