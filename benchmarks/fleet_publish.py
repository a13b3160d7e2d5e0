"""Puts the last full run's figures into the docs: the tables of docs/explanation/scale.md, and its plot.

python benchmarks/fleet_publish.py    after `make bench-fleet`; needs matplotlib (the extra `bench`)
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from pages import put_figures

_RESULTS = Path(__file__).with_name("results") / "fleet.json"
_DOCS = Path(__file__).parents[1] / "docs" / "explanation"
_PAGE, _PLOT = _DOCS / "scale.md", _DOCS / "scale.svg"
_PLOTTED = ("run a task", "create", "Describe one", "report", "heartbeat", "poll of a queue")
_Json = dict[str, Any]


def main() -> None:
    results = json.loads(_RESULTS.read_text())
    put_figures(_PAGE, Path(__file__).name, _markdown(results))
    _draw(results["points"])
    print(_PAGE, _PLOT, sep="\n")


def _markdown(results: _Json) -> str:
    calls = ("", *(f"{point['rows']:,}" for point in results["points"]))
    sizes = sorted(results["bytes_per_task"].items(), key=lambda item: -item[1])
    return "\n\n".join(
        [
            _conditions(results),
            "CPU milliseconds of PostgreSQL for each call, by the number of ended tasks:",
            _table([calls, *_rows(results["points"], "database_ms")]),
            "The 99th percentile of each call's milliseconds, as its caller waits for them:",
            _table([calls, *_rows(results["points"], "p99_ms")]),
            "What is called seldom, at the largest number of tasks:",
            _table([("", "ms"), *((name, f"{ms:.1f}") for name, ms in results["seldom"].items())]),
            "What a task adds to the database:",
            _table([("table", "bytes"), *((name, f"{size:,.0f}") for name, size in sizes if size >= 50)]),
            _idle(results["idle"]),
            _scans(results["plans"]),
        ]
    )


def _conditions(results: _Json) -> str:
    scale, machine = results["scale"], results["machine"]
    first = results["points"][0]["figures"]
    return (
        f"{results['when'][:10]}: {scale['hosts']:,} hosts, {scale['instances']:,} instances, {scale['tasks']:,} tasks "
        f"through the door, {machine['cores']} cores ({machine['cpu']}) for PostgreSQL and {scale['shards']} processes "
        f"that simulate, load {results['load']:.1f} at the start. "
        f"{first['create']['per_second']:.0f} tasks a second were created, and {first['run a task']['per_second']:.1f} "
        f"run to their end; {1e3 / first['create']['database_ms']:.0f} and "
        f"{1e3 / first['run a task']['database_ms']:.0f} is what a core of PostgreSQL alone would do."
    )


def _idle(idle: _Json) -> str:
    return (
        f"An agent with nothing to do costs PostgreSQL {idle['database_ms']:.1f} ms of CPU time and "
        f"{idle['transactions']:.0f} transactions a second, and holds {idle['connections']} connections."
    )


def _scans(plans: Sequence[_Json]) -> str:
    scans = [plan for plan in plans if plan["scans"]]
    return f"Of {len(plans)} different queries {len(scans)} read a large table from one end to the other."


def _rows(points: Sequence[_Json], figure: str) -> Iterator[tuple[str, ...]]:
    for name in points[0]["figures"]:
        known = [point["figures"].get(name) for point in points]  # a run that was cut short has not all of them
        yield name, *(f"{one[figure]:.2f}" if one else "" for one in known)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [head, ("---", *("--:" for _ in head[1:])), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _draw(points: Sequence[_Json]) -> None:
    """Cost and latency over the number of ended tasks, both axes logarithmic."""
    mpl.rcParams.update({"svg.hashsalt": "thrave", "font.size": 9})
    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    titles = {"database_ms": "CPU of PostgreSQL, ms a call", "p99_ms": "99th percentile, ms"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for name in _PLOTTED:
            known = [(point["rows"], point["figures"][name][kind]) for point in points if name in point["figures"]]
            axis.plot(*zip(*known, strict=True), marker="o", markersize=3, label=name)
        axis.set(title=title, xlabel="ended tasks", xscale="log", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(_PLOT, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
