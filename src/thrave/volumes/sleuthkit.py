"""The Sleuth Kit's Python binding, pytsk3, with types for the little that is used of it.

It is the well-kept reader of NTFS: runs, attribute lists and damaged records are its business. It is C, and what it
reads was written by a guest; so it is only ever loaded in the process that `surveyor.py` starts.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Protocol, cast

NON_RESIDENT, ENCRYPTED, COMPRESSED, SPARSE = 0x02, 0x10, 0x20, 0x40
"""TSK_FS_ATTR_FLAG_ENUM."""

RUN_SPARSE = 0x02
"""TSK_FS_ATTR_RUN_FLAG_ENUM: the run has no clusters."""


class Source(Protocol):
    """What an image is read from."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from `offset` on, fewer only at the end."""


class Run(Protocol):
    """TSK_FS_ATTR_RUN. Addresses and lengths in clusters."""

    addr: int
    len: int
    flags: int


class AttributeInfo(Protocol):
    """TSK_FS_ATTR."""

    type: int
    id: int
    size: int
    flags: int
    name: bytes | None


class Attribute(Iterable[Run], Protocol):
    """An attribute; iterating gives its runs, none if it is resident."""

    info: AttributeInfo


class File(Iterable[Attribute], Protocol):
    """A file; iterating gives its attributes, those of its extension records among them."""

    def read_random(self, offset: int, length: int, type: int = ..., id: int = ...) -> bytes:  # noqa: A002
        """Read from an attribute, by default the unnamed $DATA."""


class FileSystem(Protocol):
    """An NTFS volume. Every call may raise OSError."""

    def open_meta(self, inode: int) -> File:
        """The file of an MFT record."""


class _Binding(Protocol):
    TSK_FS_TYPE_NTFS: int
    Img_Info: type[object]

    def FS_Info(self, image: object, offset: int, type: int) -> FileSystem:  # noqa: A002, N802 (the library's)
        """Open a file system."""


def load() -> None:
    """Import the library; what is imported lazily cannot be once this process has given up its rights."""
    import_module("pytsk3")


def open_ntfs(source: Source) -> FileSystem:
    """Open the NTFS volume that begins at the source's first byte.

    Raises:
        OSError: The library refuses it.
    """
    binding = cast("_Binding", import_module("pytsk3"))
    methods = {
        "read": lambda _, offset, length: source.read(offset, length),
        "get_size": lambda _: source.size,
    }
    image = type("SourceImage", (binding.Img_Info,), methods)(url="")
    return binding.FS_Info(image, 0, binding.TSK_FS_TYPE_NTFS)
