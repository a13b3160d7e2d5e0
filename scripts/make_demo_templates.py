"""Makes the package data of `thrave demo`: NTFS volumes without the contents of their files.

    sudo .venv/bin/python scripts/make_demo_templates.py

Needs ntfs-3g (mkntfs and the driver), FUSE and the right to mount. Run it again only to change the folder tree.

mkntfs makes each volume and ntfs-3g fills it, so every byte of the file system is theirs. Each cluster of a file
contains the number of the file and of the cluster. The script then finds these clusters in the volume, which gives the
position of each file, and stores all other bytes. Folders, names and sizes depend only on this script; serial numbers
and times do not.
"""

import json
import lzma
import random
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thrave.demo.disk import PARTITION_OFFSET, TEMPLATE_SIZES, Kind, Run, Template, TemplateFile, template_name

CLUSTER = 4096
MARK = struct.Struct("<16sII")  # magic, number of the file, number of the cluster in it
MAGIC = b"thrave-demo-file"
DATA_SHARE = 0.5  # of the disk
KIND_SHARES: dict[Kind, float] = {"program": 0.5, "text": 0.1, "random": 0.2, "zeros": 0.2}  # of the data
DELETED_SHARE = 0.15  # of programs, texts and random data

# Small files are stored in their MFT records, and so in the template.
RESIDENT = {
    "Windows/System32/drivers/etc/hosts": "127.0.0.1 localhost\r\n::1 localhost\r\n",
    "Windows/win.ini": "; for 16-bit app support\r\n[fonts]\r\n[extensions]\r\n",
    "Users/Administrator/Desktop/desktop.ini": "[.ShellClassInfo]\r\n",
    "Users/Public/Documents/日本語 файл ünïcode.txt": "héllo wörld\r\n",
    "Program Files/Amazon/Ec2ConfigService/Settings/config.xml": "<Ec2ConfigurationSettings/>\r\n",
}
EMPTY_FOLDERS = ("$Recycle.Bin", "System Volume Information", "Windows/Temp", "Windows/System32/Sysprep", "PerfLogs")

# name pattern, how many, share of its kind's bytes
TREE: dict[Kind, list[tuple[str, int, float]]] = {
    "program": [
        ("Windows/System32/ntoskrnl.exe", 1, 0.05),
        ("Windows/System32/mod{:03}.dll", 90, 0.35),
        ("Windows/System32/drivers/drv{:02}.sys", 40, 0.10),
        ("Windows/WinSxS/amd64_component_{:03}.dll", 60, 0.20),
        ("Windows/System32/config/SOFTWARE", 1, 0.08),
        ("Windows/System32/config/SYSTEM", 1, 0.04),
        ("Windows/System32/config/SAM", 1, 0.005),
        ("Program Files/Amazon/Ec2ConfigService/Ec2Config.exe", 1, 0.005),
        ("Program Files/Contoso/bin/contoso{:02}.dll", 20, 0.12),
        ("pagefile.sys", 1, 0.05),
    ],
    "text": [
        ("Windows/Logs/CBS/CBS{:02}.log", 20, 0.4),
        ("ProgramData/Contoso/log/2026-11-{:02}.log", 20, 0.4),
        ("Users/Administrator/Documents/bericht-März-{:02}.txt", 20, 0.2),
    ],
    "random": [
        ("Users/Administrator/Pictures/写真{:02}.jpg", 30, 0.6),
        ("Windows/SoftwareDistribution/Download/update{:02}.cab", 10, 0.4),
    ],
    "zeros": [
        ("ProgramData/Contoso/db/tablespace{:02}.dat", 4, 0.8),
        ("Windows/System32/LogFiles/WMI/trace{:02}.etl", 4, 0.2),
    ],
}


