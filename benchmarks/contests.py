"""What is compared with what, over which disk, and which bar Thrave has to clear: two literal tables.

Nothing is run here. The bars were set before anything was measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import inputs
import psutil
from contenders import (
    Contender,
    Keys,
    components,
    shell_opening,
    shell_sealing,
    thrave_both_ways,
    thrave_bundle,
    thrave_opening,
    thrave_sealing,
)
from extents import stored_bytes
from inputs import GIB, MIB, SEED, TIB, Kitchen, Recipe
from measure import Run, Step, run
from rows import Row, Rows
from serving import thrave_killed, thrave_serving
from windows import CannotMakeError, has_its_files


@dataclass(frozen=True)
class Sizes:
    """How large the disks are, in bytes."""

    against_slow: int = 256 * MIB
    against_fast: int = 2 * GIB
    sealed: int = 4 * GIB
    sparse: int = 30 * GIB
    memory: tuple[int, int] = (GIB, 30 * GIB)
    served: int = 8 * GIB
    windows_scale: float = 1.0


QUICK = Sizes(64 * MIB, 256 * MIB, 256 * MIB, 4 * GIB, (128 * MIB, GIB), 512 * MIB, 1 / 8)


@dataclass(frozen=True)
class Bench:
    """Where contests take place.

    Attributes:
        kitchen: gives the disks.
        scratch: a folder on tmpfs for keys, and bundles that are made to be opened.
        sizes: of the disks.
        disks: those that were asked for.
    """

    kitchen: Kitchen
    scratch: Path
    sizes: Sizes = field(default_factory=Sizes)
    disks: set[Path] = field(default_factory=set)

    @cached_property
    def keys(self) -> Keys:
        """Those of all bundles."""
        return Keys.made_in(self.scratch)

    def disk(self, recipe: Recipe) -> tuple[Path, int]:
        """A disk, and how many bytes of data it has."""
        path = self.kitchen.disk(recipe)
        self.disks.add(path)
        return path, stored_bytes(path)


@dataclass(frozen=True)
class Contest:
    """Contenders over the same data.

    Attributes:
        name: short, for the command line.
        title: for the table.
        contenders: readies the disks and gives them.
        minutes: about how long it takes on two cores, the disks being there.
        rounds: fewer than usual, where one takes minutes.
    """

    name: str
    title: str
    contenders: Callable[[Bench], Sequence[Contender]]
    minutes: float
    rounds: int = 5


@dataclass(frozen=True)
class Bar:
    """What Thrave has to show in a contest.

    Attributes:
        contest: its name.
        claim: in words, with the bar in it.
        value: the figure that was measured.
        least: the figure must not be less.
        most: … nor more.
        limit: what sets the limit where the bar is missed, with the figure that was measured beside it.
    """

    contest: str
    claim: str
    value: Callable[[Rows], float]
    least: float = 0.0
    most: float = float("inf")
    limit: Callable[[Rows], str] = lambda _: ""


def _sealing(bench: Bench) -> list[Contender]:
    disk, data = bench.disk(inputs.mixed(bench.sizes.sealed))
    small, little = bench.disk(inputs.mixed(bench.sizes.against_slow))
    compressors = ("gzip -9", "gzip -6", "pigz -p2", "igzip -1")
    one_core = ("taskset", "--cpu-list", "0")
    return [
        thrave_sealing("thrave", disk, data, bench.keys),
        thrave_sealing("thrave, one core", disk, data, bench.keys, before=one_core),
        components("components alone", "sealing", disk, data),
        thrave_sealing("thrave, rivals' disk", small, little, bench.keys),
        *(shell_sealing(compressor, small, little, *compressor.split()) for compressor in compressors),
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
    return [
        thrave_opening("thrave open", folder, disk, data, bench.keys),
        shell_opening("openssl | gzip -d | tar", folder, disk, data, bench.keys),
        components("inflating alone", "inflating", disk, data, cores=1),
    ]


def _memory(bench: Bench) -> list[Contender]:
    room = bench.sizes.memory[1] // 2 + 4 * GIB
    if psutil.virtual_memory().available < room:
        raise CannotMakeError(f"the bundle on tmpfs takes {room / GIB:.0f} GiB of memory, which are not free")
    names = zip(("little data", "30 times as much"), bench.sizes.memory, strict=True)
    return [thrave_both_ways(name, *bench.disk(inputs.mixed(size)), bench.keys) for name, size in names]


def _served(bench: Bench) -> list[Contender]:
    disk, data = bench.disk(inputs.mixed(bench.sizes.served))
    return [
        thrave_sealing("thrave bundle", disk, data, bench.keys),
        thrave_serving("thrave serve", disk, data),
        thrave_killed("killed at half", disk, data),
        components("read and SHA-1 alone", "proving", disk, data, cores=1),
    ]


CONTESTS = (
    Contest("seal", "Sealing, beside the pipeline of Amazon's tool and what the libraries need alone", _sealing, 11),
    Contest("incompressible", "Sealing random bytes", _incompressible, 1),
    Contest("sparse", "Sealing the same data, with holes between", _sparse, 2),
    Contest("windows", "Sealing an NTFS disk with deleted files and a page file", _windows, 4),
    Contest("empty", "Sealing 2 TiB of nothing", _empty, 0.1),
    Contest("open", "Opening with every check, beside a pipeline with none", _opening, 3.5),
    Contest("memory", "Sealing and opening little and much data: memory", _memory, 4, rounds=1),
    Contest("serve", "From BundleInstance to complete, in one go and killed at half", _served, 6, rounds=3),
)


def _pace(one: str, other: str) -> Callable[[Rows], float]:
    """How many times as long as the other one takes for as much data."""
    return lambda rows: rows[one].pace / rows[other].pace


def _effort(one: str, other: str) -> Callable[[Rows], float]:
    """How many times the other's CPU seconds one takes for as much data."""
    return lambda rows: rows[one].effort / rows[other].effort


