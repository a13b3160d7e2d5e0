"""One contender's runs in a contest, and their medians."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

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

    @cached_property
    def median(self) -> Run:
        """Each figure's median."""
        figures = {figure: median(getattr(run, figure) for run in self.runs) for figure in _FIGURES}
        details = {detail: median(run.detail[detail] for run in self.runs) for detail in self.runs[0].detail}
        return Run(**figures, detail=details)

    @property
    def pace(self) -> float:
        """Seconds for a byte of data."""
        return self.median.wall / self.data

    @property
    def effort(self) -> float:
        """CPU seconds for a byte of data."""
        return self.median.cpu / self.data


Rows = Mapping[str, Row]
"""By the contenders' names."""
