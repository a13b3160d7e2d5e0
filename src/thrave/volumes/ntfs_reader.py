"""Reads an NTFS volume as MFT records, attributes and cluster runs, through pytsk3, the binding of The Sleuth Kit.

pytsk3 handles runs, attribute lists and damaged records. It is written in C and reads what a guest wrote, so only the
process that `ntfs_sandbox` starts loads it. Everything that it cannot read completely is a FileSystemCorruptError here.
`ntfs_scan` decides what the content means.
"""

import codecs
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import NamedTuple, Protocol, cast

from thrave.volumes.errors import FileSystemCorruptError
from thrave.volumes.ntfs_format import BootSector

MFT, LOG_FILE, VOLUME, ROOT, BITMAP = 0, 2, 3, 5, 6
"""Numbers of MFT records that every volume has."""

MAX_CONTENT = 4096
"""Bytes of a small attribute that are read."""

NON_RESIDENT, ENCRYPTED, COMPRESSED, SPARSE = 0x02, 0x10, 0x20, 0x40
"""TSK_FS_ATTR_FLAG_ENUM."""

RUN_SPARSE = 0x02
"""TSK_FS_ATTR_RUN_FLAG_ENUM: the run has no clusters."""

_FILE_NAME, _VOLUME_INFORMATION, _DATA = 0x30, 0x70, 0x80  # attribute types
_DOS_NAME = 2
_MAX_RUNS = 1 << 20  # of one attribute
_PIECE = 1 << 20  # bytes of $MFT in one read
_decode_utf_16 = codecs.getdecoder("utf-16-le")  # loaded now: the confined process can import no codec


class Source(Protocol):
    """The partition that a volume is read from."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from `offset` on; fewer only at the end."""


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
    """An attribute; iterating gives its runs, or none if it is resident."""

    info: AttributeInfo


class File(Iterable[Attribute], Protocol):
    """A file; iterating gives its attributes, including those in its extension records."""

    def read_random(self, offset: int, length: int, type: int = ..., id: int = ...) -> bytes:  # noqa: A002 (pytsk3's)
        """Read from an attribute, by default the unnamed $DATA."""


class FileSystem(Protocol):
    """An NTFS volume. Every call may raise OSError."""

    def open_meta(self, inode: int) -> File:
        """Return the file of an MFT record."""


class _Binding(Protocol):
    TSK_FS_TYPE_NTFS: int
    Img_Info: type[object]

    def FS_Info(self, image: object, offset: int, type: int) -> FileSystem:  # noqa: A002, N802 (pytsk3's names)
        """Open a file system."""


def load_library() -> None:
    """Import pytsk3. A confined process cannot import it."""
    import_module("pytsk3")


