"""Durable execution: a bundle task goes on where it was after the process that ran it has died.

This is the only module that knows DBOS. Its conditions, each measured to be necessary: a fixed executor id, which is
the host's name, and one worker process a host, since recovery looks for the tasks of its own executor id; a pinned
application version, given at enqueue, since DBOS recovers only its own version's tasks; the portable JSON serialiser,
since the default is pickle; the queue of a host named on every enqueue; our record and the workflow committed in one
transaction. (No deduplication id: the database's own index on tasks in progress refuses a second task on an instance,
without DBOS's moment between the end of a task and the end of its workflow.) It never decides what a task does: that
is `bundling.py`.

What DBOS remembers of a task can be lost without harm: the record alone says how far it is. A task that no workflow
will run (those of an earlier version, and those that DBOS has given up on) is given another one by `hosts.py`.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from itertools import chain, repeat
from typing import Protocol, TypedDict, TypeVar, cast

import sqlalchemy as sa
import structlog
from dbos import DBOS, DBOSClient, DBOSConfig
from dbos import DBOSPortableJSONSerializer as PortableJSON

from thrave.database import is_unavailable
from thrave.tasks.failures import TaskFailure, failure_from
from thrave.tasks.lease import LeaseExpiredError

# Raised only when the steps of `bundling.py` change in a way that a task begun before cannot follow. Such a task is
# run anew: every step can be taken up from the record.
APPLICATION_VERSION = "bundle-3"
WORKFLOW = "bundle_instance"
POLLING_INTERVAL = 0.25  # seconds from record to start at the most; DBOS polls its queues on every database
# The same where many hosts look into one PostgreSQL: each look costs it a millisecond of CPU time, so that a thousand
# hosts would keep four cores busy by looking four times a second (docs/explanation/scale.md).
FLEET_POLLING_INTERVAL = 1.0

_DATABASE_PAUSES = (0.5, 1.0, 2.0, 5.0)  # seconds between two attempts; the last for good
_FORGET_AT_ONCE = 1000  # workflows

log = structlog.get_logger()
_Result = TypeVar("_Result")


class WithoutDatabase(Protocol):
    """What a step does if the database stays unavailable: what must not wait for it."""

    @property
    def timeout(self) -> float:
        """Seconds from the first failure of the database."""

    def act(self) -> bool:
        """Do it, without the database. Called again and again; says whether the step must not be repeated now."""

    def record(self) -> TaskFailure:
        """Record that it was done, and give the failure that the step ends with. Raises if that cannot be recorded."""


class _Outcome(TypedDict, total=False):
    """What is kept of a step: a result, or the failure that it ended with."""

    result: object
    code: str
    message: str


class Queues:
    """The queue of each host. Any process that has the database can hand a task to a host."""

    def __init__(self, database_url: str) -> None:
        """Open the queues in the database at `database_url`, making the engine's own tables if they are not there."""
        _quieten()
        DBOS.migrate(database_url)
        self._client = DBOSClient(
            system_database_url=database_url, serializer=PortableJSON(), application_name="thrave", lazy=True
        )

    def enqueue(self, connection: sa.Connection, bundle_id: str, host: str) -> None:
        """Have a host run a task; takes effect when the caller's transaction commits."""
        self._enqueue(connection, bundle_id, host, workflow_id=bundle_id)

    def enqueue_again(self, connection: sa.Connection, bundle_id: str, host: str) -> None:
        """Have a host run a task that has been enqueued before, there or elsewhere, and whose workflow is lost."""
        self._enqueue(connection, bundle_id, host, workflow_id=f"{bundle_id}.{secrets.token_hex(4)}")

    def awaited(self, host: str) -> frozenset[str]:
        """The tasks that a host will run, or runs, without being told again."""
        return frozenset(
            workflow.partition(".")[0] for workflow in self._unfinished(host, app_version=APPLICATION_VERSION)
        )

    def drop_strangers(self, host: str) -> None:
        """Have the engine give up a host's workflows of other versions, which it never runs."""
        if strangers := [*set(self._unfinished(host)) - set(self._unfinished(host, app_version=APPLICATION_VERSION))]:
            self._client.cancel_workflows(strangers)

    def forget(self, before: datetime) -> int:
        """Forget workflows that ended before then, a thousand at the most; say how many."""
        ended = self._client.list_workflows(
            status=["SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"],
            completed_before=before.isoformat(),
            limit=_FORGET_AT_ONCE,
            load_input=False,
            load_output=False,
        )
        self._client.delete_workflows([workflow.workflow_id for workflow in ended])
        return len(ended)

    def close(self) -> None:
        """Let go of the database."""
        self._client.destroy()

    def _enqueue(self, connection: sa.Connection, bundle_id: str, host: str, *, workflow_id: str) -> None:
        self._client.enqueue_in_transaction(
            connection,
            {
                "workflow_name": WORKFLOW,
                "queue_name": _queue(host),
                "workflow_id": workflow_id,
                "app_version": APPLICATION_VERSION,
            },
            bundle_id,
        )

    def _unfinished(self, host: str, *, app_version: str | None = None) -> Iterable[str]:
        workflows = self._client.list_workflows(
            status=["PENDING", "ENQUEUED"],
            queue_name=_queue(host),
            app_version=app_version,
            load_input=False,
            load_output=False,
        )
        return [workflow.workflow_id for workflow in workflows]


