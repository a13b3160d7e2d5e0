"""What can go wrong with a volume. Every error names the file; none holds a byte of its content.

::

    VolumeError
    ├── VolumeUnreadableError   missing, forbidden, not a disk image, or broken off in the middle
    │   └── ImageRefusedError   the image itself says that it is not the whole disk, or not to be trusted
    ├── VolumeChangedError      it was written to or replaced while it was read
    ├── VolumeUnwritableError   a new image cannot be made or written
    ├── VolumeInUseError        another program has the image open for writing
    ├── VolumeSharedError       another machine that is not off has the same file
    ├── VolumeEncryptedError    an encrypted image, and no passphrase that opens it
    ├── UnknownFormatError      not one of FORMATS
    ├── ComponentMissingError   a package is needed for what was asked for and is not installed
    └── SkipRefusedError        what a volume does not use was to be left out, and cannot be told for certain
        ├── NoFileSystemError             there is no NTFS on it
        ├── FileSystemUnsupportedError    BitLocker, ReFS, a dynamic disk, …
        ├── VolumeNotCleanError           dirty, hibernated, or its log was not closed
        ├── FileSystemCorruptError        it contradicts itself
        └── SandboxUnavailableError       the process that reads it cannot be confined

`str` is for the operator, with whole paths. `public` is for the owner of a machine, who must not learn how the host's
folders are arranged: of each file it has the name only. Neither has a character that a terminal would act upon.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path


def printable(text: str) -> str:
    """The text with a replacement character for each that cannot be printed: an image's words are a stranger's."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def without_folders(text: str, files: Iterable[Path | str]) -> str:
    """The text with the last component alone of each of the files that it names."""
    for name in sorted({str(file) for file in files}, key=len, reverse=True):
        text = text.replace(name, name.rstrip("/").rpartition("/")[2])
    return text


class VolumeError(Exception):
    """A volume cannot be opened, read or made.

    Args:
        message: For the operator.
        files: The files that the message names.

    Attributes:
        public: The message with the names of files alone, for the owner of the machine.
    """

    def __init__(self, message: str, files: Iterable[Path | str] = ()) -> None:
        super().__init__(printable(message))
        self.public = printable(without_folders(message, files))


class VolumeUnreadableError(VolumeError):
    """The bytes cannot be had.

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
    """The image says of itself what forbids reading it as a disk: see `marks`."""


class VolumeChangedError(VolumeError):
    """What was read is no state that the disk ever had."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} was changed while it was read: {what}", (path,))
        self.path = path


class VolumeUnwritableError(VolumeError):
    """A new image cannot be made or written; what there is of it is of no use."""

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
        users: What the operator calls those machines.
    """

    def __init__(self, path: Path, users: Sequence[str]) -> None:
        super().__init__(f"{path} is also a disk of {', '.join(users)}, not off: shut that down first")
        self.public = printable(f"{path.name} is also a disk of another machine, which is not off")
        self.path = path


class VolumeEncryptedError(VolumeError):
    """The image is encrypted, and there is no passphrase, or it is another one's."""

    def __init__(self, path: Path, reason: str, *, files: Iterable[Path | str] = ()) -> None:
        super().__init__(f"{path} is encrypted: {reason}", (path, *files))
        self.path = path


class UnknownFormatError(VolumeError):
    """The format is none that we read. Formats are given, never probed."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown volume format {name!r}: known are {', '.join(known)}")
        self.name = name


class ToolNotInstalled(VolumeError):
    """A program or a library that is needed for what was asked for is not installed."""

    def __init__(self, component: str, package: str, *, installer: str = "apt-get install") -> None:
        super().__init__(f"{component} is not installed: {installer} {package}")
        self.component = component
        self.package = package


class SkipRefusedError(VolumeError):
    """What the volume does not use cannot be told for certain, so nothing is left out and nothing is bundled.

    Attributes:
        reason: Why, without the name of the file.
    """

    def __init__(self, reason: str, path: Path | None = None) -> None:
        about = "" if path is None else f"{path}: "
        super().__init__(f"{about}cannot leave out what is unused: {reason}", () if path is None else (path,))
        self.reason = reason


class NoFileSystemError(SkipRefusedError):
    """There is no NTFS volume where one was looked for."""


class FileSystemUnsupportedError(SkipRefusedError):
    """It is of a kind whose free space cannot be told."""


class VolumeNotCleanError(SkipRefusedError):
    """Its bitmap may lag behind what was written last."""


class FileSystemCorruptError(SkipRefusedError):
    """It contradicts itself; it is not guessed which side is right."""


class SandboxUnavailableError(SkipRefusedError):
    """The process that reads a guest's file system cannot be started, or cannot be confined on this host."""
