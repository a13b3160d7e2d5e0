"""The result of a task does not depend on the moment at which the database, the process or the lease is lost.

A task runs in this process. The tests count SQL statements, so that a fault happens at each statement in turn.
"""

import threading
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import sqlalchemy as sa

from support.service.in_process import HOST, OneHost
from thrave.buckets.errors import TransientError
from thrave.compute.instance import InstanceState
from thrave.database import bundle_task, host
from thrave.tasks import step_retry, workflow
from thrave.tasks.errors import TaskFailure
from thrave.tasks.lease import HostLease, LeaseTimer, RightLostError
from thrave.tasks.models import FORWARD_STEPS, STEPS_WITH_BORROWED_INSTANCE, UNDO_STEPS, Step
from thrave.tasks.repository import TaskRepository

AWAY = TransientError("SlowDown", 503, "Please reduce your request rate")
FULL = sa.exc.OperationalError("INSERT", {}, Exception("database or disk is full"))
STATEMENT, TRANSACTION = "before_cursor_execute", "begin"
EVERY = 3  # only each third statement: the same kinds of statements recur


class KilledError(BaseException):
    """The process was killed."""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    here = OneHost(tmp_path_factory.mktemp("one-host"))
    yield here
    here.close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(step_retry, "DATABASE_INTERVALS", (0.0,))


class LosesAPart:
    """A store that has lost a part when the parts are verified."""

    def __init__(self, inner):
        self.inner = inner

    def on_behalf_of(self, _access_key_id):
        return self

    def head(self, bucket, key):
        return None if ".part." in key else self.inner.head(bucket, key)

    def __getattr__(self, name):
        return getattr(self.inner, name)


@contextmanager
def at(engine, event, number, happens):
    """Call a function at the statement or transaction with this number in this thread; count them in a list."""
    seen, here = [], threading.current_thread()

    def before(*_):
        if threading.current_thread() is here:
            seen.append(None)
            if len(seen) == number:
                happens()

    sa.event.listen(engine, event, before)
    try:
        yield seen
    finally:
        sa.event.remove(engine, event, before)


def fail():
    raise FULL


def kill():
    raise KilledError


def ends(here, bundle_id, number, happens, event=STATEMENT, **changes):
    """Run a task with an event at one statement; run the task again until it has ended."""
    with at(here.components.database, event, number, happens) as seen, suppress(KilledError):
        here.run(bundle_id, **changes)
    if here.get(bundle_id).state not in {"complete", "failed"}:
        here.run(bundle_id, **changes)
    return here.get(bundle_id), len(seen)


def number_of(here, event=STATEMENT, **changes):
    return ends(here, here.task(), 0, fail, event, **changes)[1]


@pytest.mark.sweep
@pytest.mark.parametrize("happens", [fail, kill])
def test_task_completes_if_any_statement_fails(here, happens):
    for number in range(1, number_of(here) + 1, EVERY):
        bundle_id = here.task()
        task, _ = ends(here, bundle_id, number, happens)
        assert (number, task.state, task.error_code) == (number, "complete", None)
        assert here.opens(bundle_id)
        assert here.instances.state(task.instance_id) is InstanceState.RUNNING


@pytest.mark.sweep
@pytest.mark.parametrize("happens", [fail, kill])
def test_failed_task_keeps_its_reason_if_any_statement_fails(here, happens):
    lossy = {"store": LosesAPart(here.buckets)}
    for number in range(1, number_of(here, **lossy) + 1, EVERY):
        bundle_id = here.task()
        task, _ = ends(here, bundle_id, number, happens, **lossy)
        assert (number, task.state, task.error_code) == (number, "failed", "Server.S3Error")
        assert here.objects(bundle_id) == []
        assert here.instances.state(task.instance_id) is InstanceState.RUNNING


def test_reason_is_recorded_before_undo(here):
    """The first statement after the failure records the reason; nothing later changes it."""
    bundle_id = here.task()
    decided = []

    class Watches(LosesAPart):
        def delete(self, bucket, keys):
            decided.append((here.get(bundle_id).next_step, here.get(bundle_id).error_code))
            self.inner.delete(bucket, keys)

    here.run(bundle_id, store=Watches(here.buckets))
    assert decided[0] == (Step.UNDO_REMOVE, "Server.S3Error")


def test_cancellation_before_any_statement_ends_task(here):
    """If the cancellation is accepted, the task is undone. If it is refused, since the manifest may have been sent, the
    bundle is complete."""
    for number in range(1, number_of(here, TRANSACTION) + 1, EVERY):
        bundle_id = here.task()
        cancelled = []

        def happens(bundle_id=bundle_id, cancelled=cancelled):
            cancelled.append(here.records.cancel(bundle_id))

        task, _ = ends(here, bundle_id, number, happens, TRANSACTION)
        code = "Client.Cancelled" if cancelled == [True] else None
        assert (number, task.error_code) == (number, code)
        assert (here.objects(bundle_id) == []) == bool(code)
        assert code or here.opens(bundle_id)
        assert here.instances.state(task.instance_id) is InstanceState.RUNNING


def test_replaced_run_writes_nothing(here):
    """Another run starts at any statement: the earlier run writes nothing from then on, and ends."""
    for number in range(3, number_of(here, TRANSACTION), EVERY):
        bundle_id = here.task()
        rows = []

        def another_begins(bundle_id=bundle_id, rows=rows):
            here.records.start_run(bundle_id)
            rows.append(here.get(bundle_id))

        with at(here.components.database, TRANSACTION, number, another_begins):
            here.run(bundle_id)
        assert rows[0].runs == 2 or rows[0].state == "complete"
        assert here.get(bundle_id) == rows[0]