class Worker:
    """Runs the tasks of one host. There is one in a process: DBOS is a singleton."""

    def __init__(self, database_url: str, host: str, *, tasks_at_once: int) -> None:
        """Prepare to run at most `tasks_at_once` tasks of `host`, kept in the database at `database_url`."""
        self._database_url = database_url
        self._host = host
        self._tasks_at_once = tasks_at_once

    def launch(self, bundle: Callable[[str], None]) -> None:
        """Begin to run `bundle(bundle_id)` for every task in the host's queue, first those that a crash cut off."""
        _quieten()
        config: DBOSConfig = {
            "name": "thrave",
            "system_database_url": self._database_url,
            "application_version": APPLICATION_VERSION,
            "executor_id": self._host,
            "serializer": PortableJSON(),
            "log_level": "WARNING",
        }
        DBOS(config=config)
        DBOS.workflow(name=WORKFLOW)(bundle)
        DBOS.listen_queues([_queue(self._host)])
        DBOS.launch()
        DBOS.register_queue(
            _queue(self._host),
            worker_concurrency=self._tasks_at_once,
            polling_interval_sec=_polling_interval(self._database_url),
        )

    def drain(self, seconds: float) -> None:
        """Take no more tasks, and wait until those under way have ended, `seconds` at the most."""
        DBOS.destroy(workflow_completion_timeout_sec=int(seconds))


def step(name: str, function: Callable[[], _Result], without_database: WithoutDatabase) -> _Result:
    """Run one durable step of a task: once it has ended, it is not run again after a crash, and its result is kept.

    A step must be able to be repeated, since a crash may come after its work and before its end is written down. Its
    result must be JSON. What it raises is kept too, as `failures.failure_from` words it. While the database is
    unavailable it is repeated, for as long as that takes; `without_database` is what is not put off so long.

    Raises:
        TaskFailure: The step failed, now or before the crash.
    """
    outcome = DBOS.run_step({"name": name}, lambda: _outcome(function, without_database))
    if "code" in outcome:
        raise TaskFailure(outcome["code"], outcome["message"])
    return cast("_Result", outcome["result"])


def _outcome(function: Callable[[], object], without_database: WithoutDatabase) -> _Outcome:
    """What a step ends with. One that cannot reach the database is repeated: its end could not be recorded."""
    pauses = chain(_DATABASE_PAUSES, repeat(_DATABASE_PAUSES[-1]))
    first_failure, acted = float("inf"), False
    while True:
        started = time.monotonic()
        try:
            if acted:
                return _failed(without_database.record())
            return {"result": function()}
        except Exception as error:  # noqa: BLE001 (whatever it is, the task must end with a reason)
            if not (is_unavailable(error) or isinstance(error, LeaseExpiredError)):
                return _failed(failure_from(error))
            now = time.monotonic()
            # An attempt longer than the timeout had reached the database: count from here again.
            first_failure = now if now - started > without_database.timeout else min(first_failure, now)
            log.warning("the database does not answer; the step is repeated", error=type(error).__name__)
            if now - first_failure >= without_database.timeout:
                acted = without_database.act() or acted
            time.sleep(next(pauses))


def _failed(failure: TaskFailure) -> _Outcome:
    return {"code": failure.code, "message": failure.message}


def _polling_interval(database_url: str) -> float:
    return POLLING_INTERVAL if database_url.startswith("sqlite") else FLEET_POLLING_INTERVAL


def _queue(host: str) -> str:
    return f"host-{host}"


def _quieten() -> None:
    logger = logging.getLogger("dbos")
    logger.setLevel(logging.WARNING)
    # DBOS gives its logger a handler of its own unless there is one. That would write past the limit that `logs.py` has
    # for lines that repeat.
    logger.handlers[:] = [logging.NullHandler()]
    logger.propagate = True
