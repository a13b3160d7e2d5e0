"""What is compared with what, over which disk, and which bar Thrave has to clear: two literal tables.

Nothing is run here. The bars were set before anything was measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import inputs
import psutil
from contenders import (
    Contender,
    Keys,
    component_limit,
    shell_opening,
    shell_sealing,
    thrave_bundle,
    thrave_opening,
    thrave_sealing,
)
from extents import stored_bytes
from inputs import GIB, MIB, SEED, TIB, Kitchen, Recipe
from measure import Run, Step, run
from serving import thrave_killed, thrave_serving
from windows import CannotMakeError, has_its_files


@dataclass(frozen=True)
class Sizes:
    """How large the disks are, in bytes."""

    against_slow: int = GIB
    against_fast: int = 2 * GIB
    sparse: int = 30 * GIB
    memory: tuple[int, int] = (GIB, 30 * GIB)
    served: int = 8 * GIB
    windows_scale: float = 1.0


QUICK = Sizes(64 * MIB, 256 * MIB, 4 * GIB, (128 * MIB, GIB), 512 * MIB, 1 / 8)


@dataclass(frozen=True)
class Bench:
    """Where contests take place.

    Attributes:
        kitchen: gives the disks.
        scratch: a folder on tmpfs for keys, and for bundles that are made to be opened.
        sizes: of the disks.
    """

    kitchen: Kitchen
    scratch: Path
    sizes: Sizes = field(default_factory=Sizes)

    @cached_property
    def keys(self) -> Keys:
        """Those of all bundles."""
        return Keys.made_in(self.scratch)

    def disk(self, recipe: Recipe) -> tuple[Path, int]:
        """A disk, and how many bytes of data it has."""
        path = self.kitchen.disk(recipe)
        return path, stored_bytes(path)


@dataclass(frozen=True)
class Contest:
    """Contenders over the same data.

    Attributes:
        name: short, for the command line.
        title: for the table.
        contenders: readies the disks and gives them.
        rounds: fewer than usual, where one takes minutes.
    """

    name: str
    title: str
    contenders: Callable[[Bench], Sequence[Contender]]
    rounds: int = 5


Medians = Mapping[str, Run]
"""By the contenders' names."""


@dataclass(frozen=True)
class Bar:
    """What Thrave has to show in a contest.

    Attributes:
        contest: its name.
        claim: in words, with the bar in it.
        value: the figure that was measured.
        least: the figure must not be less.
        most: … nor more.
    """

    contest: str
    claim: str
    value: Callable[[Medians], float]
    least: float = 0.0
    most: float = float("inf")


def _against_shell(bench: Bench) -> list[Contender]:
    disk, data = bench.disk(inputs.mixed(bench.sizes.against_slow))
    compressors = ("gzip -9", "gzip -6", "pigz -p2", "igzip -1")
    rivals = [shell_sealing(compressor, disk, data, *compressor.split()) for compressor in compressors]
    return [thrave_sealing("thrave", disk, data, bench.keys), *rivals]


def _against_limit(bench: Bench) -> list[Contender]:
    disk, data = bench.disk(inputs.mixed(bench.sizes.against_fast))
    one_core = ("taskset", "--cpu-list", "0")
    return [
        thrave_sealing("thrave", disk, data, bench.keys),
        thrave_sealing("thrave, one core", disk, data, bench.keys, before=one_core),
        component_limit("components alone", disk, data),
    ]


def _incompressible(bench: Bench) -> list[Contender]:
    disk, data = bench.disk(inputs.incompressible(bench.sizes.against_slow))
    rival = shell_sealing("igzip -1", disk, data, "igzip", "-1")
    return [thrave_sealing("thrave", disk, data, bench.keys), rival]


def _sparse(bench: Bench) -> list[Contender]:
    recipes = {
        "all of the disk": inputs.mixed(bench.sizes.against_fast),
        "as extents of a larger disk": inputs.sparse(bench.sizes.sparse, bench.sizes.against_fast, 1825),
    }
    return [thrave_sealing(name, *bench.disk(recipe), bench.keys) for name, recipe in recipes.items()]


def _windows(bench: Bench) -> list[Contender]:
    disk, data = bench.disk(inputs.windows(bench.sizes.windows_scale))
    everything = thrave_sealing("skip = nothing", disk, data, bench.keys)
    is_same = partial(has_its_files, scale=bench.sizes.windows_scale, seed=SEED)
    skipping = thrave_sealing("skip = unused", disk, data, bench.keys, "--skip", "unused", is_same=is_same)
    return [everything, skipping]


def _empty(bench: Bench) -> list[Contender]:
    return [thrave_sealing("thrave", *bench.disk(inputs.empty(2 * TIB)), bench.keys)]


def _opening(bench: Bench) -> list[Contender]:
    disk, data = bench.disk(inputs.mixed(bench.sizes.against_fast))
    folder = bench.scratch / "to-open"
    run([Step([thrave_bundle(disk, bench.keys, folder)])])
    ours = thrave_opening("thrave open", folder, disk, data, bench.keys)
    return [ours, shell_opening("openssl | gzip -d | tar", folder, disk, data, bench.keys)]