def test_second_run_in_one_process_is_ignored(here):
    bundle_id = here.task()
    at_once = []

    class AsksTwice(LosesAPart):
        def head(self, bucket, key):
            if not at_once:
                at_once.append(None)
                here.run(bundle_id)
                at_once.append(here.get(bundle_id).runs)
            return self.inner.head(bucket, key)

    here.run(bundle_id, store=AsksTwice(here.buckets))
    assert here.get(bundle_id).state == "complete"
    assert at_once == [None, 1]


def test_host_without_lease_writes_nothing(here, monkeypatch):
    def end(_lease):
        raise KilledError

    monkeypatch.setattr(HostLease, "exit_process", end)
    bundle_id = here.task()
    before = here.get(bundle_id)
    with pytest.raises(KilledError):
        here.run(bundle_id, lease=HostLease(HOST, "another lease"))
    assert here.get(bundle_id) == before


def test_task_of_another_host_is_not_written(here):
    bundle_id = here.task()
    with here.components.database.begin() as connection:
        row = {**connection.execute(sa.select(host)).mappings().one(), "host": "elsewhere"}
        connection.execute(host.insert(), row)
        connection.execute(bundle_task.update().where(bundle_task.c.bundle_id == bundle_id).values(host="elsewhere"))
    before = here.get(bundle_id)
    with pytest.raises(RightLostError):
        here.components.records(here.lease).add_warning(bundle_id, "from a host that has lost it")
    assert here.get(bundle_id) == before


def test_failed_start_after_read_completes_with_warning(here):
    """Every part is stored before the instance is started: the task completes with a warning."""
    bundle_id = here.task(stop_command=("true",), start_command=("false",))
    here.run(bundle_id)
    task = here.get(bundle_id)
    assert task.state == "complete"
    assert "not started yet" in task.warning
    assert task.power_recovery_until is not None
    assert here.opens(bundle_id)


def test_every_step_leads_to_the_end_of_the_task():
    assert not FORWARD_STEPS.keys() & UNDO_STEPS.keys()
    assert FORWARD_STEPS.keys() | UNDO_STEPS.keys() == set(Step)


class LosesTheAnswer:
    """A store that accepts the manifest and is then unavailable for this number of requests."""

    def __init__(self, inner, away):
        self.inner, self.away, self.taken = inner, away, False

    def on_behalf_of(self, _access_key_id):
        return self

    def checking(self, _check):
        return self

    def put(self, bucket, key, data, **more):
        etag = self.inner.put(bucket, key, data, **more)
        if not key.endswith(".manifest.xml") or self.taken:
            return etag
        self.taken = True
        raise AWAY

    def __getattr__(self, name):
        if self.taken and self.away > 0 and name in {"head", "get_range"}:
            self.away -= 1
            raise AWAY
        return getattr(self.inner, name)


def test_task_waits_until_store_tells_whether_it_has_manifest(here, monkeypatch):
    monkeypatch.setattr(workflow, "_PUBLISHED_INTERVAL", 0.0)
    bundle_id = here.task()
    here.run(bundle_id, store=LosesTheAnswer(here.buckets, away=5))
    assert here.get(bundle_id).state == "complete"
    assert here.opens(bundle_id)


@pytest.mark.parametrize("step", [*FORWARD_STEPS, *UNDO_STEPS])
def test_retired_host_completes_task_with_complete_bundle(here, step):
    bundle_id = here.task()
    with here.components.database.begin() as connection:
        row = bundle_task.update().where(bundle_task.c.bundle_id == bundle_id)
        connection.execute(row.values(next_step=step, state="storing"))
        lost = TaskFailure("Server.HostLost", "retired")
        failed = here.records.end_on_lost_host(connection, bundle_id, lost)
    is_stored = step in {Step.MERGE, Step.REMOVE_EARLIER, Step.COMPLETE}
    assert (failed, here.get(bundle_id).state) == (not is_stored, "complete" if is_stored else "failed")


@pytest.mark.parametrize("says", [True, False])
def test_expired_lease_starts_instance_if_database_confirms_lease(here, monkeypatch, says):
    """The database can be read but not written: heartbeats fail, and the lease timer expires."""
    bundle_id = here.task()
    task = here.get(bundle_id)
    fake = here.host(here.lease, lease_timer=LeaseTimer(1.0, iter([0.0, *[9.0] * 99]).__next__))
    monkeypatch.setattr(TaskRepository, "holds_lease", lambda _records: says)
    running = workflow.BundleWorkflow(fake, task, 1)
    running._power._must_restore = True
    here.instances.request_stop(task.instance_id)
    start = workflow._StartWithoutDatabase(fake, task, running._repository, running._power, fails_if_started=True)
    assert start.act() is says
    state = InstanceState.RUNNING if says else InstanceState.STOPPED
    assert here.instances.state(task.instance_id) is state


def test_run_resumed_after_start_does_not_restore_power(here):
    """The owner may have stopped the instance since: the task restores it only in steps with a borrowed instance."""
    task = replace(here.get(here.task()), run_after_task=True)
    owed = {step: workflow.BundleWorkflow(here.host(here.lease), replace(task, next_step=step), 1)._power._must_restore
            for step in Step}  # fmt: skip
    assert {step for step, is_owed in owed.items() if is_owed} == STEPS_WITH_BORROWED_INSTANCE
