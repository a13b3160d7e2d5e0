"""Opening a volume: the one place that knows which driver reads which format.

The format is always given and never probed: a guest can write any image format's header into the first sector of its
own raw disk, and a program that probes then reads whatever host file that header names (CVE-2008-2004, QEMU).
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from thrave.volumes.errors import UnknownFormatError
from thrave.volumes.qemu import QemuVolume
from thrave.volumes.raw import RawVolume
from thrave.volumes.volume import Volume

QEMU_FORMATS = ("qcow2", "vhdx", "vmdk", "vpc")
"""QEMU's names. vdi is left out: qemu-img finds nothing wrong with one that is cut short, and reads zeros there."""

FORMATS = ("raw", *QEMU_FORMATS)
"""Every format that can be opened; `raw` stands for block devices too."""


@contextmanager
def open_volume(path: Path, format: str) -> Iterator[Volume]:  # noqa: A002 (QEMU's and libvirt's word)
    """Open the disk image or block device at `path` for reading, and close it in the end.

    Args:
        path: The file. Symbolic links are followed.
        format: One of `FORMATS`.

    Raises:
        VolumeError: Unknown format; missing, forbidden or broken image; a component that is not installed.
    """
    with closing(_driver(path, format)) as volume:
        yield volume


def _driver(path: Path, format: str) -> Volume:  # noqa: A002 (as above)
    if format == "raw":
        return RawVolume(path)
    if format in QEMU_FORMATS:
        return QemuVolume(path, format)
    raise UnknownFormatError(format, FORMATS)
