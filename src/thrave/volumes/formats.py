"""Opening a volume: the one place that knows which driver reads which format.

The format is always given and never probed: a guest can write any image format's header into the first sector of its
own raw disk, and a program that probes then reads whatever host file that header names (CVE-2008-2004, QEMU).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from thrave.volumes.base import Interruption, Volume, WatchedVolume
from thrave.volumes.errors import VolumeUnreadableError
from thrave.volumes.host_files import FileId, HostFile
from thrave.volumes.image_chain import READERS, Inspection, Warn, Warned
from thrave.volumes.image_headers import apparent_format
from thrave.volumes.ntfs_volumes import exclude_unused
from thrave.volumes.qemu_nbd import QemuVolume
from thrave.volumes.raw import RawVolume

FORMATS = tuple(READERS)
"""Every format that can be opened, in QEMU's words; `raw` stands for block devices too, and `luks` is a raw disk in
LUKS. vdi is left out: qemu-img finds nothing wrong with one that is cut short, and reads zeros there.
"""

QEMU_FORMATS = tuple(name for name in FORMATS if name != "raw")
"""Those that QEMU's programs read."""


@dataclass(frozen=True)
class Examined:
    """What can be told of a volume without reading its data.

    Attributes:
        files: Which files it lies in.
        written: Which of them its machine writes to; it only reads the others.
        warnings: What its owner should know.
    """

    files: frozenset[FileId]
    written: frozenset[FileId]
    warnings: tuple[Warned, ...]


@contextmanager
def open_volume(
    path: Path,
    format: str,  # noqa: A002 (QEMU's word)
    *,
    skip_unused: bool = False,
    secret_file: Path | None = None,
    directories: Sequence[Path] = (),
    warn: Warn = lambda _warned: None,
    moved: Callable[[], None] | None = None,
    interruption: Interruption | None = None,
) -> Iterator[Volume]:
    """Open the disk image or block device at `path` for reading, and close it in the end.

    For as long as it is open QEMU starts no guest that would write to it, nor to any image that it stands on: see
    `locking` for what that is worth. At the end of a block that has not failed every file of it is compared with what
    it was at the beginning, so what was read is true only once the block has ended well.

    Args:
        path: The file. Symbolic links are followed, once.
        format: One of `FORMATS`.
        skip_unused: Leave out what its NTFS file systems do not use (see `skipping`).
        secret_file: Holds the passphrase of an encrypted image (qcow2 with LUKS, or luks), and nothing else: no newline
            at its end. Not used if no image of the chain is encrypted.
        directories: Folders in which files may lie that the image refers to, besides the image's own.
        warn: Told what the image says of itself that its owner should know.
        moved: Called after each read of the disk.
        interruption: Ends what would be in the way of the machine, from another thread, while a read hangs.

    Raises:
        VolumeInUseError: Something has it open for writing.
        VolumeEncryptedError: It is encrypted, and the passphrase is missing or wrong.
        ImageRefusedError: It is not a whole disk, or not to be trusted, by its own words (`marks`).
        VolumeChangedError: At the end: it was written to or replaced meanwhile.
        VolumeError: Unknown format; missing, forbidden or broken image; a component that is not installed; what is
            unused cannot be told for certain.
    """
    if format == "raw" and secret_file is not None:  # what it holds would be bundled as it is, enciphered
        raise VolumeUnreadableError(path, "a raw volume has no passphrase; the format of a raw disk in LUKS is luks")
    with (
        closing(Inspection(path, format, directories, to_read=True, interruption=interruption)) as inspection,
        closing(_driver(inspection, format, secret_file)) as opened,
    ):
        volume = opened if moved is None else WatchedVolume(opened, moved)
        for warned in inspection.warnings:
            warn(warned)
        yield exclude_unused(volume, path) if skip_unused else volume
        inspection.check_unchanged()


def examine(path: Path, format: str, *, directories: Sequence[Path] = ()) -> Examined:  # noqa: A002 (as above)
    """Look at an image's own words, and at those of every image that it stands on. Its machine may run.

    Nothing is locked, no program is started, and no guest's data is read.

    Raises:
        VolumeError: As `open_volume`, as far as that can be told; marks that a running machine leaves are not judged.
    """
    with closing(Inspection(path, format, directories, to_read=False)) as inspection:
        return Examined(frozenset(inspection.file_ids), frozenset(inspection.written_ids), tuple(inspection.warnings))


def apparent_format_of(path: Path) -> str | None:
    """The format of which a file's first or last bytes are, None if of none that is known: a hint, and no more.

    Raises:
        VolumeUnreadableError: It cannot be read.
    """
    with HostFile(path, to_compare=False) as file:
        return apparent_format(file)


def _driver(inspection: Inspection, format: str, secret_file: Path | None) -> Volume:  # noqa: A002 (as above)
    if format == "raw":
        return RawVolume(inspection.layers[0].file)
    return QemuVolume(inspection, secret_file)
