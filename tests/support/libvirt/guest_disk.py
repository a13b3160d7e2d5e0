"""Reads C: of a raw disk that is not in use: the files and the journal of a guest of `guest.py`."""

import subprocess
from pathlib import Path

from support.disks.ntfs_disk import ntfs_tool
from support.libvirt.guest import volume_flags
from support.required_programs import require
from thrave.demo.disk import EPHEMERAL_MARK, PARTITION_OFFSET

OFF = "off"
"""The last word of a boot in the journal, after a shutdown."""

_MIB = 1 << 20


class GuestDisk:
    """C: of a raw disk at the time of the call."""

    def __init__(self, disk: Path, folder: Path) -> None:
        """Copy the volume to `folder`, since the NTFS tools cannot open partitions."""
        self._disk = disk
        self._volume = folder / f"{disk.stem}.volume"
        size = disk.stat().st_size - PARTITION_OFFSET
        with self._volume.open("wb") as volume:
            volume.truncate(size)
        skip = f"skip={PARTITION_OFFSET // _MIB}"
        copy = ["dd", f"if={disk}", f"of={self._volume}", "bs=1M", skip, "conv=sparse,notrunc", "status=none"]
        subprocess.run(copy, check=True)

    def read(self, name: str) -> str:
        """Return the content of a file in the root folder, also of an unclean volume."""
        return ntfs_tool("ntfscat", "--force", "--quiet", self._volume, name).decode()

    def is_clean(self) -> bool:
        """Return whether the volume was unmounted, and ntfsfix finds no fault."""
        ntfsfix = [require("ntfsfix", package="ntfs-3g"), "-n", self._volume]
        done = subprocess.run(ntfsfix, capture_output=True, check=False)
        return done.returncode == 0 and self._flags() == 0

    def words(self, boot: str) -> list[str]:
        """Return what a boot has written to the journal: 1, 2, 3, …, and OFF after a shutdown."""
        lines = [line.split() for line in self.read("journal.txt").splitlines()]
        return [word for boot_id, word in lines if boot_id == boot]

    def has_mark(self) -> bool:
        """Return whether this disk contains the mark of the second disk."""
        grep = subprocess.run(["grep", "-qaF", EPHEMERAL_MARK.decode().strip(), self._disk], check=False)
        return grep.returncode == 0

    def _flags(self) -> int:
        """Return the flags of the volume; the lowest is the dirty bit."""
        with self._volume.open("rb") as volume:
            volume.seek(int(volume_flags(self._disk).partition(",")[0]))
            return int.from_bytes(volume.read(2), "little")
