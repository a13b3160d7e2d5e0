"""An NTFS volume as records, attributes and runs: The Sleuth Kit, with its mishaps turned into our errors.

Whatever the library cannot read, or reads in part, is a corrupt file system here. Nothing is decided here; `survey.py`
does that.
"""

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from thrave.volumes import sleuthkit
from thrave.volumes.errors import FileSystemCorruptError
from thrave.volumes.ntfs import BootSector

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


class Run(NamedTuple):
    """A run of clusters that an attribute occupies."""

    first: int
    length: int


class NtfsFile:
    """The file of one MFT record."""

    def __init__(self, number: int, file: sleuthkit.File) -> None:
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
        special = sleuthkit.ENCRYPTED | sleuthkit.COMPRESSED | sleuthkit.SPARSE
        return int(self._data().info.flags) & (special | sleuthkit.NON_RESIDENT) == sleuthkit.NON_RESIDENT

    def read(self, offset: int, length: int) -> bytes:
        """That part of its content."""
        with self._reading():
            content = self._file.read_random(offset, length)
        if len(content) != length:
            raise FileSystemCorruptError(f"the content of MFT record {self.number} ends too early")
        return content

    def runs(self) -> Iterator[Run]:
        """The clusters of all its attributes."""
        for attribute in self._attributes:
            yield from self._runs(attribute)

    def content_runs(self) -> list[Run]:
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

    def _data(self) -> sleuthkit.Attribute:
        for attribute in self._attributes:
            if int(attribute.info.type) == _DATA and not attribute.info.name:
                return attribute
        raise FileSystemCorruptError(f"MFT record {self.number} has no content")

    def _runs(self, attribute: sleuthkit.Attribute) -> Iterator[Run]:
        with self._reading():
            for number, run in enumerate(attribute):
                if int(run.flags) & ~sleuthkit.RUN_SPARSE or number > _MOST_RUNS:
                    raise FileSystemCorruptError(f"the runs of MFT record {self.number} are not whole")
                if not int(run.flags):
                    yield Run(run.addr, run.len)

    def _content(self, attribute: sleuthkit.Attribute) -> bytes:
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

    def __init__(self, source: sleuthkit.Source) -> None:
        with _reading("it"):
            self._volume = sleuthkit.open_ntfs(source)

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
