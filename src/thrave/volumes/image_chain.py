"""Opens an image and its backing files, and checks each before it is read.

An image's header can name other files of the host (a backing file, a data file, extents), and a program that serves the
image reads whatever is named there (CVE-2024-32498, OpenStack). A guest can write the content of its disk but not this
header, unless a program probes the format; so nothing is probed. Each image is opened once, locked and parsed; the
table in `image_rules` decides, and a file that the image refers to must be in an allowed folder (`host_files`). Then
QEMU checks each image by its open file, which detects images that are cut short; QEMU would otherwise serve those with
zeros in place of the rest.

QEMU's programs get the whole chain as JSON: each image with its format, its open files (`/proc/self/fd/N`) and its
backing image, or with none. So QEMU resolves no name in an image, and reads the files that were checked even if a name
now leads elsewhere. QEMU has no option for the files that a VMDK's descriptor names; it gets a new descriptor, in
memory, that names the open files. Only QEMU's programs read the passphrase of an encrypted image: it is never in a
command line, an error or this process.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from thrave import programs
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
from thrave.volumes.host_files import AllowedFolders, FileId, HostFile, HostFiles, to_inheritable_fd
from thrave.volumes.image_headers import ImageMetadata, Reference, VmdkExtent
from thrave.volumes.image_locks import ImageLocks
from thrave.volumes.image_rules import Decision, find_rule

PACKAGE = "qemu-utils"

MAX_CHAIN_LENGTH = 32
"""Backing files below the topmost image."""

EXTENT_LIMIT = 1024
"""Files with data of one VMDK."""

MAX_SIZE = 1 << 50  # bytes; a tiny file can claim any size, and qemu-nbd lists the holes of at most 2 GiB in one call

_TIMEOUT = 120  # seconds for one run of qemu-img; the metadata can have gigabytes on a slow disk

_CHECK_ACCEPTS = (0, 3, 63)  # qemu-img(1): 0 clean, 3 only leaked clusters, 63 the format has no check

_QEMU_ID = "passphrase"  # of QEMU's object for the passphrase
_KEY_OPTIONS = {"luks": "key-secret", "qcow2": "encrypt.key-secret"}  # the option that gets this id

_WITH_BACKING = frozenset({"qcow2", "vmdk"})

HEADER_READERS: dict[str, Callable[[HostFile], ImageMetadata]] = {
    "raw": image_headers.read_raw,
    "qcow2": image_headers.read_qcow2,
    "vhdx": vhd_headers.read_vhdx,
    "vmdk": vmdk_headers.read_vmdk,
    "vpc": vhd_headers.read_vhd,
    "luks": image_headers.read_luks,
}
"""Reads the header of an image, for each format that can be opened."""

_END_CHECKS: dict[str, Callable[[HostFile], list[tuple[str, str]]]] = {
    "qcow2": image_headers.check_qcow2_end,
    "vmdk": vmdk_headers.check_vmdk_end,
}
"""Detects a file that ends within its last data, for formats where header and `qemu-img check` do not show that."""


class ImageWarning(NamedTuple):
    """A finding about an image, as a warning for its owner; `public` contains no folder names."""

    text: str
    public: str


OnWarning = Callable[[ImageWarning], object]


@dataclass(frozen=True)
class Layer:
    """One image of a chain.

    Attributes:
        file: The image.
        format: QEMU's name of the format.
        metadata: Its parsed header.
        extents: The other files with its data, each with its extent in the descriptor.
        descriptor: File descriptor of the VMDK descriptor in memory that replaces the one in `file`; None: no extents.
    """

    file: HostFile
    format: str
    metadata: ImageMetadata
    extents: tuple[tuple[VmdkExtent, HostFile], ...] = ()
    descriptor: int | None = None

    @property
    def path(self) -> Path:
        """The name of the image, for messages."""
        return self.file.path

    @property
    def files(self) -> list[HostFile]:
        """Every file of the image, beginning with the image itself."""
        return [self.file, *(file for _, file in self.extents)]


@dataclass(frozen=True)
class ImageArguments:
    """Arguments for qemu-img or qemu-nbd that name an image, and the descriptors that the program must inherit."""

    argv: list[str]
    descriptors: list[int] = field(default_factory=list)


def image_arguments(layers: Sequence[Layer], secret: HostFile | None) -> ImageArguments:
    """Return the arguments for an image with its backing images.

    Args:
        layers: The image, then its backing images; at least one.
        secret: Contains the passphrase of all encrypted images.

    Raises:
        VolumeEncryptedError: An image is encrypted, and `secret` is None.
    """
    node: dict[str, object] | None = None
    for layer in reversed(layers):
        node = _block_node(layer, node)
    argv, descriptors = [f"json:{json.dumps(node)}"], [fd for layer in layers for fd in _descriptors(layer)]
    encrypted = next((layer for layer in layers if layer.metadata.is_encrypted), None)
    if encrypted is not None:
        if secret is None:
            raise VolumeEncryptedError(encrypted.path, "the file that holds its passphrase must be given")
        argv = ["--object", f"secret,id={_QEMU_ID},file={secret.fd_path}", *argv]
        descriptors.append(secret.fd)
    return ImageArguments(argv, descriptors)


def _block_node(layer: Layer, backing: dict[str, object] | None, *, has_key: bool = True) -> dict[str, object]:
    """Return an image as a node of QEMU's block layer (BlockdevOptions)."""
    path = layer.file.fd_path if layer.descriptor is None else f"/proc/self/fd/{layer.descriptor}"
    is_device = layer.file.is_device and layer.descriptor is None
    file = {"driver": "host_device" if is_device else "file", "filename": path}
    node: dict[str, object] = {"driver": layer.format, "file": file, **layer.metadata.options}
    if layer.format in _WITH_BACKING:
        node["backing"] = backing
    if layer.metadata.is_encrypted and has_key:
        node[_KEY_OPTIONS[layer.format]] = _QEMU_ID
    return node


