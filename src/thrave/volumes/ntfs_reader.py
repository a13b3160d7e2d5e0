"""The Sleuth Kit's Python binding, pytsk3, with types for the little that is used of it.

It is the well-kept reader of NTFS: runs, attribute lists and damaged records are its business. It is C, and what it
reads was written by a guest; so it is only ever loaded in the process that `surveyor.py` starts.

An NTFS volume as records, attributes and runs: The Sleuth Kit, with its mishaps turned into our errors.

Whatever the library cannot read, or reads in part, is a corrupt file system here. Nothing is decided here; `survey.py`
does that.
"""

import codecs
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple, Protocol, cast

from thrave.volumes.errors import FileSystemCorruptError
from thrave.volumes.ntfs_format import BootSector

NON_RESIDENT, ENCRYPTED, COMPRESSED, SPARSE = 0x02, 0x10, 0x20, 0x40
"""TSK_FS_ATTR_FLAG_ENUM."""


RUN_SPARSE = 0x02
"""TSK_FS_ATTR_RUN_FLAG_ENUM: the run has no clusters."""


class Source(Protocol):
    """What an image is read from."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from `offset` on, fewer only at the end."""


class TskRun(Protocol):
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


class Attribute(Iterable[TskRun], Protocol):
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


MFT, LOG_FILE, VOLUME, ROOT, BITMAP = 0, 2, 3, 5, 6
"""Numbers of MFT records that every volume has."""


MOST_CONTENT = 4096
"""Bytes of a small attribute that are read."""


_FILE_NAME, _VOLUME_INFORMATION, _DATA = 0x30, 0x70, 0x80  # attribute types


_DOS_NAME = 2


_MOST_RUNS = 1 << 20  # of one attribute


_PIECE = 1 << 20  # bytes of $MFT that are read together


_utf_16 = codecs.getdecoder("utf-16-le")  # here: a surveyor cannot import a codec any more


class Name(NamedTuple):
    """One of a file's names, other than the short one that DOS would see."""

    folder: int
    """The folder's MFT record."""
    name: str


class ClusterRun(NamedTuple):
    """A run of clusters that an attribute occupies."""

    first: int
    length: int


class NtfsFile:
    """The file of one MFT record."""

    def __init__(self, number: int, file: File) -> None:
        """Load its attributes."""
        self.number = number
        self._file = file
        with self._reading():
            self._attributes = list(file)

    @property
    def size(self) -> int:
        """Bytes of its content."""
        return self._data().info.size

    @property
    def is_plain(self) -> bool:
        """Whether its content is stored in clusters just as it is: not in the record, compressed, sparse, encrypted."""
        special = ENCRYPTED | COMPRESSED | SPARSE
        return int(self._data().info.flags) & (special | NON_RESIDENT) == NON_RESIDENT

    def read(self, offset: int, length: int) -> bytes:
        """That part of its content."""
        with self._reading():
            content = self._file.read_random(offset, length)
        if len(content) != length:
            raise FileSystemCorruptError(f"the content of MFT record {self.number} ends too early")
        return content

    def runs(self) -> Iterator[ClusterRun]:
        """The clusters of all its attributes."""
        for attribute in self._attributes:
            yield from self._runs(attribute)

    def content_runs(self) -> list[ClusterRun]:
        """Those of its content alone."""
        return list(self._runs(self._data()))

    def names(self) -> list[Name]:
        """Every name that it has in any folder."""
        contents = [self._content(found) for found in self._attributes if int(found.info.type) == _FILE_NAME]
        if any(len(content) < 66 for content in contents):
            raise FileSystemCorruptError(f"a name of MFT record {self.number} is cut short")
        return [
            Name(
                int.from_bytes(content[:6], "little"),
                _utf_16(content[66 : 66 + 2 * content[64]], "replace")[0],
            )
            for content in contents
            if content[65] != _DOS_NAME
        ]

    def root_names(self) -> list[str]:
        """Those of its names that it has in the root folder, in lower case; of any other an empty one."""
        return [name.lower() if folder == ROOT else "" for folder, name in self.names()]

    def volume_flags(self) -> int:
        """The flags in $VOLUME_INFORMATION, which only $Volume has."""
        said = [self._content(found) for found in self._attributes if int(found.info.type) == _VOLUME_INFORMATION]
        if [len(content) for content in said] != [12]:
            raise FileSystemCorruptError("$Volume does not say in which state the volume is")
        return int.from_bytes(said[0][10:], "little")

    def _data(self) -> Attribute:
        for attribute in self._attributes:
            if int(attribute.info.type) == _DATA and not attribute.info.name:
                return attribute
        raise FileSystemCorruptError(f"MFT record {self.number} has no content")

    def _runs(self, attribute: Attribute) -> Iterator[ClusterRun]:
        with self._reading():
            for number, run in enumerate(attribute):
                if int(run.flags) & ~RUN_SPARSE or number > _MOST_RUNS:
                    raise FileSystemCorruptError(f"the runs of MFT record {self.number} are not whole")
                if not int(run.flags):
                    yield ClusterRun(run.addr, run.len)

    def _content(self, attribute: Attribute) -> bytes:
        info = attribute.info
        with self._reading():
            return self._file.read_random(0, min(info.size, MOST_CONTENT), info.type, info.id)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with _reading(f"MFT record {self.number}"):
            yield


class NtfsVolume:
    """The volume that begins at the source's first byte.

    Raises:
        FileSystemCorruptError: The library refuses it.
    """

    def __init__(self, source: Source) -> None:
        with _reading("it"):
            self._volume = open_ntfs(source)

    def file(self, number: int) -> NtfsFile:
        """The file of an MFT record.

        Raises:
            FileSystemCorruptError: There is none, or it cannot be read.
        """
        with _reading(f"MFT record {number}"):
            file = self._volume.open_meta(number)
        return NtfsFile(number, file)

    def records(self, boot: BootSector) -> Iterator[tuple[int, bytes]]:
        """The whole of $MFT as it is on the disk, with its fixups.

        Args:
            boot: The volume's geometry.

        Yields:
            (the first record's number, a piece of whole records), ascending.

        Raises:
            FileSystemCorruptError: It has no such length, or cannot be read.
        """
        mft = self.file(MFT)
        if not mft.is_plain or mft.size % boot.record_size or mft.size > boot.clusters * boot.cluster_size:
            raise FileSystemCorruptError(f"$MFT cannot have {mft.size} bytes")
        for start in range(0, mft.size, _PIECE):
            yield start // boot.record_size, mft.read(start, min(_PIECE, mft.size - start))


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """The library's errors as ours. Its words quote the guest, so they are not repeated."""
    try:
        yield
    except (OSError, SystemError) as error:  # the second is what Python says of the binding's slips
        raise FileSystemCorruptError(f"{what} cannot be read") from error
