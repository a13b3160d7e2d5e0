"""The benchmark of speed: runs all contests of `contests.py`.

    python benchmarks/bench.py            prints how long it takes; a quiet machine, 60 GiB of disk, 22 GiB of memory
    python benchmarks/bench.py --quick    minutes; small disks, one round; its figures mean little

In each round all contenders of a contest run once, in a shuffled order, with their inputs in memory and their outputs
on tmpfs. A result that is not the disk ends the benchmark. A run during which other programs used more than 5 % of the
CPU is repeated; if none is quieter, the quietest one counts and is marked. After an interruption the benchmark resumes
with the interrupted contest.
"""

import argparse
import compileall
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil
from contenders import Contender, Workspace
from contests import CONTESTS, QUICK_CONTESTS, Contest, judge
from disks import DEFAULT_FOLDER, GIB, MIB, CannotMakeError, DiskFolder, kept_in_memory, stored_bytes
from harness import MAX_FOREIGN, RESULTS, TMPFS, Result, Row, Run, load_results, merge_results, save_results

import thrave

_TRIES = 4

RUNS_HEADER = ("", "MB/s", "wall s", "min-max", "CPU s/GiB", "memory MiB", "bundle MB", "besides MB", "others")
TARGETS_HEADER = ("target", "measured", "", "what sets the limit")