def _descriptors(layer: Layer) -> list[int]:
    return [*(file.fd for file in layer.files), *([] if layer.descriptor is None else [layer.descriptor])]


class ImageChain:
    """An image and its backing images, open, with their metadata. The caller closes it.

    Args:
        path: The topmost image.
        image_format: Its format, by QEMU's name.
        directories: Folders in which files may be that it refers to, in addition to its own folder.
        reads_content: Whether the content will be read. Then each file is locked, and the rules for a machine that is
            off apply. Otherwise only the metadata is read, and the machine may run.
        interruption: Unlocks the files, and ends programs that use them, from another thread.

    Attributes:
        layers: The topmost image, then its backing images.
        warnings: Findings that the owner receives as warnings.

    Raises:
        VolumeError: An image cannot be read, locked or accepted.
    """

    def __init__(
        self,
        path: Path,
        image_format: str,
        directories: Sequence[Path] = (),
        *,
        reads_content: bool,
        interruption: Interruption | None = None,
    ) -> None:
        if image_format not in HEADER_READERS:
            raise UnknownFormatError(image_format, tuple(HEADER_READERS))
        self.warnings: list[ImageWarning] = []
        self.layers: list[Layer] = []
        self._reads_content = reads_content
        self._locks = ImageLocks()
        self.interruption = interruption or Interruption()
        self.interruption.add(self._locks.release)
        self._files = HostFiles()
        self._memory_files: list[int] = []
        try:
            self._open_layers(path, image_format, directories)
        except BaseException:
            self.close()
            raise

    @property
    def file_ids(self) -> list[FileId]:
        """Every file of the volume."""
        return [file.id for layer in self.layers for file in layer.files]

    @property
    def written_ids(self) -> list[FileId]:
        """The files to which the machine writes: those of the topmost image."""
        return [file.id for file in self.layers[0].files]

    def check_images(self, secret_file: Path | None) -> HostFile | None:
        """Check each image with QEMU.

        Returns:
            The open file with the passphrase; None if no image is encrypted, or there is no `secret_file`.

        Raises:
            VolumeError: With the reason and the image.
        """
        secret = None
        encrypted = next((layer for layer in self.layers if layer.metadata.is_encrypted), None)
        if encrypted is not None and secret_file is not None:
            secret = self._open_secret(secret_file, encrypted)
        for depth in range(len(self.layers)):
            _check_image(self.layers[depth:], secret, secret_file, self.interruption)
        for layer in self.layers:
            for file in layer.files:
                if (check_end := _END_CHECKS.get(layer.format)) is not None:
                    self._apply_rules(layer, file, check_end(file))
        for layer in self.layers[1:]:  # for the topmost image the driver compares the size that qemu-nbd serves
            if layer.format != "raw":
                check_size(layer, _read_virtual_size(layer, self.interruption))
        return secret

    def check_unchanged(self) -> None:
        """Compare every file with its state when it was opened. Raises VolumeChangedError."""
        self._files.check_unchanged()

    def close(self) -> None:
        """Unlock and close every file. May be called again."""
        self._locks.release()
        self._files.close()
        while self._memory_files:
            os.close(self._memory_files.pop())

    def _open_layers(self, path: Path, image_format: str, directories: Sequence[Path]) -> None:
        top = self._open(path, None)
        folders = AllowedFolders(None if top.is_device else top.real_path.parent, directories)
        file: HostFile | None = top
        for _ in range(MAX_CHAIN_LENGTH + 1):
            if file is None:
                break
            layer = self._read_layer(file, image_format, folders)
            self._check_parent_id(layer)
            self.layers.append(layer)
            file, backing = None, layer.metadata.backing
            if backing is not None:
                image_format = _backing_format(layer, backing)
                file = self._open(_resolve(layer, backing.name), folders)
        if file is not None:
            raise VolumeUnreadableError(path, f"it has more than {MAX_CHAIN_LENGTH} backing files")

    def _open(self, path: Path, folders: AllowedFolders | None) -> HostFile:
        file = self._files.open(path, folders, detect_changes=self._reads_content)
        if self._reads_content:
            self._locks.lock(file)
        return file

    def _open_secret(self, path: Path, encrypted: Layer) -> HostFile:
        """Open the file with the passphrase. It is read more than once, so it must be a regular file."""
        try:
            file = self._files.open(path)
        except VolumeUnreadableError as error:
            raise VolumeEncryptedError(encrypted.path, str(error), files=(path,)) from error
        if file.is_device:
            raise VolumeEncryptedError(encrypted.path, f"{path} is not a regular file", files=(path,))
        return file

    def _read_layer(self, file: HostFile, image_format: str, folders: AllowedFolders) -> Layer:
        metadata = HEADER_READERS[image_format](file)
        layer = Layer(file, image_format, metadata)
        self._apply_rules(layer, file, metadata.findings)
        if image_format != "vmdk" or not metadata.extents or file.read(0, 4) == b"KDMV":
            return layer
        if len(metadata.extents) > EXTENT_LIMIT:
            raise VolumeUnreadableError(file.path, f"it names more than {EXTENT_LIMIT} files")
        extents = tuple((extent, self._open_extent(layer, extent, folders)) for extent in metadata.extents)
        assert metadata.identity is not None
        named_extents = [(extent, extent_file.fd_path) for extent, extent_file in extents]
        descriptor = to_inheritable_fd(os.memfd_create("descriptor", os.MFD_CLOEXEC))
        self._memory_files.append(descriptor)
        os.write(descriptor, vmdk_headers.format_descriptor(metadata.identity, named_extents))
        return Layer(file, image_format, metadata, extents, descriptor)

    def _open_extent(self, layer: Layer, extent: VmdkExtent, folders: AllowedFolders) -> HostFile:
        file = self._open(_resolve(layer, extent.name), folders)
        self._apply_rules(layer, file, vmdk_headers.read_extent(file, extent))
        return file

    def _apply_rules(self, layer: Layer, file: HostFile, findings: Sequence[tuple[str, str]]) -> None:
        """Refuse a file, or record a warning, as the rules for its findings say."""
        for name, details in findings:
            rule = find_rule(layer.format, name)
            if rule.is_normal_while_running and not self._reads_content:
                continue
            reason = f"{rule.reason} ({details})" if details else rule.reason
            if rule.decision is Decision.REFUSE:
                raise ImageRefusedError(file.path, reason)
            if rule.decision is Decision.WARN:
                self.warnings.append(ImageWarning(f"{file.path}: {reason}", f"{file.path.name}: {reason}"))

    def _check_parent_id(self, layer: Layer) -> None:
        """Check that the VMDK above `layer`, if there is one, was created on this content of `layer`."""
        if not self.layers or self.layers[-1].format != "vmdk" or layer.metadata.identity is None:
            return
        child = self.layers[-1].metadata.identity
        if child is not None and child.parent_id != layer.metadata.identity.content_id:
            self._apply_rules(self.layers[-1], self.layers[-1].file, [("parent was changed", "")])


