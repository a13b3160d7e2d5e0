"""What was measured, as data and as JSON: contests, their contenders' runs, and whether each bar is met.

A file of results keeps, for every contest, the last time that it was held, so that one of them can be held again.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from contests import BARS, Bar
from measure import Run

_FIGURES = ("wall", "cpu", "memory", "written", "staged", "foreign", "size")


@dataclass(frozen=True)
class Row:
    """One contender's runs.

    Attributes:
        name: the contender's.
        data: bytes of data that each run worked on.
        runs: one for each round.
    """

    name: str
    data: int
    runs: Sequence[Run]

    @property
    def median(self) -> Run:
        """Each figure's median."""
        figures = {figure: median(getattr(run, figure) for run in self.runs) for figure in _FIGURES}
        details = {detail: median(run.detail[detail] for run in self.runs) for detail in self.runs[0].detail}
        return Run(**figures, detail=details)


@dataclass(frozen=True)
class Result:
    """What came of a contest.

    Attributes:
        name: the contest's.
        title: for people.
        when: ISO 8601.
        rows: in the table's order.
        reason: why it was not held.
    """

    name: str
    title: str
    when: str
    rows: Sequence[Row]
    reason: str = ""


def judged(results: Sequence[Result]) -> Iterator[tuple[Bar, float | None, bool | None]]:
    """Each bar of these contests, with the figure and whether it is met; nothing where it was not measured."""
    for bar in BARS:
        for result in results:
            if result.name == bar.contest and not result.rows:
                yield bar, None, None
            elif result.name == bar.contest:
                value = bar.value({row.name: row.median for row in result.rows})
                yield bar, value, bar.least <= value <= bar.most


def load(path: Path) -> list[Result]:
    """Read a file of results; none if it is not there."""
    if not path.exists():
        return []
    return [_result(contest) for contest in json.loads(path.read_text())["contests"]]


def save(path: Path, results: Sequence[Result], machine: dict[str, object]) -> None:
    """Write a file of results."""
    bars = [
        {"contest": bar.contest, "claim": bar.claim, "value": value, "met": met} for bar, value, met in judged(results)
    ]
    document = {"machine": machine, "bars": bars, "contests": [asdict(result) for result in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def merged(old: Sequence[Result], new: Sequence[Result], order: Sequence[str]) -> list[Result]:
    """The new results, and the old ones of contests that were not held again, in an order of contests' names."""
    by_name = {result.name: result for result in (*old, *new)}
    return [by_name[name] for name in order if name in by_name]


def _result(contest: dict[str, object]) -> Result:
    known = dict(contest)
    rows = [Row(row["name"], row["data"], [Run(**run) for run in row["runs"]]) for row in known.pop("rows")]  # type: ignore[attr-defined]  # JSON
    return Result(rows=rows, **known)  # type: ignore[arg-type]  # as it was saved