def main() -> None:
    """Run the contests, print tables, and store the results."""
    options = _parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # to remove files on tmpfs, which would occupy memory
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(Path(thrave.__file__).parent, quiet=1)  # as every installation does
    contests = QUICK_CONTESTS if options.quick else CONTESTS
    chosen = [contest for contest in contests if not options.only or contest.name in options.only]
    print(f"about {sum(_minutes(contest, options) for contest in chosen):.0f} minutes on a quiet machine")
    results = _run_contests(chosen, options)
    print(format_text(results))
    path = options.results / ("quick.json" if options.quick else "full.json")
    _save(path, merge_results(load_results(path), results, [contest.name for contest in CONTESTS]))
    print(f"\n{path}")


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small disks, one round, no repetition")
    parser.add_argument("--only", nargs="+", choices=[contest.name for contest in CONTESTS], help="these contests")
    parser.add_argument("--rounds", type=int, help="of each contest")
    parser.add_argument("--afresh", action="store_true", help="do not resume an interrupted benchmark")
    parser.add_argument("--tries", type=int, default=_TRIES, help=f"for a quiet run ({_TRIES})")
    parser.add_argument("--inputs", type=Path, default=DEFAULT_FOLDER, help=f"folder of the disks ({DEFAULT_FOLDER})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
    return parser.parse_args()


def _minutes(contest: Contest, options: argparse.Namespace) -> float:
    """About how long a contest takes, with full sizes and without making the disks."""
    return contest.minutes * _rounds(contest, options) / contest.rounds


def _rounds(contest: Contest, options: argparse.Namespace) -> int:
    return int(options.rounds or (1 if options.quick else contest.rounds))


def _run_contests(chosen: Sequence[Contest], options: argparse.Namespace) -> list[Result]:
    """Run contests, except for those that were complete before an interruption."""
    unfinished = options.results / "unfinished.json"
    if options.afresh or options.quick:
        unfinished.unlink(missing_ok=True)
    results = load_results(unfinished)
    for contest in chosen:
        if contest.name in [result.name for result in results]:
            print(f"\n{contest.title}\n  complete before the interruption", flush=True)
            continue
        with tempfile.TemporaryDirectory(dir=TMPFS, prefix="thrave-bench-") as scratch:
            results.append(_run_contest(contest, Workspace(DiskFolder(options.inputs), Path(scratch)), options))
        _save(unfinished, results)
    unfinished.unlink(missing_ok=True)
    return results


def _run_contest(contest: Contest, space: Workspace, options: argparse.Namespace) -> Result:
    print(f"\n{contest.title}: about {_minutes(contest, options):.1f} minutes", flush=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        _prepare(contest, space)
    except CannotMakeError as error:
        print(f"  not run: {error}", flush=True)
        return Result(contest.name, contest.title, when, (), str(error))
    tries = 1 if options.quick else options.tries
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contest.contenders}
    with kept_in_memory(space.used):
        for number in range(_rounds(contest, options)):
            for contender in random.Random(number).sample(contest.contenders, len(contest.contenders)):
                runs[contender.name].append(_run_quietly(contender, space, tries))
    rows = [Row(one.name, stored_bytes(space.path(one.disk)), runs[one.name]) for one in contest.contenders]
    return Result(contest.name, contest.title, when, rows)


def _prepare(contest: Contest, space: Workspace) -> None:
    if psutil.virtual_memory().available < contest.memory:
        raise CannotMakeError(f"the bundle on tmpfs needs {contest.memory / GIB:.0f} GiB of free memory")
    for contender in contest.contenders:
        contender.prepare(space)


def _run_quietly(contender: Contender, space: Workspace, tries: int) -> Run:
    """Run a contender until the machine is quiet, at most `tries` times; return the quietest run."""
    runs: list[Run] = []
    while len(runs) < tries and not any(run.foreign <= MAX_FOREIGN for run in runs):
        runs.append(run_checked(contender, space))
        print(f"  {contender.name:28} {runs[-1].wall:8.2f} s  others {runs[-1].foreign:4.0%}", flush=True)
    return min(runs, key=lambda run: run.foreign)


def run_checked(contender: Contender, space: Workspace) -> Run:
    """Run a contender and check its result; raises WrongOutputError."""
    folder = space.scratch / "run"
    folder.mkdir()
    try:
        run = contender.run(space, folder)
        contender.check(space, folder)
        return run
    finally:
        shutil.rmtree(folder)


def _save(path: Path, results: Sequence[Result]) -> None:
    verdicts = (
        {
            "contest": verdict.target.contest,
            "claim": verdict.target.claim,
            "value": verdict.value,
            "met": verdict.is_met,
            "limit": verdict.limit,
        }
        for verdict in judge(results)
    )
    save_results(path, results, verdicts)


# Tables. No result is left out: a contest that could not run has its reason, and a noisy run is marked.


def format_text(results: Sequence[Result]) -> str:
    """Format the runs of every contest, then the targets, for a terminal."""
    tables = [
        "\n".join(
            [result.title, *(_align([RUNS_HEADER, *format_runs(result)]) if result.rows else [reason(result)]), ""]
        )
        for result in results
    ]
    return "\n".join(["", *tables, *_align([TARGETS_HEADER, *format_targets(results)])])


def format_runs(result: Result) -> Iterator[tuple[str, ...]]:
    """The lines of a contest's table; the columns are RUNS_HEADER."""
    for row in result.rows:
        run, walls = row.median, [run.wall for run in row.runs]
        yield (
            row.name,
            f"{1 / row.pace / 1e6:.0f}" if row.data else "",
            f"{run.wall:.2f}",
            f"{min(walls):.2f}-{max(walls):.2f}",
            f"{row.effort * GIB:.2f}" if row.data else "",
            f"{run.memory / MIB:.0f}",
            f"{run.size / 1e6:.1f}" if run.size else "",
            f"{(run.written + run.staged) / 1e6:.1f}",
            f"{run.foreign:.0%}" + (" noisy" if run.foreign > MAX_FOREIGN else ""),
        )


def format_targets(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """The lines of the table of targets; the columns are TARGETS_HEADER."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    for verdict in judge(results):
        value = "" if verdict.value is None else f"{verdict.value:.3g}"
        yield verdict.target.claim, value, words[verdict.is_met], verdict.limit


def reason(result: Result) -> str:
    """Why a contest could not run."""
    return f"Not run: {result.reason}"


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


if __name__ == "__main__":
    main()