def _size(one: str, other: str) -> Callable[[Rows], float]:
    return lambda rows: rows[one].median.size / rows[other].median.size


def _median(name: str, figure: Callable[[Run], float]) -> Callable[[Rows], float]:
    return lambda rows: figure(rows[name].median)


def _memory_ratio(figure: Callable[[Run], float]) -> Callable[[Rows], float]:
    return lambda rows: figure(rows["30 times as much"].median) / figure(rows["little data"].median)


def _again(rows: Rows) -> float:
    """CPU seconds that the restart cost, for each GiB that was done before."""
    killed = rows["killed at half"].median
    return (killed.cpu - rows["thrave serve"].median.cpu) / killed.detail["GiB done"]


def _shares(row: Row) -> str:
    """The components' shares of their CPU time, the largest first."""
    detail = row.median.detail
    total = sum(detail.values())
    largest = sorted(detail, key=lambda component: detail[component], reverse=True)[:3]
    return ", ".join(f"{component} {detail[component] / total:.0%}" for component in largest)


def _alone(rival: str, measure: Callable[[str, str], Callable[[Rows], float]]) -> Callable[[Rows], str]:
    """What the bar's figure would be if nothing but the libraries took time."""
    return lambda rows: (
        f"the libraries alone: {measure(rival, 'components alone')(rows):.3g} ({_shares(rows['components alone'])})"
    )


def _busy(rows: Rows) -> str:
    return f"{rows['thrave'].median.cpu / rows['components alone'].median.cpu:.3g} of the libraries' CPU time"


def _cpu_per_gib(*names: str) -> Callable[[Rows], str]:
    return lambda rows: ", ".join(f"{name}: {rows[name].effort * GIB:.2f} CPU s/GiB" for name in names)


