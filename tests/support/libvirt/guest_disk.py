"""Reads C: of a raw disk that is not in use: the files and the journal that a guest of `guest.py` wrote."""

import subprocess
from pathlib import Path

from support.disks.ntfs_disk import ntfs_tool
from support.libvirt.guest import volume_flags
from support.required_programs import require
from thrave.demo.disk import EPHEMERAL_MARK, PARTITION_OFFSET

OFF = "off"
"""The last word of a boot's in the journal."""

_MIB = 1 << 20


class GuestDisk:
    """C: of a raw disk, as it is now."""

    def __init__(self, disk: Path, folder: Path) -> None:
        """Copy it to `folder`, since NTFS's tools know no partitions."""
        self._disk = disk
        self._volume = folder / f"{disk.stem}.volume"
        size = disk.stat().st_size - PARTITION_OFFSET
        with self._volume.open("wb") as volume:
            volume.truncate(size)
        skip = f"skip={PARTITION_OFFSET // _MIB}"
        copy = ["dd", f"if={disk}", f"of={self._volume}", "bs=1M", skip, "conv=sparse,notrunc", "status=none"]
        subprocess.run(copy, check=True)

    def read(self, name: str) -> str:
        """The content of a file of the root folder; it may be a volume that was not unmounted."""
        return ntfs_tool("ntfscat", "--force", "--quiet", self._volume, name).decode()

    def is_clean(self) -> bool:
        """Whether it was unmounted and has no fault that ntfsfix could tell of."""
        ntfsfix = [require("ntfsfix", package="ntfs-3g"), "-n", self._volume]
        done = subprocess.run(ntfsfix, capture_output=True, check=False)
        return done.returncode == 0 and self._flags() == 0

    def words(self, boot: str) -> list[str]:
        """What a boot has written to the journal, line by line: 1, 2, 3, …, and OFF when it was shut down."""
        lines = [line.split() for line in self.read("journal.txt").splitlines()]
        return [word for boot_id, word in lines if boot_id == boot]

    def has_mark(self) -> bool:
        """Whether the mark of the second disk is anywhere on this disk."""
        grep = subprocess.run(["grep", "-qaF", EPHEMERAL_MARK.decode().strip(), self._disk], check=False)
        return grep.returncode == 0

    def _flags(self) -> int:
        """Those of the volume, whose lowest is the dirty bit."""
        with self._volume.open("rb") as volume:
            volume.seek(int(volume_flags(self._disk).partition(",")[0]))
            return int.from_bytes(volume.read(2), "little")
