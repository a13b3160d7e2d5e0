"""The stage of the fleet benchmark: how large the fleet is, and what a process of the benchmark works with.

Everything follows from the numbers of hosts and instances: which host and which account an instance belongs to, and
which instance the next task is for. Tasks beyond those that went through the door are copies of such, row by row, with
their events, parts and the engine's rows.
"""

from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import sqlalchemy as sa
from dbos import DBOSPortableJSONSerializer as PortableJSON
from dbos._sys_db import SystemDatabase  # the stand-in of DBOS's worker does with it what that does

from thrave.compute.fleet import ReportedInstances
from thrave.compute.instance import Instance, VolumeFile
from thrave.config import Settings
from thrave.ground import Ground, open_ground
from thrave.tasks.requests import BundleTasks
from thrave.testing import upload_policy

BUCKET = "bench"
_LAUNCHED = datetime(2026, 1, 1, tzinfo=UTC)
_FAR = 7919  # a prime: tasks that follow each other are of other hosts and other accounts


@dataclass(frozen=True)
class Scale:
    """How large the fleet is, and how far its tasks are counted."""

    hosts: int
    instances: int
    rows: tuple[int, ...]
    """The numbers of ended tasks at which everything is measured."""
    tasks: int
    """How many of them go through the door and the agents; further ones are copies."""
    sample: int
    """Calls of each kind, and tasks, for the figures of a number of rows."""
    shards: int
    """Processes that it is simulated in."""
    quiet: int
    """Ended tasks of an account whose number of tasks stays as it is."""
    seconds: float
    """For which a real agent is watched doing nothing."""

    @property
    def accounts(self) -> int:
        """As many as hosts."""
        return self.hosts

    def host(self, instance: int) -> int:
        """Which host has an instance; an account's instances are on many."""
        return instance % self.hosts

    def account(self, instance: int) -> int:
        """Whose an instance is."""
        return instance * self.accounts // self.instances

    def instance_of_task(self, number: int) -> int:
        """Which instance a task is for; no other task is for it until all others have had one."""
        return number * _FAR % self.instances


FULL = Scale(
    hosts=1000, instances=100_000, rows=(1000, 3000, 10_000, 30_000, 100_000), tasks=10_000, sample=500, shards=4,
    quiet=100, seconds=20,
)  # fmt: skip
QUICK = Scale(hosts=4, instances=40, rows=(6, 24), tasks=6, sample=6, shards=1, quiet=4, seconds=0.5)


@dataclass(frozen=True)
class Caller:
    """Somebody with an account, as far as bundling needs one."""

    account_id: str
    access_key_id: str
    policy: str
    signature: str


@dataclass(frozen=True)
class Stage:
    """Where everything is; processes hand it to each other."""

    url: str
    """Of the database."""
    data: Path
    """The data directory of every process."""
    scale: Scale
    callers: tuple[Caller, ...] = ()

    @property
    def settings(self) -> Settings:
        """Of every process."""
        return Settings(data=self.data, database_url=self.url, shutdown_grace=1)

    @contextmanager
    def rooms(self) -> Iterator["Rooms"]:
        """What a process of the benchmark works with."""
        rooms = Rooms(self, open_ground(self.settings))
        try:
            yield rooms
        finally:
            rooms.close()


