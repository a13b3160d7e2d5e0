"""The figures as a table, as JSON and as a plot: what was measured, medians, and whether each bar is met.

Nothing is measured here, and nothing left out: a contest that could not be held says why.
"""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from contenders import Contender
from contests import Bar
from inputs import GIB, MIB
from measure import CORES, Run

_LIBRARIES = ("isal", "cryptography", "thrave")
_PROGRAMS = ("gzip", "pigz", "igzip", "openssl", "tar")
_NOISY = 0.05
_HEAD = ("", "MB/s", "wall s", "min-max", "CPU s/GiB", "memory MiB", "bundle MB", "besides MB", "others")


@dataclass(frozen=True)
class Result:
    """What came of a contest.

    Attributes:
        name: the contest's.
        title: for people.
        contenders: in the table's order.
        runs: by contender, one for each round.
        reason: why it was not held.
    """

    name: str
    title: str
    contenders: tuple[Contender, ...]
    runs: Mapping[str, Sequence[Run]]
    reason: str = ""

    @property
    def medians(self) -> dict[str, Run]:
        """Each figure's median, by contender."""
        return {name: _median(runs) for name, runs in self.runs.items()}


def table(results: Sequence[Result], bars: Sequence[Bar]) -> str:
    """All figures, then the bars, as text."""
    lines = [_columns([_HEAD, *_rows(result)], result.title, result.reason) for result in results]
    verdicts = [("bar", "measured", "")] + [
        (bar.claim, "not measured" if value is None else f"{value:.3g}", "" if met is None else _word(met))
        for bar, value, met in _judged(results, bars)
    ]
    return "\n".join(["", *lines, _columns(verdicts, "The bars")])


def document(results: Sequence[Result], bars: Sequence[Bar]) -> dict[str, object]:
    """Everything, as JSON has it."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "contests": [_contest(result) for result in results],
        "bars": [
            {"contest": bar.contest, "claim": bar.claim, "value": value, "met": met}
            for bar, value, met in _judged(results, bars)
        ],
    }


def write_json(path: Path, results: Sequence[Result], bars: Sequence[Bar]) -> None:
    """Write the document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(results, bars), indent=1) + "\n")


def _median(runs: Sequence[Run]) -> Run:
    figures = ("wall", "cpu", "memory", "written", "staged", "foreign", "size")
    return Run(**{name: median(getattr(run, name) for run in runs) for name in figures})


def _rows(result: Result) -> Iterator[tuple[str, ...]]:
    for contender in result.contenders:
        runs, middle = result.runs[contender.name], result.medians[contender.name]
        walls = [run.wall for run in runs]
        noisy = any(run.foreign > _NOISY for run in runs)
        yield (
            contender.name,
            f"{contender.data / middle.wall / 1e6:.0f}" if contender.data else "",
            f"{middle.wall:.2f}",
            f"{min(walls):.2f}-{max(walls):.2f}",
            f"{middle.cpu / contender.data * GIB:.2f}" if contender.data else "",
            f"{middle.memory / MIB:.0f}",
            f"{middle.size / 1e6:.1f}",
            f"{(middle.written + middle.staged) / 1e6:.1f}",
            f"{middle.foreign:.0%}{' noisy' if noisy else ''}",
        )


def _judged(results: Sequence[Result], bars: Sequence[Bar]) -> Iterator[tuple[Bar, float | None, bool | None]]:
    medians = {result.name: result.medians for result in results}
    for bar in bars:
        try:
            value = bar.value(medians[bar.contest])
        except KeyError:  # the contest was not held, or one of its contenders is not there
            yield bar, None, None
        else:
            yield bar, value, bar.least <= value <= bar.most


def _word(met: bool) -> str:  # noqa: FBT001 (it is the whole question)
    return "met" if met else "NOT MET"


def _columns(rows: Sequence[Sequence[str]], title: str, note: str = "") -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([title, *([f"  not held: {note}"] if note else lines), ""])


def _contest(result: Result) -> dict[str, object]:
    contenders = [
        {
            "name": contender.name,
            "data": contender.data,
            "median": asdict(result.medians[contender.name]),
            "runs": [asdict(run) for run in result.runs[contender.name]],
        }
        for contender in result.contenders
    ]
    return {"name": result.name, "title": result.title, "reason": result.reason, "contenders": contenders}


def _machine() -> dict[str, object]:
    cpu = dict(
        line.split("\t: ", 1)
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        if "\t: " in line
    )
    flags = {"sha_ni", "aes", "vaes", "avx2", "avx512f"} & set(cpu.get("flags", "").split())
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "flags": sorted(flags),
        "cores": CORES,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "programs": {name: _program_version(name) for name in _PROGRAMS},
    }


def _program_version(name: str) -> str:
    if shutil.which(name) is None:
        return "not installed"
    argument = "version" if name == "openssl" else "--version"
    said = subprocess.run([name, argument], capture_output=True, text=True, check=False)
    return (said.stdout or said.stderr).splitlines()[0]
