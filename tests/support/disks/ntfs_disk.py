"""A Windows-like disk in memory, with the offsets in its NTFS volume that tests damage."""

import struct
import subprocess
from dataclasses import dataclass
from mmap import MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap
from pathlib import Path

from support.required_programs import require
from thrave.demo.disk import PARTITION_OFFSET, DemoDisk, make_demo_disk
from thrave.volumes.base import Extent

CLUSTER = 4096
RECORD = 1024
HIBERNATION = b"a machine's memory, asleep: "
SWAP = b"a store app's memory, swapped: "
DATA, VOLUME_INFORMATION = 0x80, 0x70


def ntfs_tool(program: str, *arguments: object) -> bytes:
    """Run a tool of ntfs-3g, which must succeed; return its output."""
    argv = [require(program, package="ntfs-3g"), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, check=True).stdout


def make_windows_disk(path: Path) -> DemoDisk:
    """Create the demo's disk, and add hiberfil.sys and swapfile.sys with ntfs-3g."""
    demo = make_demo_disk(path, 64 << 20)
    volume = path.with_suffix(".ntfs")
    volume.write_bytes(path.read_bytes()[PARTITION_OFFSET:])
    for name, content in (
        ("hiberfil.sys", bytes(CLUSTER) + HIBERNATION * 10_000),
        ("swapfile.sys", SWAP * 5_000),
    ):
        (path.parent / name).write_bytes(content)
        ntfs_tool("ntfscp", "-q", volume, path.parent / name, name)
    with path.open("r+b") as disk:
        disk.seek(PARTITION_OFFSET)
        disk.write(volume.read_bytes())
    return demo


@dataclass
class Damage:
    """A disk in memory that tests damage and read as a volume. Offsets are bytes of the disk."""

    disk: bytearray | mmap
    at: int = PARTITION_OFFSET

    @classmethod
    def to(cls, path: Path) -> "Damage":
        """Map a disk copy-on-write."""
        with path.open("rb") as disk:
            return cls(mmap(disk.fileno(), 0, flags=MAP_PRIVATE, prot=PROT_READ | PROT_WRITE))

    @property
    def size(self) -> int:
        return len(self.disk)

    def extents(self) -> list[Extent]:
        return [Extent(0, self.size)] if self.disk else []

    def prefetch(self, offset: int, length: int) -> None:
        pass

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert offset + len(buffer) <= self.size
        buffer[:] = memoryview(self.disk)[offset : offset + len(buffer)]

    def close(self) -> None:
        pass

    def put(self, offset: int, data: bytes) -> None:
        self.disk[offset : offset + len(data)] = data

    def number(self, offset: int, layout: str) -> int:
        return struct.unpack_from(layout, self.disk, offset)[0]

    def cluster(self, number: int) -> int:
        return self.at + number * CLUSTER

    def record(self, number: int) -> int:
        """Offset of an MFT record; only for the first, contiguous records."""
        return self.cluster(self.number(self.at + 0x30, "<Q")) + number * RECORD

    def attribute(self, record: int, kind: int) -> int:
        """Offset of an attribute of the record at `record`."""
        offset = record + self.number(record + 20, "<H")
        while (found := self.number(offset, "<I")) != kind:
            assert found != 0xFFFFFFFF, "no such attribute"
            offset += self.number(offset + 4, "<I")
        return offset

    def first_run(self, record: int) -> tuple[int, int, int]:
        """First cluster of a record's content, and the offset and length of this number in the record."""
        attribute = self.attribute(record, DATA)
        at = attribute + self.number(attribute + 32, "<H")
        lengths, starts = self.disk[at] & 15, self.disk[at] >> 4
        place = at + 1 + lengths
        return int.from_bytes(self.disk[place : place + starts], "little", signed=True), place, starts

    def content(self, number: int) -> int:
        """Offset of the content of a system file."""
        return self.cluster(self.first_run(self.record(number))[0])

    def mirror(self) -> int:
        return self.cluster(self.number(self.at + 0x38, "<Q"))

    def set_flags(self, flags: int) -> None:
        """Set the flags of the volume, in $MFT and in its mirror."""
        for record in (self.record(3), self.mirror() + 3 * RECORD):
            attribute = self.attribute(record, VOLUME_INFORMATION)
            self.put(attribute + self.number(attribute + 20, "<H") + 10, struct.pack("<H", flags))

    def record_at_cluster(self, cluster: int) -> int:
        """Offset of the record of the file whose content begins with this cluster."""
        for number in range(24, 420):
            record = self.record(number)
            try:
                if self.disk[record : record + 4] == b"FILE" and self.first_run(record)[0] == cluster:
                    return record
            except (AssertionError, struct.error):
                continue
        raise AssertionError("no such file")

    def bits(self, cluster: int) -> tuple[int, int]:
        """Offset of the byte in $Bitmap for a cluster, and the mask of its bit."""
        return self.content(6) + cluster // 8, 1 << cluster % 8


def restart_page(*, version: tuple[int, int] = (1, 1), clients: int = 0xFFFF, flags: int = 0, lsn: int = 5) -> bytes:
    """A restart page of $LogFile as Windows writes it."""
    major, minor = version
    header = struct.pack("<4sHHQIIHHH", b"RSTR", 30, 9, 0, 4096, 4096, 48, minor, major)
    area = struct.pack("<QHHHH", lsn, 1, 0xFFFF, clients, flags)
    return (header.ljust(48, b"\0") + area).ljust(4096, b"\0")