def plan_files(disk_size: int) -> Iterator[tuple[str, Kind, int, bool]]:
    """Yield path, kind, size in bytes and whether to delete, for every file of a disk."""
    rng = random.Random(disk_size)
    for kind, share in KIND_SHARES.items():
        budget = disk_size * DATA_SHARE * share
        for pattern, count, part in TREE[kind]:
            weights = [rng.lognormvariate(0, 0.8) for _ in range(count)]
            for i, weight in enumerate(weights):
                size = (
                    max(int(budget * part * weight / sum(weights)), CLUSTER) | 64
                )  # space for the mark in the last cluster
                yield pattern.format(i), kind, size, count > 10 and i < count * DELETED_SHARE


def cluster(number: int, index: int) -> bytes:
    """Return the content of one cluster of a file: its own position."""
    return MARK.pack(MAGIC, number, index).ljust(CLUSTER, b"\0")


def fill(root: Path, plan: list[tuple[str, Kind, int, bool]]) -> None:
    for name in EMPTY_FOLDERS:
        (root / name).mkdir(parents=True)
    for name, text in RESIDENT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    for number, (name, _, size, _) in enumerate(plan):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / name).open("wb") as file:
            for index in range(-(-size // CLUSTER)):
                file.write(cluster(number, index)[: size - index * CLUSTER])
    for name, _, _, deleted in plan:
        if deleted:
            (root / name).unlink()


@contextmanager
def mounted(volume: Path, root: Path) -> Iterator[None]:
    root.mkdir()
    subprocess.run(["ntfs-3g", "-o", "big_writes", volume, root], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", root], check=True)


def find(volume: Path, plan: list[tuple[str, Kind, int, bool]]) -> tuple[Template, Iterator[bytes]]:
    """Search the volume: a cluster with a mark belongs to a file; other clusters that are not zeros are metadata."""
    positions: list[dict[int, int]] = [{} for _ in plan]
    others: list[int] = []
    with volume.open("rb") as file:
        for offset in range(0, volume.stat().st_size, CLUSTER):
            block = file.read(CLUSTER)
            if block.startswith(MAGIC):
                _, number, index = MARK.unpack_from(block)
                positions[number][index] = offset
            elif block.strip(b"\0"):
                others.append(offset)
    files = tuple(
        TemplateFile(name, kind, size, deleted, join([clusters[i] for i in range(-(-size // CLUSTER))]))
        for (name, kind, size, deleted), clusters in zip(plan, positions, strict=True)
    )
    metadata = join(others)
    return Template(volume.stat().st_size, metadata, files), read(volume, metadata)


def join(offsets: list[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for offset in offsets:
        if runs and runs[-1].offset + runs[-1].length == offset:
            runs[-1] = Run(runs[-1].offset, runs[-1].length + CLUSTER)
        else:
            runs.append(Run(offset, CLUSTER))
    return tuple(runs)


def read(volume: Path, runs: tuple[Run, ...]) -> Iterator[bytes]:
    with volume.open("rb") as file:
        for run in runs:
            file.seek(run.offset)
            yield file.read(run.length)


def make(disk_size: int, output: Path, work: Path) -> None:
    plan = list(plan_files(disk_size))
    volume = work / f"{disk_size}.ntfs"
    with volume.open("wb") as file:
        file.truncate(disk_size - PARTITION_OFFSET)
    geometry = ["-s", "512", "-p", str(PARTITION_OFFSET // 512), "-H", "255", "-S", "63", "-c", str(CLUSTER)]
    subprocess.run(["mkntfs", "-F", "-Q", "-q", *geometry, "-L", "System", volume], check=True)
    with mounted(volume, work / f"{disk_size}.mnt"):
        fill(work / f"{disk_size}.mnt", plan)
    template, blocks = find(volume, plan)
    with lzma.open(output, "wb", preset=9 | lzma.PRESET_EXTREME) as stream:
        stream.write(json.dumps(template.document(), ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        for block in blocks:
            stream.write(block)
    volume.unlink()
    print(f"{output.name}: {len(plan)} files, {output.stat().st_size} bytes")


def main() -> None:
    folder = Path(__file__).resolve().parent.parent / "src/thrave/demo/templates"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for disk_size in TEMPLATE_SIZES:
            make(disk_size, folder / template_name(disk_size), Path(work))


if __name__ == "__main__":
    main()
