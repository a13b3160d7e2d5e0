"""What was measured, as data and as JSON: contests, their contenders' runs, and whether each bar is met.

A file of results keeps, for every contest, the last time that it was held, so that one of them can be held again.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from contests import BARS, Bar
from measure import Run
from rows import Row, Rows


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

    @property
    def by_name(self) -> Rows:
        """The rows by their contenders' names."""
        return {row.name: row for row in self.rows}


@dataclass(frozen=True)
class Verdict:
    """A bar, the figure that was measured, and whether it is met: neither where nothing was measured.

    Attributes:
        bar: what had to be shown.
        value: the figure.
        met: whether it is enough.
        limit: what sets the limit, if it is not.
    """

    bar: Bar
    value: float | None = None
    met: bool | None = None
    limit: str = ""


def judged(results: Sequence[Result]) -> Iterator[Verdict]:
    """Each bar of these contests."""
    for bar in BARS:
        for result in results:
            if result.name == bar.contest and not result.rows:
                yield Verdict(bar)
            elif result.name == bar.contest:
                value = bar.value(result.by_name)
                met = bar.least <= value <= bar.most
                yield Verdict(bar, value, met, "" if met else bar.limit(result.by_name))


def load(path: Path) -> list[Result]:
    """Read a file of results; none if it is not there."""
    if not path.exists():
        return []
    return [_result(contest) for contest in json.loads(path.read_text())["contests"]]


def save(path: Path, results: Sequence[Result], machine: dict[str, object]) -> None:
    """Write a file of results."""
    bars = [
        {
            "contest": said.bar.contest,
            "claim": said.bar.claim,
            "value": said.value,
            "met": said.met,
            "limit": said.limit,
        }
        for said in judged(results)
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
