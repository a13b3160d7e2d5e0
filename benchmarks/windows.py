"""An NTFS disk that has been lived on: files, deleted files, files written over their clusters, and a page file.

Made by mkntfs and filled through ntfs-3g, so every structure on it is theirs; that takes FUSE and the right to
mount. At full size it has 8 GiB: 2.3 GB written, 1.0 GB of that deleted, 0.3 GB written anew, and a page, a hibernation
and a swap file of 848 MiB in which something stands.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from contents import Contents, Kind
from extents import copy_data

_MIB = 1 << 20
_PARTITION_OFFSET = 1 << 20  # bytes; where Windows puts the first partition
_KINDS: tuple[Kind, ...] = (
    "program", "program", "program", "program", "program", "text", "random", "random", "zeros", "zeros",
)  # fmt: skip
_SYSTEM_FILES = {"pagefile.sys": 512, "hiberfil.sys": 320, "swapfile.sys": 16}  # MiB
_WRITTEN, _DELETED, _WRITTEN_ANEW = 550, 240, 70  # files of 4 MiB


class CannotMakeError(Exception):
    """Something that is needed to make a disk is not here."""


@dataclass(frozen=True)
class _File:
    """A file that was written: its path from the volume's root, what stands in it, bytes, and whether it stayed."""

    path: str
    kind: Kind
    size: int
    stays: bool = True


def make_windows_disk(path: Path, scale: float, seed: int) -> None:
    """Make the disk.

    Args:
        path: where.
        scale: 1 for the size above, less for a smaller one of the same shape.
        seed: of the files' contents.

    Raises:
        CannotMakeError: no mkntfs, no ntfs-3g, or no right to mount.
    """
    volume = path.with_suffix(".volume")
    try:
        _make_volume(volume, int(8192 * scale) * _MIB - 2 * _PARTITION_OFFSET)
        with _mounted(volume) as folder:
            _live_on(folder, scale, Contents(seed))
        _put_into_partition(volume, path)
    finally:
        volume.unlink(missing_ok=True)


def has_its_files(disk: Path, scale: float, seed: int) -> bool:
    """Whether a disk can be mounted and has all files but the system's with the content that they were given."""
    volume, contents = disk.with_suffix(".volume"), Contents(seed)
    with volume.open("wb") as file:
        file.truncate(disk.stat().st_size - 2 * _PARTITION_OFFSET)
    copy_data(disk, volume, -_PARTITION_OFFSET)
    with _mounted(volume, "-o", "ro") as folder:
        there = {path.name for path in (folder / "Windows").iterdir()}
        planned = [file for file in (*_first_files(scale), *_later_files(scale)) if file.stays]
        return there == {Path(file.path).name for file in planned} and all(
            (folder / file.path).read_bytes() == b"".join(contents.pieces(file.path, file.kind, file.size))
            for file in planned
        )


def _first_files(scale: float) -> Iterator[_File]:
    for number in range(_WRITTEN):
        stays = number % 2 != 0 or number >= 2 * _DELETED
        yield _File(f"Windows/first{number:03}.bin", _KINDS[number % len(_KINDS)], int(4 * scale * _MIB), stays)


def _later_files(scale: float) -> Iterator[_File]:
    for number in range(_WRITTEN_ANEW):
        yield _File(f"Windows/later{number:03}.bin", _KINDS[number % len(_KINDS)], int(4 * scale * _MIB))


def _system_files(scale: float) -> Iterator[_File]:
    for name, size in _SYSTEM_FILES.items():
        yield _File(name, "program", int(size * scale) * _MIB)


def _make_volume(path: Path, size: int) -> None:
    with path.open("wb") as volume:
        volume.truncate(size)
    _run(
        "mkntfs", "-F", "-Q", "-q", "-p", str(_PARTITION_OFFSET // 512), "-H", "255", "-S", "63", "-s", "512", str(path)
    )


@contextmanager
def _mounted(volume: Path, *options: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        _run("ntfs-3g", *options, str(volume), folder)
        try:
            yield Path(folder)
        finally:
            _run("umount", folder)


def _live_on(root: Path, scale: float, contents: Contents) -> None:
    (root / "Windows").mkdir()
    for file in (*_system_files(scale), *_first_files(scale)):
        _write(root, file, contents)
    os.sync()
    for file in _first_files(scale):
        if not file.stays:
            (root / file.path).unlink()
    for file in _later_files(scale):
        _write(root, file, contents)


def _write(root: Path, file: _File, contents: Contents) -> None:
    with (root / file.path).open("wb") as written:
        for piece in contents.pieces(file.path, file.kind, file.size):
            written.write(piece)


def _put_into_partition(volume: Path, disk: Path) -> None:
    size = volume.stat().st_size + 2 * _PARTITION_OFFSET
    with disk.open("wb") as file:
        file.truncate(size)
    first, count = _PARTITION_OFFSET // 512, volume.stat().st_size // 512
    _run("sfdisk", "--quiet", str(disk), given=f"label: dos\nstart={first}, size={count}, type=7, bootable\n")
    copy_data(volume, disk, _PARTITION_OFFSET)


def _run(program: str, *arguments: str, given: str = "") -> None:
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise CannotMakeError(f"{program} is not installed")
    done = subprocess.run([found, *arguments], input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotMakeError(f"{program}: {(done.stderr or done.stdout).strip()}")
