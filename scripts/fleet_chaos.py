"""Runs many bundle tasks of a fleet on one PostgreSQL while its processes are killed at random.

    python scripts/fleet_chaos.py [--tasks 200]

tests/fleet/test_chaos.py does the same with few tasks. By default 200 tasks of 40 instances run on four hosts with two
API processes. Ends with a traceback if a task was lost, duplicated, run on a wrong host, or not finished.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.crashes.fleet_chaos import Chaos, Plan
from support.servers.postgres import running_postgres
from support.service.fleet import Fleet


def main() -> None:
    """Run once, and print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tasks": 200, "instances": 40, "agents": 4, "apis": 2, "seed": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pause", type=float, default=2.0, help="maximum seconds between two kills")
    plan = Plan(**vars(parser.parse_args()))
    logging.disable()
    started = time.monotonic()
    with running_postgres() as postgres, tempfile.TemporaryDirectory(prefix="thrave-chaos-") as folder:
        fleet = Fleet(Path(folder), {"database_url": postgres.new_database(), "heartbeat_interval": 1}, shared=False)
        fleet.api()
        try:
            outcome = Chaos(fleet, plan).run()
        finally:
            fleet.stop()
    print(f"{plan}\n{outcome}\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