def _backing_format(layer: Layer, backing: Reference) -> str:
    if backing.format is None:
        raise ImageRefusedError(layer.path, find_rule(layer.format, "backing file without a format").reason)
    if backing.format not in HEADER_READERS:
        reason = find_rule(layer.format, "image of another format").reason
        raise ImageRefusedError(layer.path, f"{reason} ({backing.format})")
    return backing.format


def _resolve(layer: Layer, name: str) -> Path:
    """Return the path for a name in an image, by QEMU's rule: relative to the folder of the name used for the image."""
    if image_headers.has_protocol(name):
        reason = find_rule(layer.format, "other protocol").reason
        raise ImageRefusedError(layer.path, f"{reason} ({name})", files=(name,))
    return layer.path.parent / name


def find_program(name: str) -> str:
    """Return the full path of one of QEMU's programs.

    Raises:
        ToolNotInstalled: It is not on PATH.
    """
    path = shutil.which(name)
    if path is None:
        raise ToolNotInstalled(name, PACKAGE)
    return path


def check_size(layer: Layer, size: int) -> None:
    """Compare the size that QEMU reads, in bytes, with MAX_SIZE and with the header. Raises ImageRefusedError."""
    if size > MAX_SIZE:
        raise ImageRefusedError(layer.path, f"{find_rule(layer.format, 'too large').reason} ({size} bytes)")
    header_size = layer.metadata.size
    if header_size is not None and header_size != size:
        reason = find_rule(layer.format, "another size").reason
        raise ImageRefusedError(layer.path, f"{reason} ({header_size} bytes and {size})")


