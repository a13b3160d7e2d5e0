"""Puts the last full run's figures into the docs: the tables of docs/explanation/speed.md, and its plot.

python benchmarks/publish.py    after `make bench`; needs matplotlib (the extra `bench`)
"""

from pathlib import Path

import matplotlib as mpl
from inputs import GIB
from matplotlib import pyplot as plt
from pages import put_figures
from records import Result, load
from report import markdown

_RESULTS = Path(__file__).with_name("results") / "full.json"
_DOCS = Path(__file__).parents[1] / "docs" / "explanation"
_PAGE, _PLOT = _DOCS / "speed.md", _DOCS / "speed.svg"
_OURS, _OTHERS = "#1b6e53", "#b9bdc4"
_PLOTTED = {"seal": "Seal", "open": "Open"}


def main() -> None:
    results = load(_RESULTS)
    put_figures(_PAGE, Path(__file__).name, markdown(results))
    _draw([result for result in results if result.name in _PLOTTED])
    print(_PAGE, _PLOT, sep="\n")


def _draw(results: list[Result]) -> None:
    """Seconds of each contender for a GiB of data, on a logarithmic axis."""
    mpl.rcParams.update({"svg.hashsalt": "thrave", "font.size": 9})
    heights = [len(result.rows) for result in results]
    figure, axes = plt.subplots(len(results), figsize=(7, 0.5 * sum(heights) + 1), height_ratios=heights, squeeze=False)
    for axis, result in zip(axes[:, 0], results, strict=True):
        names, seconds = [row.name for row in result.rows], [row.pace * GIB for row in result.rows]
        colours = [_OURS if name.startswith("thrave") else _OTHERS for name in names]
        bars = axis.barh(names, seconds, color=colours)
        axis.bar_label(bars, fmt="%.1f s", padding=3)
        axis.set(title=f"{_PLOTTED[result.name]}: seconds for a GiB", xscale="log", xlim=(0.5, 3 * max(seconds)))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(_PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
