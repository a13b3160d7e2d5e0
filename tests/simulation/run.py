"""Runs seeds of the simulation.

    PYTHONPATH=tests python -m simulation.run --seed 668          one seed, with its trace
    PYTHONPATH=tests python -m simulation.run --new --seconds 60  new seeds, for a minute
    PYTHONPATH=tests python -m simulation.run --fault T1          with a fault that Thrave once had

A run has two phases. In the first, requests and faults happen. Then the faults end, every host gets an agent, and time
passes until nothing is left to do. The invariants are checked during both phases, and at the end.
"""

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

from simulation.faults import KINDS
from simulation.product import on_simulation, silence_logs, trace_logs
from simulation.reintroduced import FAULTS
from simulation.scheduler import TooManySwitches
from simulation.world import OWNERS, Fixture, World
from thrave.tasks.errors import ERROR_CODES
from thrave.tasks.failpoints import FAILPOINTS
from thrave.tasks.models import BundleTaskState

BUSY_SECONDS = 900.0
QUIET_SECONDS = 4 * 3600.0  # longer than a request may be in flight, and than any interval of the background jobs
_MIN_QUIET_SECONDS = 30.0
UNREACHABLE = {
    "sysprep-requested": "no run has a `sysprep_command`",
    "Server.InternalError": "a bug; the invariant `end`",
}
"""Failpoints and codes that no run reaches, and why."""


def run_seed(fixture, seed, **options):
    """Run one seed, and return its world: `world.invariants.violations` has what does not hold. Options as of World."""
    world = World(fixture, seed, **options)
    if world.trace is not None:
        trace_logs(world)
    with on_simulation(world):
        try:
            _run_phases(world)
        except TooManySwitches as error:
            world.invariants.violate("end", str(error))
        finally:
            _end(world)
    return world


def _run_phases(world):
    scheduler, violations = world.scheduler, world.invariants.violations
    world.start()
    has_ended = _OncePerChange(world, _has_ended)
    scheduler.run(lambda: violations or (world.owners_done == OWNERS and has_ended()), scheduler.now + BUSY_SECONDS)
    world.calm()
    earliest = scheduler.now + _MIN_QUIET_SECONDS
    is_settled = _OncePerChange(world, _is_settled)
    if not scheduler.run(
        lambda: violations or (scheduler.now > earliest and is_settled()), scheduler.now + QUIET_SECONDS
    ):
        world.invariants.violate("end", f"{QUIET_SECONDS:g} s after the end of the faults there is still work to do")
    if not violations:
        world.invariants.check_end()


class _OncePerChange:
    """A condition that is evaluated again only after the database or the store has changed: it costs real time."""

    def __init__(self, world, condition):
        self._world = world
        self._condition = condition
        self._last = None

    def __call__(self):
        version = self._world.database.commits, self._world.store.version
        if self._last is None or self._last[0] != version:
            self._last = version, self._condition(self._world)
        return self._last[1]


def _has_ended(world):
    return not world.database.rows("SELECT 1 FROM bundle_task WHERE state NOT IN ('complete', 'failed') LIMIT 1")


def _is_settled(world):
    rows = world.database.rows
    return (
        _has_ended(world)
        and not world.store.in_flight
        and not rows("SELECT 1 FROM bundle_task WHERE power_recovery_until IS NOT NULL OR overlay IS NOT NULL LIMIT 1")
        and not rows("SELECT 1 FROM instance_power WHERE request IS NOT NULL OR borrowed_by IS NOT NULL LIMIT 1")
        and not rows("SELECT 1 FROM bundle_task WHERE state = 'failed' AND created_bucket LIMIT 1")
        and not world.invariants.orphans()
    )


def _end(world):
    """Show where a run with a violation stands, and end all its threads."""
    for row in world.database.rows("SELECT bundle_id, state, next_step, error_code, error_message FROM bundle_task"):
        world.note(f"task {row}")
    processes = world.scheduler.processes
    if world.invariants.violations and world.trace is not None:
        for thread in [thread for process in processes for thread in process.threads if thread.greenlet.gr_frame]:
            stack = traceback.extract_stack(thread.greenlet.gr_frame)
            places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in stack[-9:]]
            world.note(f"{thread.process} [{thread.name}] stands at {' > '.join(places)}")
    world.trace = None
    world.faults.are_on = False
    for process in processes:
        world.scheduler.discard(process)


