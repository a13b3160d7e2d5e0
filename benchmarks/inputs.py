"""The disks that are sealed: made from a seed, kept in a folder outside the checkout, never of the machine's own files.

Each is a Recipe. What was made once is found again by a digest of the recipe and of the code that follows it, and can
be deleted at any time. Written zeros are written: a file system has to keep them, unlike holes.
"""

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from contents import Contents, Kind
from windows import CannotMakeError, make_windows_disk

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
SHARES: dict[Kind, float] = {"program": 0.5, "random": 0.2, "text": 0.1, "zeros": 0.2}
"""Of a mixed disk's bytes."""

SEED = 20071010
_BLOCK = 4096
_RESERVE = 4 * GIB  # that a disk must leave free
_LARGEST_FILE = 8 * MIB
_SOURCES = ("contents.py", "extents.py", "inputs.py", "windows.py")


@dataclass(frozen=True)
class Recipe:
    """One disk.

    Attributes:
        name: of its file.
        make: writes it.
        stored: about how many bytes of disk it takes.
    """

    name: str
    make: Callable[[Path, "Kitchen"], None]
    stored: int


class Kitchen:
    """Makes disks, and finds again those that were made.

    Args:
        folder: where they are kept; on a real file system, which knows holes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def disk(self, recipe: Recipe) -> Path:
        """The disk, made now unless it is there.

        Raises:
            CannotMakeError: no room for it, or something that makes it is missing.
        """
        path = self._folder / f"{recipe.name}-{_digest(recipe)}.raw"
        if not path.exists():
            print(f"making {path} …", flush=True)
            for outdated in self._folder.glob(f"{recipe.name}-*"):
                outdated.unlink()
            if shutil.disk_usage(self._folder).free < recipe.stored + _RESERVE:
                raise CannotMakeError(f"{path} needs {recipe.stored / GIB:.0f} GiB, which are not free")
            unfinished = path.with_suffix(".unfinished")
            recipe.make(unfinished, self)
            unfinished.rename(path)
        return path


def mixed(size: int) -> Recipe:
    """Files of all kinds in a shuffled order, at whole blocks, as a disk's data are; no holes."""

    def make(path: Path, _: Kitchen) -> None:
        _write(path, _mixed_files(size))

    return Recipe(f"mixed-{size // MIB}MiB", make, size)


def incompressible(size: int) -> Recipe:
    """Random bytes."""

    def make(path: Path, _: Kitchen) -> None:
        _write(path, [("random", "random", size)])

    return Recipe(f"incompressible-{size // MIB}MiB", make, size)


def sparse(virtual: int, data: int, extents: int) -> Recipe:
    """The bytes of the mixed disk of size `data`, as extents at places all over a larger disk."""

    def make(path: Path, kitchen: Kitchen) -> None:
        with kitchen.disk(mixed(data)).open("rb") as source, path.open("wb") as disk:
            disk.truncate(virtual)
            for place, start, length in _scattered(virtual, data, extents):
                os.pwrite(disk.fileno(), os.pread(source.fileno(), length, start), place)

    return Recipe(f"sparse-{virtual // GIB}GiB-with-{data // MIB}MiB", make, data)


def empty(virtual: int) -> Recipe:
    """One hole."""

    def make(path: Path, _: Kitchen) -> None:
        with path.open("wb") as disk:
            disk.truncate(virtual)

    return Recipe(f"empty-{virtual // GIB}GiB", make, 0)


def windows(scale: float) -> Recipe:
    """An NTFS disk of 8 GiB times `scale` that has been lived on; see `windows.py`."""

    def make(path: Path, _: Kitchen) -> None:
        make_windows_disk(path, scale, SEED)

    return Recipe(f"windows-{int(8192 * scale)}MiB", make, int(8192 * scale) * MIB)


def _mixed_files(size: int) -> list[tuple[str, Kind, int]]:
    """Name, kind and size in bytes of files that together have `size`, in the order in which they stand on the disk."""
    dice = random.Random(f"{SEED}:{size}")
    files = [file for kind, share in SHARES.items() for file in _files_of(kind, int(size * share), dice)]
    dice.shuffle(files)
    missing = size - sum(length for *_, length in files)
    return [*files, ("rest", "random", missing)]


def _files_of(kind: Kind, budget: int, dice: random.Random) -> Iterator[tuple[str, Kind, int]]:
    number = 0
    while budget >= _BLOCK:
        blocks = int(dice.lognormvariate(4, 1.5)) + 1
        length = min(blocks * _BLOCK, _LARGEST_FILE, budget // _BLOCK * _BLOCK)
        yield f"{kind} {number}", kind, length
        budget, number = budget - length, number + 1


def _scattered(virtual: int, data: int, extents: int) -> Iterator[tuple[int, int, int]]:
    """Place on the disk, place in the data, and length of each extent; holes between all of them."""
    dice = random.Random(f"{SEED}:{virtual}:{data}")
    cuts = sorted(dice.sample(range(1, data // _BLOCK), extents - 1))
    gaps = sorted(dice.sample(range(1, (virtual - data) // _BLOCK), extents))
    bounds = [0, *cuts, data // _BLOCK]
    for gap, start, end in zip(gaps, bounds[:-1], bounds[1:], strict=True):
        yield (gap + start) * _BLOCK, start * _BLOCK, (end - start) * _BLOCK


def _write(path: Path, files: list[tuple[str, Kind, int]]) -> None:
    contents = Contents(SEED)
    with path.open("wb") as disk:
        for name, kind, size in files:
            for piece in contents.pieces(name, kind, size):
                disk.write(piece)


def _digest(recipe: Recipe) -> str:
    code = b"".join(Path(__file__).with_name(name).read_bytes() for name in _SOURCES)
    return hashlib.sha256(f"{recipe.name}:{SEED}".encode() + code).hexdigest()[:12]
