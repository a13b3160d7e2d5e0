"""Writes the results of the last full runs into the documentation: tables and plots in docs/explanation.

    python benchmarks/publish.py speed       after `make bench`: speed.md
    python benchmarks/publish.py scale       after `make bench-fleet`: scale.md
    python benchmarks/publish.py downtime    after `make bench-downtime`: downtime.md

Needs matplotlib (the extra `bench`). Only the text between two comments of a page is replaced.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from bench import RUNS_HEADER, TARGETS_HEADER, format_runs, format_targets, reason
from disks import GIB
from harness import RESULTS, Result, load_results
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs" / "explanation"
END = "<!-- end of figures -->"
OURS, OTHERS = "#1b6e53", "#b9bdc4"

Json = dict[str, Any]


def main() -> None:
    """Publish the chosen results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=PAGES)
    page = parser.parse_args().page
    mpl.rcParams.update({"svg.hashsalt": "thrave", "font.size": 9})
    PAGES[page](page)
    print(DOCS / f"{page}.md", DOCS / f"{page}.svg", sep="\n")


def publish_speed(page: str) -> None:
    """Tables of targets and of all contests, and a plot of two of them."""
    results = load_results(RESULTS / "full.json")
    tables = [
        f"### {result.title}\n\n" + (table([RUNS_HEADER, *format_runs(result)]) if result.rows else reason(result))
        for result in results
    ]
    put_figures(page, "\n\n".join([table([TARGETS_HEADER, *format_targets(results)]), *tables]))
    plotted = {"seal": "Seal", "open": "Open"}
    plot_speed(page, {plotted[result.name]: result for result in results if result.name in plotted})


def plot_speed(page: str, results: Mapping[str, Result]) -> None:
    """Seconds of each contender for a GiB of data, on a logarithmic axis."""
    heights = [len(result.rows) for result in results.values()]
    figure, axes = plt.subplots(len(results), figsize=(7, 0.5 * sum(heights) + 1), height_ratios=heights, squeeze=False)
    for axis, (title, result) in zip(axes[:, 0], results.items(), strict=True):
        names, seconds = [row.name for row in result.rows], [row.pace * GIB for row in result.rows]
        bars = axis.barh(names, seconds, color=[OURS if name.startswith("thrave") else OTHERS for name in names])
        axis.bar_label(bars, fmt="%.1f s", padding=3)
        axis.set(title=f"{title}: seconds for a GiB", xscale="log", xlim=(0.5, 3 * max(seconds)))
        axis.invert_yaxis()
    save_plot(page, figure, axes[:, 0])


def publish_scale(page: str) -> None:
    """Costs by the number of finished tasks, sizes of tables, an idle agent, and sequential scans."""
    results = json.loads((RESULTS / "fleet.json").read_text())
    points = results["points"]
    header = ("", *(f"{point['rows']:,}" for point in points))
    sizes = sorted(results["bytes_per_task"].items(), key=lambda item: -item[1])
    scans = sum(bool(plan["scans"]) for plan in results["plans"])
    paragraphs = [
        describe_scale(results),
        "CPU milliseconds of PostgreSQL for each call, by the number of ended tasks:",
        table([header, *rows_of_calls(points, "database_ms")]),
        "The 99th percentile of each call's latency in milliseconds:",
        table([header, *rows_of_calls(points, "p99_ms")]),
        "Rare calls, at the largest number of tasks:",
        table([("", "ms"), *((name, f"{ms:.1f}") for name, ms in results["seldom"].items())]),
        "What a task adds to the database:",
        table([("table", "bytes"), *((name, f"{size:,.0f}") for name, size in sizes if size >= 50)]),
        describe_idle_agent(results["idle"]),
        f"Of {len(results['plans'])} different queries {scans} scan a large table sequentially.",
    ]
    put_figures(page, "\n\n".join(paragraphs))
    plot_scale(page, points)


def describe_scale(results: Json) -> str:
    """The size of the fleet, the machine, and how many tasks it can process."""
    scale, machine = results["scale"], results["machine"]
    create, work = (results["points"][0]["figures"][name] for name in ("create", "run a task"))
    return (
        f"{results['when'][:10]}: {scale['hosts']:,} hosts, {scale['instances']:,} instances, {scale['tasks']:,} tasks"
        f" through the API, {machine['cores']} cores ({machine['cpu']}) for PostgreSQL and {scale['shards']} processes"
        f" of the simulation, load {results['load']:.1f} at the start. {create['per_second']:.0f} tasks a second were"
        f" created, and {work['per_second']:.1f} completed; one core for PostgreSQL alone would create"
        f" {1e3 / create['database_ms']:.0f} and complete {1e3 / work['database_ms']:.0f}."
    )