def _memory(bench: Bench) -> list[Contender]:
    room = bench.sizes.memory[1] // 2 + 4 * GIB
    if psutil.virtual_memory().available < room:
        raise CannotMakeError(f"the bundle on tmpfs takes {room / GIB:.0f} GiB of memory, which are not free")
    names = zip(("little data", "30 times as much"), bench.sizes.memory, strict=True)
    return [thrave_sealing(name, *bench.disk(inputs.mixed(size)), bench.keys) for name, size in names]


def _served(bench: Bench) -> list[Contender]:
    disk, data = bench.disk(inputs.mixed(bench.sizes.served))
    return [thrave_sealing("thrave bundle", disk, data, bench.keys), thrave_serving("thrave serve", disk, data)]


def _restart(bench: Bench) -> list[Contender]:
    disk, data = bench.disk(inputs.mixed(bench.sizes.served))
    return [thrave_serving("in one go", disk, data), thrave_killed("killed at half", disk, data)]


CONTESTS = (
    Contest("shell", "Sealing, beside the pipeline of Amazon's tool with four compressors", _against_shell),
    Contest("limit", "Sealing, beside what the libraries need on their own", _against_limit),
    Contest("incompressible", "Sealing random bytes", _incompressible),
    Contest("sparse", "Sealing the same data, with holes between", _sparse),
    Contest("windows", "Sealing an NTFS disk with deleted files and a page file", _windows),
    Contest("empty", "Sealing 2 TiB of nothing", _empty),
    Contest("open", "Opening with every check, beside a pipeline with none", _opening),
    Contest("memory", "Sealing little and much data: memory", _memory, rounds=1),
    Contest("serve", "From BundleInstance to complete, beside the command", _served, rounds=3),
    Contest("restart", "The same with the service killed at half of it, and started again", _restart, rounds=3),
)


def _wall(one: str, other: str) -> Callable[[Medians], float]:
    """How many times one's wall time is the other's."""
    return lambda of: of[one].wall / of[other].wall


def _cpu(one: str, other: str) -> Callable[[Medians], float]:
    return lambda of: of[one].cpu / of[other].cpu


def _size(one: str, other: str) -> Callable[[Medians], float]:
    return lambda of: of[one].size / of[other].size


def _memory_ratio(of: Medians) -> float:
    return of["30 times as much"].memory / of["little data"].memory


def _again(of: Medians) -> float:
    """CPU seconds that the restart cost, for each GiB that was done before."""
    return (of["killed at half"].cpu - of["in one go"].cpu) / of["killed at half"].detail["GiB done"]


BARS = (
    Bar("shell", "at least 45 times as fast as with gzip -9", _wall("gzip -9", "thrave"), least=45),
    Bar("shell", "at least 25 times less CPU than with gzip -9", _cpu("gzip -9", "thrave"), least=25),
    Bar("shell", "bundle at most 1.08 times that of gzip -9", _size("thrave", "gzip -9"), most=1.08),
    Bar("shell", "at least 14 times as fast as with gzip -6", _wall("gzip -6", "thrave"), least=14),
    Bar("shell", "at least 7 times as fast as with pigz -p2", _wall("pigz -p2", "thrave"), least=7),
    Bar("shell", "at least 2.2 times as fast as with igzip -1", _wall("igzip -1", "thrave"), least=2.2),
    Bar("shell", "0 bytes written besides the bundle", lambda of: of["thrave"].written + of["thrave"].staged, most=0),
    Bar("limit", "at least 0.87 of the components' limit", _wall("components alone", "thrave"), least=0.87),
    Bar("limit", "two cores at least 1.6 times as fast as one", _wall("thrave, one core", "thrave"), least=1.6),
    Bar("incompressible", "bundle at most 1.001 times that of igzip -1", _size("thrave", "igzip -1"), most=1.001),
    Bar("sparse", "holes: at most 1.05 times the time without",
        _wall("as extents of a larger disk", "all of the disk"), most=1.05),
    Bar("windows", "skip = unused: at most 0.5 of the size", _size("skip = unused", "skip = nothing"), most=0.5),
    Bar("windows", "skip = unused: at most 0.5 of the CPU", _cpu("skip = unused", "skip = nothing"), most=0.5),
    Bar("empty", "2 TiB of nothing in at most 10 s", lambda of: of["thrave"].wall, most=10),
    Bar("empty", "… and at most 1 MiB", lambda of: of["thrave"].size / MIB, most=1),
    Bar("open", "at least 3.3 times as fast as the pipeline",
        _wall("openssl | gzip -d | tar", "thrave open"), least=3.3),
    Bar("memory", "at most 200 MiB for 30 times the data", lambda of: of["30 times as much"].memory / MIB, most=200),
    Bar("memory", "30 times the data: at most 1.1 times the memory", _memory_ratio, most=1.1),
    Bar("serve", "as a service: at most 1.15 times the time", _wall("thrave serve", "thrave bundle"), most=1.15),
    Bar("restart", "killed at half: the next part within 1 s",
        lambda of: of["killed at half"].detail["first new part"], most=1),
    Bar("restart", "… no part sent twice but the one under way",
        lambda of: of["killed at half"].detail["sent twice"], most=1),
    Bar("restart", "… at most 0.8 CPU s for each GiB done before", _again, most=0.8),
)  # fmt: skip
"""What the table ends with. A bar whose contender is not there was not measured."""
