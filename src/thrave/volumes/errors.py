"""Errors of volumes. Each error names the file; none contains a byte of its content.

    VolumeError
    ├── VolumeUnreadableError   missing, no permission, not a disk image, or a read failed
    │   └── ImageRefusedError   the image's metadata says that it is not a whole disk, or not to be trusted
    ├── VolumeChangedError      written to or replaced while it was read
    ├── VolumeUnwritableError   a new image cannot be created or written
    ├── VolumeInUseError        another program has the image open for writing
    ├── VolumeSharedError       another machine that is not off uses the same file
    ├── VolumeEncryptedError    an encrypted image without a passphrase, or with a wrong one
    ├── UnknownFormatError      not one of FORMATS
    ├── ToolNotInstalled        a required program or library is not installed
    └── SkipRefusedError        unused space cannot be determined reliably
        ├── NoFileSystemError             no NTFS volume
        ├── FileSystemUnsupportedError    BitLocker, ReFS, a dynamic disk, …
        ├── VolumeNotCleanError           dirty, hibernated, or its log was not closed
        ├── FileSystemCorruptError        the file system contradicts itself
        └── SandboxUnavailableError       the process that reads the file system cannot be confined

`str(error)` is for the operator and has whole paths. `public` is for the owner of a machine, who must not learn the
host's folders: it has only the names of files. Neither contains a control character.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path


def printable(text: str) -> str:
    """Replace each character that cannot be printed: text from an image is untrusted and may contain terminal codes."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def without_folders(text: str, files: Iterable[Path | str]) -> str:
    """Replace the path of each of the files in the text by its last component."""
    for name in sorted({str(file) for file in files}, key=len, reverse=True):
        text = text.replace(name, name.rstrip("/").rpartition("/")[2])
    return text


class VolumeError(Exception):
    """A volume cannot be opened, read or created.

    Args:
        message: For the operator.
        files: The files that the message names.

    Attributes:
        public: The message without the folders of the files, for the owner of the machine.
    """

    def __init__(self, message: str, files: Iterable[Path | str] = ()) -> None:
        super().__init__(printable(message))
        self.public = printable(without_folders(message, files))


class VolumeUnreadableError(VolumeError):
    """The content cannot be read.

    Args:
        path: The volume's file.
        reason: Why.
        offset: Where in the volume reading failed, in bytes; None if the volume could not be opened.
        files: Other files that the reason names.
    """

    def __init__(self, path: Path, reason: str, *, offset: int | None = None, files: Iterable[Path | str] = ()) -> None:
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(f"cannot read {path}{where}: {reason}", (path, *files))
        self.path = path
        self.offset = offset


class ImageRefusedError(VolumeUnreadableError):
    """The image's metadata forbids reading it as a disk; `image_rules` has the rules."""


class VolumeChangedError(VolumeError):
    """The content that was read is not a state that the disk ever had."""

    def __init__(self, path: Path, change: str) -> None:
        super().__init__(f"{path} was changed while it was read: {change}", (path,))
        self.path = path


class VolumeUnwritableError(VolumeError):
    """A new image cannot be created or written; a file that exists is incomplete."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot write {path}: {reason}", (path,))
        self.path = path


class VolumeInUseError(VolumeError):
    """Another program, most likely a running guest, may write to the image."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is in use by another program: stop the machine that runs on it first", (path,))
        self.path = path


class VolumeSharedError(VolumeError):
    """Another machine that is not off has the same file.

    Args:
        path: The file.
        users: Those machines, by the operator's names.
    """

    def __init__(self, path: Path, users: Sequence[str]) -> None:
        super().__init__(f"{path} is also a disk of {', '.join(users)}, not off: shut that down first")
        self.public = printable(f"{path.name} is also a disk of another machine, which is not off")
        self.path = path


class VolumeEncryptedError(VolumeError):
    """The image is encrypted, and there is no passphrase or a wrong one."""

    def __init__(self, path: Path, reason: str, *, files: Iterable[Path | str] = ()) -> None:
        super().__init__(f"{path} is encrypted: {reason}", (path, *files))
        self.path = path


class UnknownFormatError(VolumeError):
    """The format is not supported. The caller names the format; it is never probed."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown volume format {name!r}: known are {', '.join(known)}")
        self.name = name


class ToolNotInstalled(VolumeError):
    """A required program or library is not installed."""

    def __init__(self, component: str, package: str, *, installer: str = "apt-get install") -> None:
        super().__init__(f"{component} is not installed: {installer} {package}")
        self.component = component
        self.package = package


class SkipRefusedError(VolumeError):
    """Unused space cannot be determined reliably. Nothing is bundled.

    Attributes:
        reason: Why, without the name of the file.
    """

    def __init__(self, reason: str, path: Path | None = None) -> None:
        prefix = "" if path is None else f"{path}: "
        super().__init__(f"{prefix}cannot leave out what is unused: {reason}", () if path is None else (path,))
        self.reason = reason


class NoFileSystemError(SkipRefusedError):
    """The disk has no NTFS volume."""


class FileSystemUnsupportedError(SkipRefusedError):
    """The free space of this kind of file system cannot be determined."""


class VolumeNotCleanError(SkipRefusedError):
    """The volume was not unmounted, so its bitmap may be older than the last writes."""


class FileSystemCorruptError(SkipRefusedError):
    """The file system contradicts itself."""


class SandboxUnavailableError(SkipRefusedError):
    """The process that reads a guest's file system cannot be started, or cannot be confined on this host."""
