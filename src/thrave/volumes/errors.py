"""What can go wrong with a volume. Every error names the file; none holds a byte of its content.

::

    VolumeError
    ├── VolumeUnreadableError   missing, forbidden, not a disk image, or broken off in the middle
    ├── VolumeUnwritableError   a new image cannot be made or written
    ├── VolumeInUseError        another program has the image open for writing
    ├── VolumeEncryptedError    an encrypted image, and no passphrase that opens it
    ├── UnknownFormatError      not one of FORMATS
    ├── ComponentMissingError   a package is needed for what was asked for and is not installed
    └── SkipRefusedError        what a volume does not use was to be left out, and cannot be told for certain
        ├── NoFileSystemError             there is no NTFS on it
        ├── FileSystemUnsupportedError    BitLocker, ReFS, a dynamic disk, …
        ├── VolumeNotCleanError           dirty, hibernated, or its log was not closed
        ├── FileSystemCorruptError        it contradicts itself
        └── SandboxUnavailableError       the process that reads it cannot be confined
"""

from pathlib import Path


class VolumeError(Exception):
    """A volume cannot be opened, read or made."""


class VolumeUnreadableError(VolumeError):
    """The bytes cannot be had.

    Attributes:
        path: the volume's file.
        offset: where in the volume reading failed, in bytes; None if the volume could not be opened.
    """

    def __init__(self, path: Path, reason: str, *, offset: int | None = None) -> None:
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(f"cannot read {path}{where}: {reason}")
        self.path = path
        self.offset = offset


class VolumeUnwritableError(VolumeError):
    """A new image cannot be made or written; what there is of it is of no use."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot write {path}: {reason}")
        self.path = path


class VolumeInUseError(VolumeError):
    """Another program, most likely a running guest, may write to the image."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is in use by another program: stop the machine that runs on it first")
        self.path = path


class VolumeEncryptedError(VolumeError):
    """The image is encrypted, and there is no passphrase, or it is another one's."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is encrypted: {reason}")
        self.path = path


class UnknownFormatError(VolumeError):
    """The format is none that we read. Formats are given, never probed."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown volume format {name!r}: known are {', '.join(known)}")
        self.name = name


class ComponentMissingError(VolumeError):
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
        super().__init__(f"{about}cannot leave out what is unused: {reason}")
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
