"""Data: which programs are compared with each other, on which disk, and which targets Thrave must meet.

Nothing runs here. The targets were set before anything was measured.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import disks
from contenders import (
    Contender,
    Libraries,
    ShellBundle,
    ShellOpen,
    ThraveBundle,
    ThraveBundleAndOpen,
    ThraveKilled,
    ThraveOpen,
    ThraveServe,
)
from disks import GIB, MIB, TIB
from harness import Result, Row, Rows, Run


@dataclass(frozen=True)
class Sizes:
    """Sizes of the disks, in bytes."""

    against_slow: int = 256 * MIB
    against_fast: int = 2 * GIB
    sealed: int = 4 * GIB
    sparse: int = 30 * GIB
    memory: tuple[int, int] = (GIB, 30 * GIB)
    served: int = 8 * GIB
    windows_scale: float = 1.0


FULL = Sizes()
QUICK = Sizes(64 * MIB, 256 * MIB, 256 * MIB, 4 * GIB, (128 * MIB, GIB), 512 * MIB, 1 / 8)


@dataclass(frozen=True)
class Contest:
    """Programs that process the same data.

    Attributes:
        name: Short, for the command line.
        title: For the table.
        minutes: About how long it takes on two cores, without making the disks.
        contenders: The programs.
        rounds: How often each of them runs.
        memory: Bytes of free memory that are needed for bundles on tmpfs.
    """

    name: str
    title: str
    minutes: float
    contenders: Sequence[Contender]
    rounds: int = 5
    memory: int = 0


def list_contests(sizes: Sizes) -> tuple[Contest, ...]:
    """Return all contests, on disks of these sizes."""
    small, medium, large = (disks.mixed(size) for size in (sizes.against_slow, sizes.against_fast, sizes.sealed))
    noise, served, windows = (
        disks.incompressible(sizes.against_slow),
        disks.mixed(sizes.served),
        disks.windows(sizes.windows_scale),
    )
    has_files = partial(disks.has_windows_files, scale=sizes.windows_scale)
    return (
        Contest(
            "seal", "Sealing, compared with the pipeline of Amazon's tool and with the libraries alone", 11,
            (
                ThraveBundle("thrave", large),
                ThraveBundle("thrave, one core", large, wrapper=("taskset", "--cpu-list", "0")),
                Libraries("components alone", large, "sealing"),
                ThraveBundle("thrave, rivals' disk", small),
                ShellBundle("gzip -9", small),
                ShellBundle("gzip -6", small),
                ShellBundle("pigz -p2", small),
                ShellBundle("igzip -1", small),
            ),
        ),
        Contest("incompressible", "Sealing random bytes", 1,
            (ThraveBundle("thrave", noise), ShellBundle("igzip -1", noise)),
        ),
        Contest("sparse", "Sealing the same data, with holes between", 2,
            (
                ThraveBundle("all of the disk", medium),
                ThraveBundle("as extents of a larger disk", disks.sparse(sizes.sparse, sizes.against_fast, 1825)),
            ),
        ),
        Contest("windows", "Sealing an NTFS disk with deleted files and a page file", 4,
            (
                ThraveBundle("all data", windows),
                ThraveBundle("skip_unused", windows, ("--skip-unused",), is_same=has_files),
            ),
        ),
        Contest("empty", "Sealing 2 TiB of nothing", 0.1, (ThraveBundle("thrave", disks.empty(2 * TIB)),)),
        Contest("open", "Opening with every check, compared with a pipeline without checks", 3.5,
            (
                ThraveOpen("thrave open", medium),
                ShellOpen("openssl | gzip -d | tar", medium),
                Libraries("inflating alone", medium, "inflating", cores=1),
            ),
        ),
        Contest("memory", "Sealing and opening little and much data: memory", 4,
            (
                ThraveBundleAndOpen("little data", disks.mixed(sizes.memory[0])),
                ThraveBundleAndOpen("30 times as much", disks.mixed(sizes.memory[1])),
            ),
            rounds=1, memory=sizes.memory[1] // 2 + 4 * GIB,
        ),
        Contest("serve", "From BundleInstance to complete, without interruption and killed at half", 6,
            (
                ThraveBundle("thrave bundle", served),
                ThraveServe("thrave serve", served),
                ThraveKilled("killed at half", served),
                Libraries("read and SHA-1 alone", served, "proving", cores=1),
            ),
            rounds=3,
        ),
    )  # fmt: skip


CONTESTS = list_contests(FULL)
QUICK_CONTESTS = list_contests(QUICK)


@dataclass(frozen=True)
class Target:
    """A figure that Thrave must reach in a contest.

    Attributes:
        contest: Its name.
        claim: The target in words.
        value: Calculates the figure.
        least: Lower limit of the figure.
        most: Upper limit of the figure.
        limit: If the target is not met, says what limits the figure, with another measured figure.
    """

    contest: str
    claim: str
    value: Callable[[Rows], float]
    least: float = 0.0
    most: float = float("inf")
    limit: Callable[[Rows], str] = lambda _: ""


def _pace(one: str, other: str) -> Callable[[Rows], float]:
    """Time of one for each byte, divided by that of the other."""
    return lambda rows: rows[one].pace / rows[other].pace


def _effort(one: str, other: str) -> Callable[[Rows], float]:
    """CPU time of one for each byte, divided by that of the other."""
    return lambda rows: rows[one].effort / rows[other].effort


def _size(one: str, other: str) -> Callable[[Rows], float]:
    return lambda rows: rows[one].median.size / rows[other].median.size


def _median(name: str, figure: Callable[[Run], float]) -> Callable[[Rows], float]:
    return lambda rows: figure(rows[name].median)


def _memory_ratio(figure: Callable[[Run], float]) -> Callable[[Rows], float]:
    return lambda rows: figure(rows["30 times as much"].median) / figure(rows["little data"].median)


def _restart_cost(rows: Rows) -> float:
    """CPU seconds that the restart cost, for each GiB that was sealed before."""
    killed = rows["killed at half"].median
    return (killed.cpu - rows["thrave serve"].median.cpu) / killed.detail["GiB done"]


def _shares(row: Row) -> str:
    """Shares of the components in the CPU time, the three largest first."""
    detail = row.median.detail
    total = sum(detail.values())
    largest = sorted(detail, key=lambda component: detail[component], reverse=True)[:3]
    return ", ".join(f"{component} {detail[component] / total:.0%}" for component in largest)


def _libraries(rival: str, measure: Callable[[str, str], Callable[[Rows], float]]) -> Callable[[Rows], str]:
    """The figure of the target if only the libraries needed time."""
    return lambda rows: (
        f"the libraries alone: {measure(rival, 'components alone')(rows):.3g} ({_shares(rows['components alone'])})"
    )


def _cpu_of_libraries(rows: Rows) -> str:
    return f"{rows['thrave'].median.cpu / rows['components alone'].median.cpu:.3g} of the libraries' CPU time"


def _cpu_per_gib(*names: str) -> Callable[[Rows], str]:
    return lambda rows: ", ".join(f"{name}: {rows[name].effort * GIB:.2f} CPU s/GiB" for name in names)


def _inflating(rows: Rows) -> str:
    return f"one thread that only inflates: {_pace('openssl | gzip -d | tar', 'inflating alone')(rows):.3g}"


TARGETS = (
    Target("seal", "at least 45 times as fast as with gzip -9",
        _pace("gzip -9", "thrave"), least=45, limit=_libraries("gzip -9", _pace)),
    Target("seal", "at least 25 times less CPU than with gzip -9",
        _effort("gzip -9", "thrave"), least=25, limit=_libraries("gzip -9", _effort)),
    Target("seal", "bundle at most 1.08 times that of gzip -9", _size("thrave, rivals' disk", "gzip -9"), most=1.08),
    Target("seal", "at least 14 times as fast as with gzip -6",
        _pace("gzip -6", "thrave"), least=14, limit=_libraries("gzip -6", _pace)),
    Target("seal", "at least 7 times as fast as with pigz -p2",
        _pace("pigz -p2", "thrave"), least=7, limit=_libraries("pigz -p2", _pace)),
    Target("seal", "at least 2.2 times as fast as with igzip -1",
        _pace("igzip -1", "thrave"), least=2.2, limit=_libraries("igzip -1", _pace)),
    Target("seal", "no bytes written except for the bundle",
        _median("thrave", lambda run: run.written + run.staged), most=0),
    Target("seal", "at least 0.87 of the components' limit",
        _pace("components alone", "thrave"), least=0.87, limit=_cpu_of_libraries),
    Target("seal", "two cores at least 1.6 times as fast as one", _pace("thrave, one core", "thrave"), least=1.6),
    Target("incompressible", "bundle at most 1.001 times that of igzip -1", _size("thrave", "igzip -1"), most=1.001),
    Target("sparse", "holes: at most 1.05 times the time without",
        _pace("as extents of a larger disk", "all of the disk"), most=1.05,
        limit=_cpu_per_gib("as extents of a larger disk", "all of the disk")),
    Target("windows", "skip_unused: at most 0.5 of the size", _size("skip_unused", "all data"), most=0.5),
    Target("windows", "skip_unused: at most 0.5 of the CPU", _effort("skip_unused", "all data"), most=0.5),
    Target("empty", "2 TiB of nothing in at most 10 s", _median("thrave", lambda run: run.wall), most=10),
    Target("empty", "… and at most 1 MiB", _median("thrave", lambda run: run.size / MIB), most=1),
    Target("open", "at least 3.3 times as fast as the pipeline",
        _pace("openssl | gzip -d | tar", "thrave open"), least=3.3, limit=_inflating),
    Target("memory", "sealing: at most 200 MiB for 30 times the data",
        _median("30 times as much", lambda run: run.memory / MIB), most=200),
    Target("memory", "… and at most 1.1 times the memory", _memory_ratio(lambda run: run.memory), most=1.1),
    Target("memory", "opening: at most 200 MiB for 30 times the data",
        _median("30 times as much", lambda run: run.detail["memory to open"] / MIB), most=200),
    Target("memory", "… and at most 1.1 times the memory", _memory_ratio(lambda run: run.detail["memory to open"]),
        most=1.1),
    Target("serve", "as a service: at most 1.15 times the time",
        _pace("thrave serve", "thrave bundle"), most=1.15, limit=_cpu_per_gib("thrave serve", "thrave bundle")),
    Target("serve", "killed at half: the next part within 1 s",
        _median("killed at half", lambda run: run.detail["first new part"]), most=1),
    Target("serve", "… at most one part sent twice, that of the kill",
        _median("killed at half", lambda run: run.detail["sent twice"]), most=1),
    Target("serve", "… at most 0.8 CPU s for each GiB done before",
        _restart_cost, most=0.8, limit=_cpu_per_gib("read and SHA-1 alone")),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Whether a target is met; unknown if its contest could not run.

    Attributes:
        target: The target.
        value: The measured figure.
        is_met: Whether the figure is within its limits.
        limit: What limits the figure, if the target is not met.
    """

    target: Target
    value: float | None = None
    is_met: bool | None = None
    limit: str = ""


def judge(results: Sequence[Result]) -> Iterator[Verdict]:
    """Compare these results with their targets."""
    for target in TARGETS:
        for result in results:
            if result.name == target.contest and not result.rows:
                yield Verdict(target)
            elif result.name == target.contest:
                value = target.value(result.by_name)
                is_met = target.least <= value <= target.most
                yield Verdict(target, value, is_met, "" if is_met else target.limit(result.by_name))
