"""Opening a volume: the one place that knows which driver reads which format.

The format is always given and never probed: a guest can write any image format's header into the first sector of its
own raw disk, and a program that probes then reads whatever host file that header names (CVE-2008-2004, QEMU).
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from thrave.volumes.errors import UnknownFormatError, VolumeUnreadableError
from thrave.volumes.locking import ImageLocks
from thrave.volumes.qemu import QemuVolume
from thrave.volumes.raw import RawVolume
from thrave.volumes.skipping import without_unused
from thrave.volumes.volume import Volume

QEMU_FORMATS = ("qcow2", "vhdx", "vmdk", "vpc", "luks")
"""QEMU's names; `luks` is a raw disk in LUKS. vdi is left out: qemu-img finds nothing wrong with one that is cut short,
and reads zeros there.
"""

FORMATS = ("raw", *QEMU_FORMATS)
"""Every format that can be opened; `raw` stands for block devices too."""

Skip = Literal["nothing", "unused"]
"""What of a volume's data is left out: nothing, or what its NTFS file systems do not use (see `skipping`)."""


@contextmanager
def open_volume(
    path: Path,
    format: str,  # noqa: A002 (QEMU's word)
    *,
    skip: Skip = "nothing",
    secret_file: Path | None = None,
) -> Iterator[Volume]:
    """Open the disk image or block device at `path` for reading, and close it in the end.

    For as long as it is open QEMU starts no guest that would write to it, nor to any image that it stands on: see
    `locking` for what that is worth.

    Args:
        path: The file. Symbolic links are followed.
        format: One of `FORMATS`.
        skip: Whether to look into its file systems at all.
        secret_file: Holds the passphrase of an encrypted image (qcow2 with LUKS, or luks), and nothing else: no newline
            at its end. Not used if no image of the chain is encrypted.

    Raises:
        VolumeInUseError: Something has it open for writing.
        VolumeEncryptedError: It is encrypted, and the passphrase is missing or wrong.
        VolumeError: Unknown format; missing, forbidden or broken image; a component that is not installed; what is
            unused cannot be told for certain.
    """
    with closing(ImageLocks()) as locks, closing(_driver(path, format, locks, secret_file)) as volume:
        yield volume if skip == "nothing" else without_unused(volume, path)


def _driver(path: Path, format: str, locks: ImageLocks, secret_file: Path | None) -> Volume:  # noqa: A002 (as above)
    if format in QEMU_FORMATS:
        return QemuVolume(path, format, locks, secret_file)
    if format != "raw":
        raise UnknownFormatError(format, FORMATS)
    if secret_file is not None:  # what it holds would be bundled as it is, enciphered
        raise VolumeUnreadableError(path, "a raw volume has no passphrase; the format of a raw disk in LUKS is luks")
    locks.take(path)
    return RawVolume(path)
