"""Opens a disk image or block device with the driver of its format.

The caller always names the format; it is never probed. A guest can write the header of any image format into the first
sector of its own raw disk, and a program that probes would read whatever host file that header names (CVE-2008-2004,
QEMU).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from thrave.volumes import image_headers
from thrave.volumes.base import Interruption, MonitoredVolume, Volume
from thrave.volumes.errors import VolumeUnreadableError
from thrave.volumes.host_files import FileId, HostFile
from thrave.volumes.image_chain import HEADER_READERS, ImageChain, ImageWarning, OnWarning
from thrave.volumes.ntfs_volumes import exclude_unused
from thrave.volumes.qemu_nbd import QemuVolume
from thrave.volumes.raw import RawVolume

FORMATS = tuple(HEADER_READERS)
"""Every format that can be opened, by QEMU's names; `raw` includes block devices, and `luks` is a raw disk in LUKS.
vdi is not supported: qemu-img does not detect a vdi image that is cut short, and reads zeros there.
"""

QEMU_FORMATS = tuple(name for name in FORMATS if name != "raw")
"""The formats that QEMU's programs read."""


@dataclass(frozen=True)
class VolumeMetadata:
    """What is known of a volume without reading its data.

    Attributes:
        files: Every file that belongs to the volume.
        written: Those to which its machine writes; the machine only reads the others.
        warnings: What its owner should know.
    """

    files: frozenset[FileId]
    written: frozenset[FileId]
    warnings: tuple[ImageWarning, ...]


@contextmanager
def open_volume(
    path: Path,
    image_format: str,
    *,
    skip_unused: bool = False,
    secret_file: Path | None = None,
    directories: Sequence[Path] = (),
    on_warning: OnWarning = lambda _warning: None,
    on_read: Callable[[], None] | None = None,
    interruption: Interruption | None = None,
) -> Iterator[Volume]:
    """Open the disk image or block device at `path` for reading; close it at the end of the block.

    While the volume is open, QEMU starts no guest that would write to the image or to one of its backing images
    (`image_locks` has the limits of this). At the end of a block without an error, every file is compared with its
    state at the beginning. So the content that was read can be trusted only after the block has ended without an error.

    Args:
        path: The file. Symbolic links are followed, once.
        image_format: One of `FORMATS`.
        skip_unused: Leave out what its NTFS file systems do not use (`ntfs_volumes`).
        secret_file: Contains the passphrase of an encrypted image (qcow2 with LUKS, or luks), without a newline at its
            end. Not used if no image of the chain is encrypted.
        directories: Folders in which files may be that the image refers to, in addition to the image's own folder.
        on_warning: Called with each warning about the image that its owner should know.
        on_read: Called after each read of the disk.
        interruption: Releases, from another thread, what would keep the machine from starting while a read hangs.

    Raises:
        VolumeInUseError: Another program has it open for writing.
        VolumeEncryptedError: It is encrypted, and the passphrase is missing or wrong.
        ImageRefusedError: Its metadata says that it is not a whole disk, or not to be trusted (`image_rules`).
        VolumeChangedError: At the end: it was written to or replaced while it was open.
        VolumeError: Unknown format; missing, forbidden or damaged image; a component that is not installed; unused
            space that cannot be determined reliably.
    """
    if image_format == "raw" and secret_file is not None:  # the bundle would contain the encrypted content as it is
        raise VolumeUnreadableError(path, "a raw volume has no passphrase; the format of a raw disk in LUKS is luks")
    with closing(ImageChain(path, image_format, directories, reads_content=True, interruption=interruption)) as chain:
        driver: Volume = RawVolume(chain.layers[0].file) if image_format == "raw" else QemuVolume(chain, secret_file)
        with closing(driver):
            volume = driver if on_read is None else MonitoredVolume(driver, on_read)
            for warning in chain.warnings:
                on_warning(warning)
            yield exclude_unused(volume, path) if skip_unused else volume
            chain.check_unchanged()


def read_metadata(path: Path, image_format: str, *, directories: Sequence[Path] = ()) -> VolumeMetadata:
    """Read the metadata of an image and of its backing images. Its machine may run.

    Locks nothing, starts no program and reads no data of the guest.

    Raises:
        VolumeError: As `open_volume`, except for errors that only QEMU or a lock can find, and without the rules about
            findings that a running machine causes.
    """
    with closing(ImageChain(path, image_format, directories, reads_content=False)) as chain:
        return VolumeMetadata(frozenset(chain.file_ids), frozenset(chain.written_ids), tuple(chain.warnings))


def guess_format(path: Path) -> str | None:
    """Return the format to which the first or last bytes of a file belong; None if unknown. Only a hint.

    Raises:
        VolumeUnreadableError: The file cannot be read.
    """
    with HostFile(path, detect_changes=False) as file:
        return image_headers.guess_format(file)
