"""Opening a volume: the one place that knows which driver reads which format.

The format is always given and never probed: a guest can write any image format's header into the first sector of its
own raw disk, and a program that probes then reads whatever host file that header names (CVE-2008-2004, QEMU).
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from thrave.volumes.errors import UnknownFormatError
from thrave.volumes.qemu import QemuVolume
from thrave.volumes.raw import RawVolume
from thrave.volumes.skipping import without_unused
from thrave.volumes.volume import Volume

QEMU_FORMATS = ("qcow2", "vhdx", "vmdk", "vpc")
"""QEMU's names. vdi is left out: qemu-img finds nothing wrong with one that is cut short, and reads zeros there."""

FORMATS = ("raw", *QEMU_FORMATS)
"""Every format that can be opened; `raw` stands for block devices too."""

Skip = Literal["nothing", "unused"]
"""What of a volume's data is left out: nothing, or what its NTFS file systems do not use (see `skipping`)."""


@contextmanager
def open_volume(path: Path, format: str, *, skip: Skip = "nothing") -> Iterator[Volume]:  # noqa: A002 (QEMU's word)
    """Open the disk image or block device at `path` for reading, and close it in the end.

    Args:
        path: The file. Symbolic links are followed.
        format: One of `FORMATS`.
        skip: Whether to look into its file systems at all.

    Raises:
        VolumeError: Unknown format; missing, forbidden or broken image; a component that is not installed; what is
            unused cannot be told for certain.
    """
    with closing(_driver(path, format)) as volume:
        yield volume if skip == "nothing" else without_unused(volume, path)


def _driver(path: Path, format: str) -> Volume:  # noqa: A002 (as above)
    if format == "raw":
        return RawVolume(path)
    if format in QEMU_FORMATS:
        return QemuVolume(path, format)
    raise UnknownFormatError(format, FORMATS)
