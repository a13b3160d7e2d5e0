"""Kills the service before and after each failpoint of a task, and at random moments.

    python scripts/kill_sweep.py [--random 200] [--seed SEED] [--database postgresql]

Most failpoints are used twice, the second time with a task that replaces a bundle. Half of the tasks with random
kills replace a bundle as well. tests/support/crashes/kill_sweep.py has the conditions that must hold after each kill
and at the end; the first one that does not hold ends the run. The seed of the random moments is printed, and can be
passed again.
"""

import argparse
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.crashes.kill_sweep import (
    NEW_BUNDLE_FAILPOINTS,
    REPLACEMENT_FAILPOINTS,
    UPLOAD_CONCURRENCY,
    failpoints_of,
    run_with_kills,
    run_with_random_kills,
)
from support.servers.postgres import running_postgres

KILLS_PER_TASK = 4


def main() -> None:
    """Run all tasks, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=200, metavar="N", help="number of random kills")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.database}", flush=True)
    with ExitStack() as stack:
        postgres = stack.enter_context(running_postgres()) if arguments.database == "postgresql" else None
        sweep(arguments, postgres)


def sweep(arguments: argparse.Namespace, postgres: object) -> None:
    """Run a task for each failpoint, then tasks with random kills."""
    rng, started, kills, resent_parts = random.Random(arguments.seed), time.monotonic(), 0, 0
    points = [([failpoint], False) for failpoint in failpoints_of(*NEW_BUNDLE_FAILPOINTS)]
    points += [([failpoint], True) for failpoint in failpoints_of(*REPLACEMENT_FAILPOINTS)]
    tasks = points + [(None, number % 2 == 1) for number in range(arguments.random // KILLS_PER_TASK)]
    for number, (failpoints, replacing) in enumerate(tasks, 1):
        settings = {"database_url": postgres.new_database()} if postgres else {}
        with tempfile.TemporaryDirectory(prefix="kill-sweep-") as folder:
            if failpoints:
                scene = run_with_kills(Path(folder), failpoints, replacing=replacing, **settings)
            else:
                scene = run_with_random_kills(Path(folder), rng, KILLS_PER_TASK, replacing=replacing, **settings)
        kills += scene.kills
        resent_parts += scene.resent_parts
        print(
            f"{number}/{len(tasks)} {failpoints[0] if failpoints else 'random'}{', replacing' * replacing}", flush=True
        )
    print(
        f"{kills} kills of {len(tasks)} tasks, all of them complete; {resent_parts} parts sent twice, at most"
        f" {UPLOAD_CONCURRENCY} a kill; {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