def shrink(fixture, seed, **options):
    """Return the kinds of faults that a seed with a violation does not need."""
    without = []
    for kind in KINDS:
        if run_seed(fixture, seed, without=[*without, kind], **options).invariants.violations:
            without.append(kind)
    return without


COUNTED = (
    *(f"state {state}" for state in BundleTaskState),
    *(f"failpoint {name}" for name in FAILPOINTS if name not in UNREACHABLE),
    *(f"code {code}" for code in ERROR_CODES if code not in UNREACHABLE),
    *(f"fault {kind}" for kind in KINDS),
)
"""What a run can reach. Two of them in one run are a pair."""


class Totals:
    """Counts of many runs."""

    def __init__(self):
        self.seeds = self.switches = 0
        self.counts = Counter()
        self.pairs = set()
        self.failed = []
        self._begun = time.monotonic()

    @property
    def seconds(self):
        return time.monotonic() - self._begun

    def add(self, seed, world):
        self.seeds += 1
        self.switches += world.scheduler.switches
        faults = Counter({f"fault {kind}": number for kind, number in world.faults.happened.items()})
        counts = world.counts + world.scheduler.counts + faults
        self.counts += counts
        self.pairs |= {*combinations([what for what in COUNTED if counts[what]], 2)}
        if world.invariants.violations:
            self.failed.append(seed)
            _print(f"seed {seed}: {world.invariants.violations[0]}")

    def show(self, *, list_pairs=False):
        _print(
            f"{self.seeds} seeds in {self.seconds:.0f} s ({self.seeds / self.seconds:.1f} a second), "
            f"{self.switches} switches, {len(self.failed)} failed"
        )
        for name, number in sorted(self.counts.items()):
            _print(f"  {number:9,}  {name}")
        _print(f"never reached: {', '.join(what for what in COUNTED if not self.counts[what]) or 'nothing'}")
        possible = [*combinations(COUNTED, 2)]
        _print(f"pairs reached in one run: {len(self.pairs)} of {len(possible)}")
        if list_pairs:
            for pair in possible:
                if pair not in self.pairs:
                    _print(f"  never: {' + '.join(pair)}")


def main():
    """See the module."""
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets of strings is part of a run
        command = [sys.executable, "-m", "simulation.run", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONHASHSEED": "0"})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="run this seed and print its trace")
    parser.add_argument(
        "--shrink", action="store_true", help="first leave out the faults that the violation does not need"
    )
    parser.add_argument("--first", type=int, default=1, metavar="SEED", help="first seed (1)")
    parser.add_argument("--new", action="store_true", help="begin with a seed that no run has had: the time")
    parser.add_argument("--seeds", type=int, default=10_000, metavar="N", help="at most so many seeds (10000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no seed after so many seconds")
    parser.add_argument("--without", action="append", default=[], choices=KINDS, help="leave out a kind of fault")
    parser.add_argument("--focus", action="append", default=[], choices=KINDS, help="have a kind of fault often")
    parser.add_argument("--fault", choices=FAULTS, help="put this fault back into the product")
    parser.add_argument("--pairs", action="store_true", help="list the pairs that no run has reached")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first violation")
    arguments = parser.parse_args()
    silence_logs()
    with TemporaryDirectory() as folder:
        fixture, options = (
            Fixture(Path(folder)),
            {"reintroduced": FAULTS.get(arguments.fault), "focus": arguments.focus},
        )
        if arguments.seed is not None:
            without = shrink(fixture, arguments.seed, **options) if arguments.shrink else arguments.without
            world = run_seed(fixture, arguments.seed, without=without, trace=_print, **options)
            _print(f"faults of this seed: {world.faults.rates}")
            _print(f"violations: {world.invariants.violations or 'none'}")
            sys.exit(bool(world.invariants.violations))
        totals = Totals()
        first = time.time_ns() // 1_000_000 if arguments.new else arguments.first
        for seed in range(first, first + arguments.seeds):
            world = run_seed(fixture, seed, without=arguments.without, **options)
            totals.add(seed, world)
            if world.invariants.violations and arguments.fault:
                unchanged = run_seed(fixture, seed, without=arguments.without, focus=arguments.focus)
                if unchanged.invariants.violations:
                    sys.exit(f"seed {seed}, without {arguments.fault}: {unchanged.invariants.violations[0]}")
            if totals.seconds > arguments.seconds or (totals.failed and not arguments.keep_going):
                break
        totals.show(list_pairs=arguments.pairs)
        sys.exit(bool(totals.failed))


def _print(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
