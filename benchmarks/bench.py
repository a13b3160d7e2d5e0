"""The benchmark: everything in `contests.py`, measured in one run.

    python benchmarks/bench.py            says how long it takes; a quiet machine, 60 GiB of disk, 22 GiB of memory
    python benchmarks/bench.py --quick    minutes; small disks, one round; its figures say little

In each round all contenders of a contest run once, in a shuffled order, with their inputs in memory and their outputs
on tmpfs. A result that is not the disk ends the benchmark. A run during which others used more than 5 % of the CPU is
repeated, and if it never gets quieter the quietest counts and is marked. A benchmark that was cut off goes on with the
contest in which that happened.
"""

import argparse
import compileall
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from contenders import Contender
from contests import CONTESTS, QUICK, Bench, Contest, Sizes
from inputs import Kitchen
from machine import machine
from measure import TMPFS, Run
from pagecache import kept_in_memory
from records import Result, load, merged, save
from report import NOISY, text
from rows import Row
from windows import CannotMakeError

import thrave

_TRIES = 4
_CACHE = Path.home() / ".cache" / "thrave-bench"
_RESULTS = Path(__file__).with_name("results")


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or what lies on tmpfs would stay in memory
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(Path(thrave.__file__).parent, quiet=1)  # as any installation does
    chosen = [contest for contest in CONTESTS if not options.only or contest.name in options.only]
    print(f"about {sum(_minutes(contest, options) for contest in chosen):.0f} minutes if others leave it alone")
    results = _hold_all(chosen, options)
    print(text(results))
    path = options.results / ("quick.json" if options.quick else "full.json")
    save(path, merged(load(path), results, [contest.name for contest in CONTESTS]), machine())
    print(f"\n{path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small disks, one round, no repeating")
    parser.add_argument("--only", nargs="+", choices=[contest.name for contest in CONTESTS], help="these contests")
    parser.add_argument("--rounds", type=int, help="of each contest")
    parser.add_argument("--afresh", action="store_true", help="do not go on with what was cut off")
    parser.add_argument("--tries", type=int, default=_TRIES, help=f"at a quiet run ({_TRIES})")
    parser.add_argument("--inputs", type=Path, default=_CACHE, help=f"where disks are kept ({_CACHE})")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="where the JSON goes")
    return parser.parse_args()


def _minutes(contest: Contest, options: argparse.Namespace) -> float:
    """About how long a contest takes; a quick one, or one whose disks have to be made first, is another matter."""
    return contest.minutes * _rounds(contest, options) / contest.rounds


def _rounds(contest: Contest, options: argparse.Namespace) -> int:
    return int(options.rounds or (1 if options.quick else contest.rounds))


def _hold_all(chosen: Sequence[Contest], options: argparse.Namespace) -> list[Result]:
    """Hold contests, but for those that a benchmark held before it was cut off."""
    unfinished = options.results / "unfinished.json"
    if options.afresh or options.quick:
        unfinished.unlink(missing_ok=True)
    results = load(unfinished)
    for contest in chosen:
        if contest.name in [result.name for result in results]:
            print(f"\n{contest.title}\n  held before the benchmark was cut off", flush=True)
            continue
        with tempfile.TemporaryDirectory(dir=TMPFS, prefix="thrave-bench-") as scratch:
            bench = Bench(Kitchen(options.inputs), Path(scratch), QUICK if options.quick else Sizes())
            results.append(_hold(contest, bench, options))
        save(unfinished, results, machine())
    unfinished.unlink(missing_ok=True)
    return results


def _hold(contest: Contest, bench: Bench, options: argparse.Namespace) -> Result:
    """Hold one contest."""
    print(f"\n{contest.title}: about {_minutes(contest, options):.1f} minutes", flush=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        contenders = contest.contenders(bench)
    except CannotMakeError as error:
        print(f"  not held: {error}", flush=True)
        return Result(contest.name, contest.title, when, (), str(error))
    tries = 1 if options.quick else options.tries
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    with kept_in_memory(bench.disks):
        for number in range(_rounds(contest, options)):
            for contender in _shuffled(contenders, number):
                runs[contender.name].append(_quiet_run(contender, bench.scratch, tries))
    rows = [Row(contender.name, contender.data, runs[contender.name]) for contender in contenders]
    return Result(contest.name, contest.title, when, rows)


def _shuffled(contenders: Sequence[Contender], seed: int) -> list[Contender]:
    return random.Random(seed).sample(contenders, len(contenders))


def _quiet_run(contender: Contender, scratch: Path, tries: int) -> Run:
    """Run one contender until the machine was quiet meanwhile, or so often; give the quietest run."""
    runs: list[Run] = []
    while len(runs) < tries and not any(run.foreign <= NOISY for run in runs):
        runs.append(_checked_run(contender, scratch))
        print(f"  {contender.name:28} {runs[-1].wall:8.2f} s  others {runs[-1].foreign:4.0%}", flush=True)
    return min(runs, key=lambda run: run.foreign)


def _checked_run(contender: Contender, scratch: Path) -> Run:
    folder = scratch / "run"
    folder.mkdir()
    try:
        run = contender.run(folder)
        contender.check(folder)
        return run
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