@dataclass(frozen=True)
class Rooms:
    """What a process of the benchmark works with: the same as `thrave api` and `thrave agent`."""

    stage: Stage
    ground: Ground

    @cached_property
    def tasks(self) -> BundleTasks:
        """The door's."""
        return self.new_tasks()

    def new_tasks(self) -> BundleTasks:
        """The same, as another API process has them: with no ended task in its memory."""
        return BundleTasks(
            self.ground.database,
            self.ground.records(),
            self.ground.queues.enqueue,
            host_of=ReportedInstances(self.ground.database).host_of,
            retention=self.ground.settings.task_retention,
            per_account=self.ground.settings.tasks_per_account,
        )

    @cached_property
    def engine(self) -> SystemDatabase:
        """The durable engine's tables, as its workers use them."""
        return SystemDatabase.create(
            system_database_url=self.stage.url, engine_kwargs={"pool_size": 2}, engine=None, schema=None,
            serializer=PortableJSON(), executor_id=None, app_name="thrave",
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the database."""
        self.engine.destroy()
        self.ground.queues.close()
        self.ground.database.dispose()


def host_name(host: int) -> str:
    """The name of a host."""
    return f"host-{host:04}"


def instance_id(instance: int) -> str:
    """The id of an instance."""
    return f"i-{instance:017x}"


def described(stage: Stage, instance: int) -> Instance:
    """An instance, as its host describes it."""
    return Instance(
        instance_id=instance_id(instance),
        account_id=stage.callers[stage.scale.account(instance)].account_id,
        platform="windows",
        root_volume=VolumeFile(path=Path(f"/var/lib/libvirt/images/{instance_id(instance)}.raw")),
        volumes=(
            VolumeFile(path=Path(f"/var/lib/libvirt/images/{instance_id(instance)}.data.raw"), device_name="xvdb"),
        ),
        launch_time=_LAUNCHED,
    )


def make_callers(rooms: Rooms) -> tuple[Caller, ...]:
    """Make the accounts. Each signs one upload policy and bundles with that."""
    made = []
    for number in range(rooms.stage.scale.accounts):
        account, key = rooms.ground.accounts.create(f"account-{number}")
        policy, signature = upload_policy(key.secret_access_key, BUCKET, "winami")
        made.append(Caller(account.account_id, key.access_key_id, b64encode(policy).decode(), signature))
    return tuple(made)


_COPIES = """
CREATE TEMPORARY TABLE copies AS
SELECT ended.bundle_id AS original, 'bun-' || substr(md5(ended.bundle_id || copy), 1, 17) AS bundle_id,
       (copy % 48) * interval '2 hours' AS age
FROM (SELECT bundle_id FROM bundle_task WHERE state IN ('complete', 'failed') AND account_id <> :but
      ORDER BY start_time LIMIT :originals) AS ended,
     generate_series(CAST(:first AS int), :last) AS copy LIMIT :most
"""


def copy_tasks(connection: sa.Connection, more: int, *, but: str) -> None:
    """Add so many ended tasks, copies of those that there are but for one account's, ended at some time before."""
    ended = connection.execute(sa.text("SELECT count(*) FROM bundle_task")).scalar_one()
    originals = ended // 2
    which = {"originals": originals, "but": but, "first": ended, "last": ended + more // originals, "most": more}
    connection.execute(sa.text(_COPIES), which)
    times = ("start_time", "update_time")
    _copy(connection, "bundle_task", "bundle_id", dict.fromkeys(times, "age"))
    _copy(connection, "bundle_part", "bundle_id", {}, distinct="key")
    _copy(connection, "bundle_task_event", "bundle_id", {"time": "age"}, numbered="event_id")
    milliseconds = "(extract(epoch FROM age) * 1000)::bigint"
    times = ("created_at", "updated_at", "completed_at", "started_at_epoch_ms")
    _copy(connection, "dbos.workflow_status", "workflow_uuid", dict.fromkeys(times, milliseconds))
    for table in ("operation_outputs", "workflow_output", "workflow_input"):
        if sa.inspect(connection).has_table(table, schema="dbos"):
            _copy(connection, f"dbos.{table}", "workflow_uuid", {})
    connection.execute(sa.text("DROP TABLE copies"))


def _copy(
    connection: sa.Connection, table: str, key: str, times: dict[str, str], *, numbered: str = "", distinct: str = ""
) -> None:
    schema, _, name = table.rpartition(".")
    columns = [column["name"] for column in sa.inspect(connection).get_columns(name, schema=schema or None)]
    kept = [column for column in columns if column != numbered]
    values = [f"{column} - {times[column]}" if column in times else f"original.{column}" for column in kept]
    values = ["copies.bundle_id" if column == key else value for column, value in zip(kept, values, strict=True)]
    if distinct:
        values[kept.index(distinct)] += " || '.' || copies.bundle_id"
    connection.execute(
        sa.text(
            f"INSERT INTO {table} ({', '.join(kept)}) SELECT {', '.join(values)} "
            f"FROM {table} AS original JOIN copies ON original.{key} = copies.original"
        )
    )