def _inflating(rows: Rows) -> str:
    return f"one thread that only inflates: {_pace('openssl | gzip -d | tar', 'inflating alone')(rows):.3g}"


BARS = (
    Bar("seal", "at least 45 times as fast as with gzip -9",
        _pace("gzip -9", "thrave"), least=45, limit=_alone("gzip -9", _pace)),
    Bar("seal", "at least 25 times less CPU than with gzip -9",
        _effort("gzip -9", "thrave"), least=25, limit=_alone("gzip -9", _effort)),
    Bar("seal", "bundle at most 1.08 times that of gzip -9", _size("thrave, rivals' disk", "gzip -9"), most=1.08),
    Bar("seal", "at least 14 times as fast as with gzip -6",
        _pace("gzip -6", "thrave"), least=14, limit=_alone("gzip -6", _pace)),
    Bar("seal", "at least 7 times as fast as with pigz -p2",
        _pace("pigz -p2", "thrave"), least=7, limit=_alone("pigz -p2", _pace)),
    Bar("seal", "at least 2.2 times as fast as with igzip -1",
        _pace("igzip -1", "thrave"), least=2.2, limit=_alone("igzip -1", _pace)),
    Bar("seal", "0 bytes written besides the bundle", _median("thrave", lambda run: run.written + run.staged), most=0),
    Bar("seal", "at least 0.87 of the components' limit",
        _pace("components alone", "thrave"), least=0.87, limit=_busy),
    Bar("seal", "two cores at least 1.6 times as fast as one", _pace("thrave, one core", "thrave"), least=1.6),
    Bar("incompressible", "bundle at most 1.001 times that of igzip -1", _size("thrave", "igzip -1"), most=1.001),
    Bar("sparse", "holes: at most 1.05 times the time without",
        _pace("as extents of a larger disk", "all of the disk"), most=1.05,
        limit=_cpu_per_gib("as extents of a larger disk", "all of the disk")),
    Bar("windows", "skip = unused: at most 0.5 of the size", _size("skip = unused", "skip = nothing"), most=0.5),
    Bar("windows", "skip = unused: at most 0.5 of the CPU", _effort("skip = unused", "skip = nothing"), most=0.5),
    Bar("empty", "2 TiB of nothing in at most 10 s", _median("thrave", lambda run: run.wall), most=10),
    Bar("empty", "… and at most 1 MiB", _median("thrave", lambda run: run.size / MIB), most=1),
    Bar("open", "at least 3.3 times as fast as the pipeline",
        _pace("openssl | gzip -d | tar", "thrave open"), least=3.3, limit=_inflating),
    Bar("memory", "sealing: at most 200 MiB for 30 times the data",
        _median("30 times as much", lambda run: run.memory / MIB), most=200),
    Bar("memory", "… and at most 1.1 times the memory", _memory_ratio(lambda run: run.memory), most=1.1),
    Bar("memory", "opening: at most 200 MiB for 30 times the data",
        _median("30 times as much", lambda run: run.detail["memory to open"] / MIB), most=200),
    Bar("memory", "… and at most 1.1 times the memory", _memory_ratio(lambda run: run.detail["memory to open"]),
        most=1.1),
    Bar("serve", "as a service: at most 1.15 times the time",
        _pace("thrave serve", "thrave bundle"), most=1.15, limit=_cpu_per_gib("thrave serve", "thrave bundle")),
    Bar("serve", "killed at half: the next part within 1 s",
        _median("killed at half", lambda run: run.detail["first new part"]), most=1),
    Bar("serve", "… no part sent twice but the one under way",
        _median("killed at half", lambda run: run.detail["sent twice"]), most=1),
    Bar("serve", "… at most 0.8 CPU s for each GiB done before",
        _again, most=0.8, limit=_cpu_per_gib("read and SHA-1 alone")),
)  # fmt: skip
"""What the table ends with. A bar whose contender is not there was not measured."""
