"""What a real agent costs the database while it has nothing to do: `thrave agent` in a process of its own.

It has as many instances as a host of the fleet, described by files, and as many queues beside its own as there are
hosts. A fleet's cost is this times its hosts.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from fleet_figures import Database
from fleet_stage import Stage, described, host_name, instance_id

from thrave.compute.descriptions import Description, write

_TRANSACTIONS = sa.text("SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()")
_CONNECTIONS = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
_SETTLED = 5.0  # seconds


@dataclass(frozen=True)
class Idle:
    """What one idle agent costs."""

    transactions: float
    """A second."""
    database_ms: float
    """CPU milliseconds of PostgreSQL a second."""
    connections: int


def idle_agent(stage: Stage, database: Database, engine: sa.Engine, folder: Path) -> Idle:
    """Watch the agent of the first host for some seconds."""
    seconds = stage.scale.seconds
    connections, _ = _counted(engine)
    with _agent(stage, folder):
        time.sleep(min(_SETTLED, seconds))
        during, before = _counted(engine)
        cpu = database.cpu_seconds()
        time.sleep(seconds)
        _, after = _counted(engine)
        used = database.cpu_seconds() - cpu
    return Idle((after - before) / seconds, 1e3 * used / seconds, during - connections)


@contextmanager
def _agent(stage: Stage, folder: Path) -> Iterator[None]:
    folder.mkdir()
    for number in range(
        0, stage.scale.instances, stage.scale.hosts
    ):  # beside `DirectoryInstances.add`: no disk is there
        (folder / f"{instance_id(number)}.json").write_bytes(write(Description(**vars(described(stage, number)))))
    settings = {"database_url": stage.url, "instances": folder, "data": stage.data}
    agent = subprocess.Popen(
        [sys.executable, "-m", "thrave", "agent", "--host", host_name(0)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **{f"THRAVE_{name.upper()}": str(value) for name, value in settings.items()}},
    )
    try:
        assert agent.stdout is not None
        agent.stdout.readline()
        yield
    finally:
        agent.kill()
        agent.communicate()


def _counted(engine: sa.Engine) -> tuple[int, int]:
    """Connections, and transactions so far."""
    with engine.connect() as connection:
        return connection.execute(_CONNECTIONS).scalar_one(), connection.execute(_TRANSACTIONS).scalar_one()
