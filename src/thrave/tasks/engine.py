"""Durable execution: a bundle task goes on where it was after the process that ran it has died.

This is the only module that knows DBOS. Its conditions, each measured to be necessary: a fixed executor id, which is
the host's name, and one worker process a host, since recovery looks for the tasks of its own executor id; a pinned
application version, given at enqueue, since DBOS recovers only its own version's tasks; the portable JSON serialiser,
since the default is pickle; the queue of a host named on every enqueue; our record and the workflow committed in one
transaction. (No deduplication id: the database's own index on tasks in progress refuses a second task on an instance,
without DBOS's moment between the end of a task and the end of its workflow.) It never decides what a task does: that
is `bundling.py`.

DBOS only makes sure that a host runs a task. A workflow has no steps of DBOS's: what comes next stands in the task's
row, so a workflow that is run twice, late, or after the task's end does no harm. A task that nothing runs (its workflow
is of an earlier version, DBOS has given it up, or its thread has ended) is given another workflow by `hosts.py`.
"""

import logging
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSConfig
from dbos import DBOSPortableJSONSerializer as PortableJSON

from thrave.database import with_timeouts

# Raised only when the steps of `bundling.py` change in a way that a task begun before cannot follow. Such a task is
# run anew: every step can be taken up from the record.
APPLICATION_VERSION = "bundle-4"
WORKFLOW = "bundle_instance"
POLLING_INTERVAL = 0.25  # seconds from record to start at the most; DBOS polls its queues on every database
# The same where many hosts look into one PostgreSQL: each look costs it a millisecond of CPU time, so that a thousand
# hosts would keep four cores busy by looking four times a second (docs/explanation/scale.md).
FLEET_POLLING_INTERVAL = 1.0

_FORGET_AT_ONCE = 1000  # workflows


class RunningTasks:
    """The tasks that this process runs. A second run of one is refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: set[str] = set()

    @contextmanager
    def claimed(self, bundle_id: str) -> Iterator[bool]:
        """Run a task within the block; gives False if it is running already."""
        with self._lock:
            is_first = bundle_id not in self._ids
            self._ids.add(bundle_id)
        try:
            yield is_first
        finally:
            if is_first:
                with self._lock:
                    self._ids.remove(bundle_id)

    def __contains__(self, bundle_id: str) -> bool:
        with self._lock:
            return bundle_id in self._ids


RUNNING = RunningTasks()
"""Of this process: DBOS has one engine in it."""


class TaskQueue:
    """The queue of each host. Any process that has the database can hand a task to a host."""

    def __init__(self, database_url: str) -> None:
        """Open the queues in the database at `database_url`, making the engine's own tables if they are not there."""
        _quieten()
        database_url = with_timeouts(database_url)
        DBOS.migrate(database_url)
        self._client = DBOSClient(
            system_database_url=database_url, serializer=PortableJSON(), application_name="thrave", lazy=True
        )

    def enqueue(self, connection: sa.Connection, bundle_id: str, host: str) -> None:
        """Have a host run a task; takes effect when the caller's transaction commits."""
        self._enqueue(connection, bundle_id, host, workflow_id=bundle_id)

    def requeue(self, connection: sa.Connection, bundle_id: str, host: str) -> None:
        """Have a host run a task that has been enqueued before, there or elsewhere, and whose workflow is lost."""
        self._enqueue(connection, bundle_id, host, workflow_id=f"{bundle_id}.{secrets.token_hex(4)}")

    def scheduled(self, host: str) -> frozenset[str]:
        """The tasks that wait in a host's queue."""
        return _tasks(self._unfinished(host, "ENQUEUED", app_version=APPLICATION_VERSION))

    def started(self, host: str) -> frozenset[str]:
        """The tasks whose workflows a host has begun and not ended; a thread runs them, or has died."""
        return _tasks(self._unfinished(host, "PENDING", app_version=APPLICATION_VERSION))

    def cancel(self, host: str, bundle_ids: Collection[str]) -> None:
        """Have the engine give up a host's workflows of these tasks. One that runs is not stopped by that."""
        workflows = self._unfinished(host, "PENDING", "ENQUEUED")
        if given_up := [each for each in workflows if _task(each) in bundle_ids]:
            self._client.cancel_workflows(given_up)

    def cancel_other_versions(self, host: str) -> None:
        """Have the engine give up a host's workflows of other versions, which it never runs."""
        both = "PENDING", "ENQUEUED"
        ours = self._unfinished(host, *both, app_version=APPLICATION_VERSION)
        if strangers := [*set(self._unfinished(host, *both)) - set(ours)]:
            self._client.cancel_workflows(strangers)

    def delete_ended(self, before: datetime) -> int:
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

    def _unfinished(self, host: str, *status: str, app_version: str | None = None) -> Iterable[str]:
        workflows = self._client.list_workflows(
            status=[*status],
            queue_name=_queue(host),
            app_version=app_version,
            load_input=False,
            load_output=False,
        )
        return [workflow.workflow_id for workflow in workflows]


class TaskWorker:
    """Runs the tasks of one host. There is one in a process: DBOS is a singleton."""

    def __init__(self, database_url: str, host: str, *, worker_concurrency: int) -> None:
        """Prepare to run at most `worker_concurrency` tasks of `host`, kept in the database at `database_url`."""
        self._database_url = database_url
        self._host = host
        self._worker_concurrency = worker_concurrency

    def launch(self, bundle: Callable[[str], None]) -> None:
        """Begin to run `bundle(bundle_id)` for every task in the host's queue, first those that a crash cut off."""
        _quieten()
        config: DBOSConfig = {
            "name": "thrave",
            "system_database_url": with_timeouts(self._database_url),
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
            worker_concurrency=self._worker_concurrency,
            polling_interval_sec=_polling_interval(self._database_url),
        )

    def drain(self, seconds: float) -> None:
        """Take no more tasks, and wait until those under way have ended, `seconds` at the most."""
        DBOS.destroy(workflow_completion_timeout_sec=int(seconds))


def _task(workflow_id: str) -> str:
    return workflow_id.partition(".")[0]


def _tasks(workflow_ids: Iterable[str]) -> frozenset[str]:
    return frozenset(map(_task, workflow_ids))


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