def _read_virtual_size(layer: Layer, interruption: Interruption) -> int:
    # Without backing image and passphrase, which the size does not need.
    image = ImageArguments([f"json:{json.dumps(_block_node(layer, None, has_key=False))}"], _descriptors(layer))
    finished = _run_qemu_img(layer, "info", ["--output=json"], image, interruption)
    if finished.status:
        raise _error_from(layer, finished)
    size: int = json.loads(finished.out)["virtual-size"]
    return size


def _check_image(
    layers: Sequence[Layer], secret: HostFile | None, secret_file: Path | None, interruption: Interruption
) -> None:
    finished = _run_qemu_img(layers[0], "check", ["-q"], image_arguments(layers, secret), interruption)
    if finished.status not in _CHECK_ACCEPTS:
        raise _error_from(layers[0], finished, secret_file)


def _run_qemu_img(
    layer: Layer, command: str, options: list[str], image: ImageArguments, interruption: Interruption
) -> programs.FinishedProgram:
    argv = [find_program("qemu-img"), command, *options, *image.argv]

    def check_interruption(_seconds: float) -> None:
        if interruption.is_requested:
            raise VolumeUnreadableError(layer.path, "reading was interrupted")

    try:
        return programs.run(
            argv,
            timeout=_TIMEOUT,
            max_memory=programs.MAX_MEMORY,
            pass_fds=image.descriptors,
            pause=check_interruption,
        )
    except programs.ProgramTimeoutError as error:
        raise VolumeUnreadableError(layer.path, f"qemu-img {command} took more than {_TIMEOUT} seconds") from error
    except programs.ProgramError as error:
        raise VolumeUnreadableError(layer.path, f"qemu-img {command} {error.reason}") from error


def _error_from(layer: Layer, finished: programs.FinishedProgram, secret_file: Path | None = None) -> VolumeError:
    if '"write" lock' in finished.error_text:
        return VolumeInUseError(layer.path)
    if "Invalid password" in finished.error_text:
        return VolumeEncryptedError(
            layer.path,
            f"the passphrase in {secret_file} does not decrypt it. Each byte of the file is used, "
            "also a newline at the end",
            files=(secret_file or "",),
        )
    lines = (finished.error_text or finished.text).strip().splitlines() or [f"qemu-img ended with {finished.status}"]
    reason = lines[0].removeprefix("qemu-img: ")
    if reason.startswith("Could not open 'json:"):  # QEMU repeats the JSON of the image before its reason
        reason = reason.rpartition("}': ")[2]
    return VolumeUnreadableError(layer.path, reason)
