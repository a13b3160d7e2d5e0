"""What can go wrong with a volume. Every error names the file; none holds a byte of its content.

::

    VolumeError
    ├── VolumeUnreadableError   missing, forbidden, not a disk image, or broken off in the middle
    ├── VolumeInUseError        another program has the image open for writing
    ├── UnknownFormatError      not one of FORMATS
    └── ComponentMissingError   a Debian package is needed for this format and is not installed
"""

from pathlib import Path


class VolumeError(Exception):
    """A volume cannot be opened or read. Nothing was written anywhere."""


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


class VolumeInUseError(VolumeError):
    """Another program, most likely a running guest, may write to the image."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is in use by another program: stop the machine that runs on it first")
        self.path = path


class UnknownFormatError(VolumeError):
    """The format is none that we read. Formats are given, never probed."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown volume format {name!r}: known are {', '.join(known)}")
        self.name = name


class ComponentMissingError(VolumeError):
    """A program or a binding that this format needs is not installed."""

    def __init__(self, component: str, package: str, reason: str = "is not installed") -> None:
        super().__init__(f"{component} {reason}: apt-get install {package}")
        self.component = component
        self.package = package
