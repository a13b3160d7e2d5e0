"""Set-up of the benchmark of a fleet: its size, its hosts, accounts and instances, and the objects of each process.

The numbers of hosts and instances decide which host and which account an instance has, and which instance the next
task bundles. Tasks beyond those that were created through the API are copies of rows: of the tasks, their events, their
parts, and the rows of DBOS.
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
from dbos._sys_db import SystemDatabase  # makes the database calls of a worker of DBOS

from thrave.components import Components, open_components
from thrave.compute.instance import Instance, VolumeFile
from thrave.config import Settings
from thrave.tasks.models import BundleRequest
from thrave.tasks.task_service import BundleTaskService
from thrave.testing import upload_policy

BUCKET = "bench"
_LAUNCHED = datetime(2026, 1, 1, tzinfo=UTC)
_STRIDE = 7919  # a prime: consecutive tasks have different hosts and accounts


@dataclass(frozen=True)
class Scale:
    """Size of the fleet, and numbers of tasks."""

    hosts: int
    instances: int
    rows: tuple[int, ...]
    """Numbers of ended tasks at which everything is measured."""
    tasks: int
    """Tasks that are created and processed; further ones are copies."""
    sample: int
    """Calls of each kind, and tasks, that are measured at each number of rows."""
    shards: int
    """Processes of the simulation."""
    quiet: int
    """Ended tasks of an account that gets no more tasks."""
    seconds: float
    """For which an idle agent is observed."""

    @property
    def accounts(self) -> int:
        """Number of accounts: that of hosts."""
        return self.hosts

    def host(self, instance: int) -> int:
        """The host of an instance; the instances of an account are on many hosts."""
        return instance % self.hosts

    def account(self, instance: int) -> int:
        """The account of an instance."""
        return instance * self.accounts // self.instances

    def instance_of_task(self, number: int) -> int:
        """The instance of a task. No instance has a second task before all others have had one."""
        return number * _STRIDE % self.instances


FULL = Scale(
    hosts=1000, instances=100_000, rows=(1000, 3000, 10_000, 30_000, 100_000), tasks=10_000, sample=500, shards=4,
    quiet=100, seconds=20,
)  # fmt: skip
QUICK = Scale(hosts=4, instances=40, rows=(6, 24), tasks=6, sample=6, shards=1, quiet=4, seconds=0.5)


@dataclass(frozen=True)
class Caller:
    """An account with an access key and a signed upload policy."""

    account_id: str
    access_key_id: str
    policy: str
    signature: str


@dataclass(frozen=True)
class Setup:
    """What the processes of the benchmark pass to each other."""

    url: str
    """Of the database."""
    data: Path
    """Data directory of every process."""
    scale: Scale
    callers: tuple[Caller, ...] = ()

    @property
    def settings(self) -> Settings:
        """Settings of every process."""
        return Settings(data_dir=self.data, database_url=self.url, shutdown_timeout=1)

    @contextmanager
    def open(self) -> Iterator["Backend"]:
        """Open the objects that a process of the benchmark needs."""
        backend = Backend(self, open_components(self.settings))
        try:
            yield backend
        finally:
            backend.close()


@dataclass(frozen=True)
class Backend:
    """Objects of one process of the benchmark, as in `thrave api` and `thrave agent`."""

    setup: Setup
    components: Components

    @cached_property
    def tasks(self) -> BundleTaskService:
        """Bundle tasks for API requests."""
        return self.new_tasks()

    def new_tasks(self) -> BundleTaskService:
        """The same as in a new API process: without ended tasks in its memory."""
        return BundleTaskService(
            self.components.database,
            self.components.records(),
            self.components.queues.enqueue,
            default_host=None,
            retention=self.components.settings.task_retention,
            max_per_account=self.components.settings.max_tasks_per_account,
        )

    @cached_property
    def engine(self) -> SystemDatabase:
        """The tables of DBOS, as its workers use them."""
        return SystemDatabase.create(
            system_database_url=self.setup.url, engine_kwargs={"pool_size": 2}, engine=None, schema=None,
            serializer=PortableJSON(), executor_id=None, app_name="thrave",
        )  # fmt: skip

    def close(self) -> None:
        """Close all connections to the database."""
        self.engine.destroy()
        self.components.queues.close()
        self.components.database.dispose()


def host_name(host: int) -> str:
    """Return the name of a host."""
    return f"host-{host:04}"


def instance_id(instance: int) -> str:
    """Return the id of an instance."""
    return f"i-{instance:017x}"


def describe_instance(setup: Setup, instance: int) -> Instance:
    """Return the description of an instance on its host."""
    return Instance(
        instance_id=instance_id(instance),
        account_id=setup.callers[setup.scale.account(instance)].account_id,
        platform="windows",
        root_volume=VolumeFile(path=Path(f"/var/lib/libvirt/images/{instance_id(instance)}.raw")),
        volumes=(
            VolumeFile(path=Path(f"/var/lib/libvirt/images/{instance_id(instance)}.data.raw"), device_name="xvdb"),
        ),
        launch_time=_LAUNCHED,
    )


def create_callers(backend: Backend) -> tuple[Caller, ...]:
    """Create the accounts. Each signs one upload policy, which all its requests have."""
    callers = []
    for number in range(backend.setup.scale.accounts):
        account, key = backend.components.accounts.create(f"account-{number}")
        policy, signature = upload_policy(key.secret_access_key, BUCKET, "winami")
        callers.append(Caller(account.account_id, key.access_key_id, b64encode(policy).decode(), signature))
    return tuple(callers)


def make_request(setup: Setup, number: int) -> BundleRequest:
    """Return the request for the task of this number."""
    instance = setup.scale.instance_of_task(number)
    caller = setup.callers[setup.scale.account(instance)]
    return BundleRequest(
        account_id=caller.account_id,
        owner_id=caller.account_id,
        instance_id=instance_id(instance),
        bucket=BUCKET,
        prefix=f"winami-{number}",
        access_key_id=caller.access_key_id,
        upload_policy=caller.policy,
        upload_policy_signature=caller.signature,
    )


_COPIES = """
CREATE TEMPORARY TABLE copies AS
SELECT ended.bundle_id AS original, 'bun-' || substr(md5(ended.bundle_id || copy), 1, 17) AS bundle_id,
       (copy % 48) * interval '2 hours' AS age
FROM (SELECT bundle_id FROM bundle_task WHERE state IN ('complete', 'failed') AND account_id <> :but
      ORDER BY start_time LIMIT :originals) AS ended,
     generate_series(CAST(:first AS int), :last) AS copy LIMIT :most
"""


def copy_tasks(connection: sa.Connection, more: int, *, but: str) -> None:
    """Add ended tasks: copies of existing ones, except for those of account `but`, at different times in the past."""
    ended = connection.execute(sa.text("SELECT count(*) FROM bundle_task")).scalar_one()
    originals = ended // 2
    values = {"originals": originals, "but": but, "first": ended, "last": ended + more // originals, "most": more}
    connection.execute(sa.text(_COPIES), values)
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
