"""Task queue and worker on DBOS, which runs a bundle task again after a crash. No other module uses DBOS.

A DBOS workflow here has no DBOS steps: the task's row names the next step, so a workflow that runs twice, late, or
after the task's end does no harm. A task that nothing runs (its workflow belongs to an earlier version, DBOS has given
up on it, or its thread has ended) gets another workflow from `hosts.py`. What a task does is in `workflow.py`.
"""

# Conditions of DBOS, each measured to be necessary: a fixed executor id (the host's id) and one worker process per
# host, since recovery looks for the tasks of its own executor id; a pinned application version, given at enqueue, since
# DBOS recovers only tasks of its own version; the portable JSON serialiser, since the default is pickle; the host's
# queue named on every enqueue; the task's row and the workflow committed in one transaction. No deduplication id: the
# database's index on tasks in progress refuses a second task on an instance, also between the end of a task and the end
# of its workflow.

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSConfig
from dbos import DBOSPortableJSONSerializer as PortableJSON

from thrave.concurrency import new_lock, random_hex
from thrave.database import with_connection_options

# Raised only when the steps of `workflow.py` change so that a started task cannot continue. Such a task is run again:
# every step resumes from the task's row.
APPLICATION_VERSION = "bundle-4"
WORKFLOW = "bundle_instance"
POLLING_INTERVAL = 0.25  # maximum seconds from enqueue to start; DBOS polls its queues on every database
# The same where many hosts poll one PostgreSQL: each poll costs it a millisecond of CPU time, so a thousand hosts that
# poll four times a second would keep four cores busy (docs/explanation/scale.md).
FLEET_POLLING_INTERVAL = 1.0

_MAX_DELETED = 1000  # workflows per call


class RunningTasks:
    """The tasks that this process runs. A second run of one is refused."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._ids: set[str] = set()

    @contextmanager
    def claimed(self, bundle_id: str) -> Iterator[bool]:
        """Mark a task as running within the block; yields False if it is running already."""
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
"""The tasks of this process: DBOS has one engine per process."""


class TaskQueue:
    """The queue of each host. Any process with access to the database can enqueue a task for a host."""

    def __init__(self, database_url: str) -> None:
        """Open the queues in the database at `database_url`; create the engine's own tables if they are missing."""
        _quieten()
        database_url = with_connection_options(database_url)
        DBOS.migrate(database_url)
        self._client = DBOSClient(
            system_database_url=database_url, serializer=PortableJSON(), application_name="thrave", lazy=True
        )

    def enqueue(self, connection: sa.Connection, bundle_id: str, host: str) -> None:
        """Enqueue a task for a host; takes effect when the caller's transaction commits."""
        self._enqueue(connection, bundle_id, host, workflow_id=bundle_id)

    def requeue(self, connection: sa.Connection, bundle_id: str, host: str) -> None:
        """Enqueue a task again whose workflow is lost, for the same host or another one."""
        self._enqueue(connection, bundle_id, host, workflow_id=f"{bundle_id}.{random_hex(4)}")

    def scheduled(self, host: str) -> frozenset[str]:
        """Return the tasks that wait in a host's queue."""
        return _tasks(self._unfinished(host, "ENQUEUED", app_version=APPLICATION_VERSION))

    def started(self, host: str) -> frozenset[str]:
        """Return the tasks whose workflows a host has started and not ended. Their threads may have ended."""
        return _tasks(self._unfinished(host, "PENDING", app_version=APPLICATION_VERSION))

    def cancel(self, host: str, bundle_ids: Collection[str]) -> None:
        """Cancel a host's workflows of these tasks in the engine. This does not stop a running one."""
        workflows = self._unfinished(host, "PENDING", "ENQUEUED")
        if cancelled := [each for each in workflows if _task(each) in bundle_ids]:
            self._client.cancel_workflows(cancelled)

    def cancel_other_versions(self, host: str) -> None:
        """Cancel a host's workflows of other versions, which the engine never runs."""
        both = "PENDING", "ENQUEUED"
        ours = self._unfinished(host, *both, app_version=APPLICATION_VERSION)
        if others := [*set(self._unfinished(host, *both)) - set(ours)]:
            self._client.cancel_workflows(others)

    def delete_ended(self, before: datetime) -> int:
        """Delete at most a thousand workflows that ended before a time; return how many."""
        ended = self._client.list_workflows(
            status=["SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"],
            completed_before=before.isoformat(),
            limit=_MAX_DELETED,
            load_input=False,
            load_output=False,
        )
        self._client.delete_workflows([workflow.workflow_id for workflow in ended])
        return len(ended)

    def close(self) -> None:
        """Close the connection to the database."""
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
        """Start to run `bundle(bundle_id)` for every task in the host's queue; interrupted tasks come first."""
        _quieten()
        config: DBOSConfig = {
            "name": "thrave",
            "system_database_url": with_connection_options(self._database_url),
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
        """Start no more tasks, and wait at most `seconds` until the running ones have ended."""
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
    # DBOS adds a handler to its logger unless there is one. That handler would bypass the limit of `logs.py` for
    # repeated lines.
    logger.handlers[:] = [logging.NullHandler()]
    logger.propagate = True
