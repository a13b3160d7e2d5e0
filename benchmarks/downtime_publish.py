"""Puts the last full run's figures into the docs: the table of docs/explanation/downtime.md, and its plot.

python benchmarks/downtime_publish.py    after `make bench-downtime`; needs matplotlib (the extra `bench`)
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from inputs import GIB
from matplotlib import pyplot as plt
from pages import put_figures

_RESULTS = Path(__file__).with_name("results") / "downtime.json"
_DOCS = Path(__file__).parents[1] / "docs" / "explanation"
_PAGE, _PLOT = _DOCS / "downtime.md", _DOCS / "downtime.svg"
_COLOURS = {"overlay": "#1b6e53", "whole": "#b9bdc4"}
_Json = dict[str, Any]


def main() -> None:
    results = json.loads(_RESULTS.read_text())
    put_figures(_PAGE, Path(__file__).name, _markdown(results))
    _draw(results["points"])
    print(_PAGE, _PLOT, sep="\n")


def _markdown(results: _Json) -> str:
    machine = results["machine"]
    cores = f"{machine['cores']} cores ({machine['cpu']})"
    lines = [
        f"![Seconds that a guest is down: with an overlay flat, without one rising with the data]({_PLOT.name})",
        "",
        f"{results['when'][:10]}, {cores}, load {results['load']:.1f} at the start.",
        "",
        "| data GiB | `downtime` | until it is started, s | until it has booted, s | the whole task, s | rounds |",
        "| --: | --- | --: | --: | --: | --: |",
    ]
    for point in results["points"]:
        figures = " | ".join(f"{_median(point, name):.1f}" for name in ("started", "ready", "task"))
        lines.append(f"| {point['data'] / GIB:g} | {point['mode']} | {figures} | {len(point['rounds'])} |")
    return "\n".join(lines)


def _median(point: _Json, name: str) -> float:
    return statistics.median(one[name] for one in point["rounds"])


def _draw(points: Sequence[_Json]) -> None:
    """Seconds of downtime over GiB of data: flat against rising."""
    mpl.rcParams.update({"svg.hashsalt": "thrave", "font.size": 9})
    figure, axis = plt.subplots(figsize=(6, 3.5))
    for mode, colour in _COLOURS.items():
        some = [point for point in points if point["mode"] == mode]
        sizes = [point["data"] / GIB for point in some]
        axis.plot(
            sizes, [_median(point, "ready") for point in some], marker="o", color=colour, label=f"downtime = {mode}"
        )
    axis.set(xlabel="GiB of data on the root volume", ylabel="seconds down, until it has booted", ylim=0, xlim=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(_PLOT, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