class Name(NamedTuple):
    """A name of a file, except the short name for DOS."""

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
        """Load the attributes."""
        self.number = number
        self._file = file
        with self._translated_errors():
            self._attributes = list(file)

    @property
    def size(self) -> int:
        """Size of the content, in bytes."""
        return self._data().info.size

    @property
    def is_plain(self) -> bool:
        """Whether the content is in clusters, and neither compressed, sparse nor encrypted."""
        special = ENCRYPTED | COMPRESSED | SPARSE
        return int(self._data().info.flags) & (special | NON_RESIDENT) == NON_RESIDENT

    def read(self, offset: int, length: int) -> bytes:
        """Return a part of the content, in bytes."""
        with self._translated_errors():
            content = self._file.read_random(offset, length)
        if len(content) != length:
            raise FileSystemCorruptError(f"the content of MFT record {self.number} ends too early")
        return content

    def runs(self) -> Iterator[ClusterRun]:
        """Yield the clusters of all attributes."""
        for attribute in self._attributes:
            yield from self._runs(attribute)

    def content_runs(self) -> list[ClusterRun]:
        """Return the clusters of the content only."""
        return list(self._runs(self._data()))

    def names(self) -> list[Name]:
        """Return the names of the file in all folders."""
        contents = [self._content(found) for found in self._attributes if int(found.info.type) == _FILE_NAME]
        if any(len(content) < 66 for content in contents):
            raise FileSystemCorruptError(f"a name of MFT record {self.number} is cut short")
        return [
            Name(
                int.from_bytes(content[:6], "little"),
                _decode_utf_16(content[66 : 66 + 2 * content[64]], "replace")[0],
            )
            for content in contents
            if content[65] != _DOS_NAME
        ]

    def root_names(self) -> list[str]:
        """Return each name in lower case if it is in the root folder, otherwise an empty text in its place."""
        return [name.lower() if folder == ROOT else "" for folder, name in self.names()]

    def volume_flags(self) -> int:
        """Return the flags in $VOLUME_INFORMATION, which only $Volume has."""
        contents = [self._content(found) for found in self._attributes if int(found.info.type) == _VOLUME_INFORMATION]
        if [len(content) for content in contents] != [12]:
            raise FileSystemCorruptError("$Volume does not contain the state of the volume")
        return int.from_bytes(contents[0][10:], "little")

    def _data(self) -> Attribute:
        for attribute in self._attributes:
            if int(attribute.info.type) == _DATA and not attribute.info.name:
                return attribute
        raise FileSystemCorruptError(f"MFT record {self.number} has no content")

    def _runs(self, attribute: Attribute) -> Iterator[ClusterRun]:
        with self._translated_errors():
            for number, run in enumerate(attribute):
                if int(run.flags) & ~RUN_SPARSE or number > _MAX_RUNS:
                    raise FileSystemCorruptError(f"the runs of MFT record {self.number} are incomplete")
                if not int(run.flags):
                    yield ClusterRun(run.addr, run.len)

    def _content(self, attribute: Attribute) -> bytes:
        info = attribute.info
        with self._translated_errors():
            return self._file.read_random(0, min(info.size, MAX_CONTENT), info.type, info.id)

    def _translated_errors(self) -> AbstractContextManager[None]:
        return _translated_errors(f"MFT record {self.number}")


class NtfsVolume:
    """The volume that begins at the source's first byte.

    Raises:
        FileSystemCorruptError: pytsk3 refuses it.
    """

    def __init__(self, source: Source) -> None:
        binding = cast("_Binding", import_module("pytsk3"))
        methods = {
            "read": lambda _, offset, length: source.read(offset, length),
            "get_size": lambda _: source.size,
        }
        with _translated_errors("it"):
            image = type("SourceImage", (binding.Img_Info,), methods)(url="")
            self._volume = binding.FS_Info(image, 0, binding.TSK_FS_TYPE_NTFS)

    def file(self, number: int) -> NtfsFile:
        """Return the file of an MFT record.

        Raises:
            FileSystemCorruptError: There is none, or it cannot be read.
        """
        with _translated_errors(f"MFT record {number}"):
            file = self._volume.open_meta(number)
        return NtfsFile(number, file)

    def records(self, boot: BootSector) -> Iterator[tuple[int, bytes]]:
        """Yield the whole $MFT as it is on the disk, with fixups.

        Args:
            boot: The volume's geometry.

        Yields:
            (number of the first record, bytes of whole records), ascending.

        Raises:
            FileSystemCorruptError: Its length is impossible, or it cannot be read.
        """
        mft = self.file(MFT)
        if not mft.is_plain or mft.size % boot.record_size or mft.size > boot.clusters * boot.cluster_size:
            raise FileSystemCorruptError(f"$MFT cannot have {mft.size} bytes")
        for start in range(0, mft.size, _PIECE):
            yield start // boot.record_size, mft.read(start, min(_PIECE, mft.size - start))


@contextmanager
def _translated_errors(name: str) -> Iterator[None]:
    """Raise pytsk3's errors as FileSystemCorruptError, without their messages, which quote the guest."""
    try:
        yield
    except (OSError, SystemError) as error:  # Python raises SystemError for mistakes in a C extension
        raise FileSystemCorruptError(f"{name} cannot be read") from error