def describe_idle_agent(idle: Json) -> str:
    """What an agent costs that has nothing to do."""
    return (
        f"An idle agent costs PostgreSQL {idle['database_ms']:.1f} ms of CPU time and {idle['transactions']:.0f}"
        f" transactions a second, and has {idle['connections']} connections."
    )


def rows_of_calls(points: Sequence[Json], figure: str) -> Iterator[tuple[str, ...]]:
    """One figure of each kind of call, at every number of tasks."""
    for name in points[0]["figures"]:
        known = [point["figures"].get(name) for point in points]  # an interrupted run does not have all
        yield name, *(f"{one[figure]:.2f}" if one else "" for one in known)


def plot_scale(page: str, points: Sequence[Json]) -> None:
    """Cost and latency over the number of ended tasks, both axes logarithmic."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    titles = {"database_ms": "CPU of PostgreSQL, ms a call", "p99_ms": "99th percentile, ms"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for name in ("run a task", "create", "Describe one", "report", "heartbeat", "poll of a queue"):
            known = [(point["rows"], point["figures"][name][kind]) for point in points if name in point["figures"]]
            axis.plot(*zip(*known, strict=True), marker="o", markersize=3, label=name)
        axis.set(title=title, xlabel="ended tasks", xscale="log", yscale="log")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save_plot(page, figure, axes)


def publish_downtime(page: str) -> None:
    """Seconds of downtime by size of the data and mode."""
    results = json.loads((RESULTS / "downtime.json").read_text())
    machine = results["machine"]
    cores = f"{machine['cores']} cores ({machine['cpu']})"
    lines = [
        f"![Seconds of downtime: constant with an overlay, without one rising with the data]({page}.svg)",
        "",
        f"{results['when'][:10]}, {cores}, load {results['load']:.1f} at the start.",
        "",
        "| data GiB | `capture_mode` | until it is started, s | until it has booted, s | the whole task, s | rounds |",
        "| --: | --- | --: | --: | --: | --: |",
    ]
    for point in results["points"]:
        figures = " | ".join(f"{median_of(point, name):.1f}" for name in ("started", "ready", "task"))
        lines.append(f"| {point['data'] / GIB:g} | {point['mode']} | {figures} | {len(point['rounds'])} |")
    put_figures(page, "\n".join(lines))
    plot_downtime(page, results["points"])


def plot_downtime(page: str, points: Sequence[Json]) -> None:
    """Seconds of downtime over GiB of data."""
    figure, axis = plt.subplots(figsize=(6, 3.5))
    for mode, colour in {"overlay": OURS, "offline": OTHERS}.items():
        some = [point for point in points if point["mode"] == mode]
        sizes, seconds = [point["data"] / GIB for point in some], [median_of(point, "ready") for point in some]
        axis.plot(sizes, seconds, marker="o", color=colour, label=f"capture_mode = {mode}")
    axis.set(xlabel="GiB of data on the root volume", ylabel="seconds down, until it has booted", ylim=0, xlim=0)
    axis.legend(frameon=False)
    save_plot(page, figure, [axis])


def median_of(point: Json, name: str) -> float:
    """The median of all rounds."""
    return statistics.median(one[name] for one in point["rounds"])


PAGES: Mapping[str, Callable[[str], None]] = {
    "speed": publish_speed,
    "scale": publish_scale,
    "downtime": publish_downtime,
}


def put_figures(page: str, figures: str) -> None:
    """Replace the text between the two comments of a page."""
    path, start = DOCS / f"{page}.md", f"<!-- figures: python benchmarks/publish.py {page} -->\n"
    before, found, rest = path.read_text().partition(start)
    if not found:
        sys.exit(f"{path} has no line {start}")
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{start}\n{figures}\n\n{END}{after}")


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    head, *body = rows
    lines = [head, ("---", *("--:" for _ in head[1:])), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def save_plot(page: str, figure: Figure, axes: Sequence[Axes]) -> None:
    """Write a plot into the folder of its page."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(DOCS / f"{page}.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
