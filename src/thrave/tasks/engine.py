"""Durable execution: a bundle task goes on where it was after the process that ran it has died.

This is the only module that knows DBOS. Its conditions, each measured to be necessary: a fixed executor id, which is
the host's name, and one worker process a host, since recovery looks for the tasks of its own executor id; a pinned
application version, given at enqueue, since DBOS recovers only its own version's tasks; the portable JSON serialiser,
since the default is pickle; the queue of a host named on every enqueue; our record and the workflow committed in one
transaction. (No deduplication id: the database's own index on tasks in progress refuses a second task on an instance,
without DBOS's moment between the end of a task and the end of its workflow.) It never decides what a task does: that
is `bundling.py`.
"""

import logging
from collections.abc import Callable
from typing import TypedDict, TypeVar, cast

import sqlalchemy as sa
import structlog
from dbos import DBOS, DBOSClient, DBOSConfig
from dbos import DBOSPortableJSONSerializer as PortableJSON

from thrave.tasks.failures import TaskFailure, failure_from

# Raised only when the steps of `bundling.py` change in a way that a task begun before cannot follow.
APPLICATION_VERSION = "bundle-2"
WORKFLOW = "bundle_instance"
POLLING_INTERVAL = 0.25  # seconds from record to start at the most; DBOS polls its queues on every database

log = structlog.get_logger()
_Result = TypeVar("_Result")


class _Outcome(TypedDict, total=False):
    """What is kept of a step: a result, or the failure that it ended with."""

    result: object
    code: str
    message: str


class Engine:
    """Runs bundle tasks durably on this host. There is one in a process: DBOS is a singleton."""

    def __init__(self, database_url: str, host: str, *, tasks_at_once: int) -> None:
        """Prepare to run at most `tasks_at_once` tasks of `host`, kept in the database at `database_url`."""
        self._database_url = database_url
        self._host = host
        self._tasks_at_once = tasks_at_once
        self._client: DBOSClient | None = None

    def launch(self, bundle: Callable[[str], None]) -> None:
        """Begin to run `bundle(bundle_id)` for every task enqueued for this host, first those that a crash cut off."""
        logging.getLogger("dbos").setLevel(logging.WARNING)
        config: DBOSConfig = {
            "name": "thrave",
            "system_database_url": self._database_url,
            "application_version": APPLICATION_VERSION,
            "executor_id": self._host,
            "serializer": PortableJSON(),
            "log_level": "WARNING",
        }
        DBOS(config=config)
        DBOS.workflow(name=WORKFLOW)(self._refusing_strangers(bundle))
        DBOS.listen_queues([_queue(self._host)])
        DBOS.launch()
        DBOS.register_queue(
            _queue(self._host), worker_concurrency=self._tasks_at_once, polling_interval_sec=POLLING_INTERVAL
        )
        self._client = DBOSClient(
            system_database_url=self._database_url, serializer=PortableJSON(), application_name="thrave"
        )

    def enqueue(self, connection: sa.Connection, bundle_id: str) -> None:
        """Have this host run a task; takes effect when the caller's transaction commits."""
        assert self._client is not None, "launch() comes first"
        self._client.enqueue_in_transaction(
            connection,
            {
                "workflow_name": WORKFLOW,
                "queue_name": _queue(self._host),
                "workflow_id": bundle_id,
                "app_version": APPLICATION_VERSION,
            },
            bundle_id,
            self._host,
        )

    def stop(self) -> None:
        """Take no more tasks and let go of the database. A task that is running goes on at the next launch."""
        if self._client is not None:
            self._client.destroy()
        DBOS.destroy()

    def _refusing_strangers(self, bundle: Callable[[str], None]) -> Callable[[str, str], None]:
        def bundle_instance(bundle_id: str, host: str) -> None:
            # A workflow that was resumed onto another host's queue must not touch disks that are not there.
            if host != self._host:
                log.error("bundle task of another host", bundle_id=bundle_id, host=host)
                return
            bundle(bundle_id)

        return bundle_instance


def step(name: str, function: Callable[[], _Result]) -> _Result:
    """Run one durable step of a task: once it has ended, it is not run again after a crash, and its result is kept.

    A step must be able to be repeated, since a crash may come after its work and before its end is written down. Its
    result must be JSON. What it raises is kept too, as `failures.failure_from` words it.

    Raises:
        TaskFailure: The step failed, now or before the crash.
    """
    outcome = DBOS.run_step({"name": name}, lambda: _outcome(function))
    if "code" in outcome:
        raise TaskFailure(outcome["code"], outcome["message"])
    return cast("_Result", outcome["result"])


def _outcome(function: Callable[[], object]) -> _Outcome:
    try:
        return {"result": function()}
    except Exception as error:  # noqa: BLE001 (whatever it is, the task must end with a reason)
        failure = failure_from(error)
        return {"code": failure.code, "message": failure.message}


def _queue(host: str) -> str:
    return f"host-{host}"
