"""The figures as tables for people: as text in a terminal, and as Markdown in the docs.

Nothing is left out: a contest that could not be held says why, and a run in company is marked.
"""

from collections.abc import Iterator, Sequence

from inputs import GIB, MIB
from records import Result, judged
from rows import Row

NOISY = 0.05
"""A run during which others used more of the CPU than this says little."""

_HEAD = ("", "MB/s", "wall s", "min-max", "CPU s/GiB", "memory MiB", "bundle MB", "besides MB", "others")
_BARS = ("bar", "measured", "", "what sets the limit")


def text(results: Sequence[Result]) -> str:
    """Every contest's figures, then the bars."""
    tables = [
        "\n".join([result.title, *(_columns([_HEAD, *_figures(result)]) if result.rows else [_not_held(result)]), ""])
        for result in results
    ]
    return "\n".join(["", *tables, *_columns([_BARS, *_verdicts(results)])])


def markdown(results: Sequence[Result]) -> str:
    """The same for the docs, the bars first."""
    bars = _markdown_table([_BARS, *_verdicts(results)])
    tables = [
        f"### {result.title}\n\n" + (_markdown_table([_HEAD, *_figures(result)]) if result.rows else _not_held(result))
        for result in results
    ]
    return "\n\n".join([bars, *tables])


def _figures(result: Result) -> Iterator[tuple[str, ...]]:
    for row in result.rows:
        middle, walls = row.median, [run.wall for run in row.runs]
        rate, effort = _per_data(row)
        yield (
            row.name,
            rate,
            f"{middle.wall:.2f}",
            f"{min(walls):.2f}-{max(walls):.2f}",
            effort,
            f"{middle.memory / MIB:.0f}",
            f"{middle.size / 1e6:.1f}" if middle.size else "",
            f"{(middle.written + middle.staged) / 1e6:.1f}",
            f"{middle.foreign:.0%}" + (" noisy" if middle.foreign > NOISY else ""),
        )


def _per_data(row: Row) -> tuple[str, str]:
    """MB/s and CPU seconds per GiB, where there is data."""
    if not row.data:
        return "", ""
    return f"{1 / row.pace / 1e6:.0f}", f"{row.effort * GIB:.2f}"


def _verdicts(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    words = {True: "met", False: "NOT MET", None: "not measured"}
    for said in judged(results):
        yield said.bar.claim, "" if said.value is None else f"{said.value:.3g}", words[said.met], said.limit


def _not_held(result: Result) -> str:
    return f"Not held: {result.reason}"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [head, ("---", *("--:" for _ in head[1:])), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
