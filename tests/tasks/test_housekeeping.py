"""Background jobs of an agent: deletion of orphaned objects, retention, retries."""

from datetime import timedelta

import pytest
import sqlalchemy as sa

from thrave.buckets.directory_store import DirectoryStore
from thrave.buckets.errors import TransientError
from thrave.concurrency import utc_now
from thrave.database import bundle_part, bundle_task, bundle_task_event, host, migrate, open_engine
from thrave.retry import RetrySchedule
from thrave.tasks.errors import TaskCancelled
from thrave.tasks.housekeeping import ObjectCleanup, TaskRetention
from thrave.tasks.models import BundleRequest, BundleTaskState

ACCOUNT = "111111111111"
HERE, ELSEWHERE, NOWHERE = "here", "elsewhere", "nowhere"


@pytest.fixture
def engine(tmp_path):
    engine = open_engine(f"sqlite:///{tmp_path / 'thrave.db'}")
    migrate(engine)
    row = {"lease": "x", "version": "1", "worker_concurrency": 1, "start_time": utc_now(), "heartbeat_time": utc_now()}
    with engine.begin() as connection:
        connection.execute(host.insert(), [{**row, "host": name, "state": "active"} for name in (HERE, ELSEWHERE)])
    yield engine
    engine.dispose()


@pytest.fixture
def buckets(tmp_path):
    buckets = DirectoryStore(tmp_path / "buckets")
    buckets.create("bucket", ACCOUNT)
    return buckets


@pytest.fixture
def task(engine, records, buckets):
    """Return a function that creates a task with two objects in the bucket."""

    def make(bundle_id, on=HERE, *, failed=True):
        request = BundleRequest(
            account_id=ACCOUNT, owner_id=ACCOUNT, instance_id=bundle_id, bucket="bucket", prefix=bundle_id,
            access_key_id="AKIA", upload_policy="", upload_policy_signature="",
        )  # fmt: skip
        with engine.begin() as connection:
            records.add(connection, bundle_id, on, request)
        for number in range(2):
            records.journal(bundle_id).record_upload(f"{bundle_id}.part.{number}")
            buckets.put("bucket", f"{bundle_id}.part.{number}", b"part")
        if failed:
            records.fail(bundle_id, TaskCancelled())
        return bundle_id

    return make


class Refusing:
    """A store that can refuse deletions."""

    def __init__(self, buckets):
        self.buckets = buckets
        self.refuses = True
        self.asked = 0

    def delete(self, bucket, keys):
        self.asked += 1
        if self.refuses:
            raise TransientError("SlowDown", 503, "Please reduce your request rate.")
        self.buckets.delete(bucket, keys)

    def head(self, bucket, key):
        return self.buckets.head(bucket, key)

    def on_behalf_of(self, _access_key_id):
        return self


def left_overs(records, buckets):
    return ObjectCleanup(records, buckets, HERE, stall_timeout=10.0)


def test_object_cleanup_deletes_only_orphaned_objects(records, buckets, task):
    left, unfinished = task("bun-1"), task("bun-2", failed=False)
    buckets.put("bucket", "bun-1.part.10", b"of another user")
    assert [found.bundle_id for found in records.with_orphans()] == [left]
    left_overs(records, buckets).run_once()
    assert [*buckets.list("bucket", "")] == ["bun-1.part.10", f"{unfinished}.part.0", f"{unfinished}.part.1"]
    assert records.with_orphans() == []
    assert records.journal(left).objects() == []


def test_object_cleanup_of_another_host_only_if_retired(records, buckets, task):
    task("bun-1", ELSEWHERE)
    task("bun-2", NOWHERE)
    left_overs(records, buckets).run_once()
    assert [found.bundle_id for found in records.with_orphans()] == ["bun-1"]


def test_object_cleanup_retries_and_starts_at_once_after_restart(records, buckets, task):
    task("bun-1")
    refusing = Refusing(buckets)
    looking = left_overs(records, refusing)
    for _ in range(3):
        looking.run_once()
    assert refusing.asked == 1
    assert [found.bundle_id for found in records.with_orphans()] == ["bun-1"]
    refusing.refuses = False
    looking.run_once()
    assert refusing.asked == 1
    left_overs(records, refusing).run_once()
    assert records.with_orphans() == []


def test_object_cleanup_includes_task_that_fails_later(records, buckets, task):
    looking = left_overs(records, buckets)
    looking.run_once()
    task("bun-1")
    looking.run_once()
    assert records.with_orphans() == []


def forget_objects(records, bundle_id):
    journal = records.journal(bundle_id)
    journal.end_deletion([item.key for item in journal.objects()])


def age(engine, days):
    with engine.begin() as connection:
        connection.execute(bundle_task.update().values(update_time=utc_now() - timedelta(days=days)))


def kept(engine):
    with engine.connect() as connection:
        return [*connection.execute(sa.select(bundle_task.c.bundle_id).order_by(bundle_task.c.bundle_id)).scalars()]


def test_retention_deletes_rows_events_and_workflow(engine, records, task):
    task("bun-1")
    forget_objects(records, "bun-1")
    task("bun-2", failed=False)
    forgotten = []
    retention = TaskRetention(records, lambda before: forgotten.append(before) or 0, timedelta(days=7))
    age(engine, 6)
    retention.run_once()
    assert kept(engine) == ["bun-1", "bun-2"]
    age(engine, 8)
    retention.run_once()
    assert kept(engine) == ["bun-2"]
    with engine.connect() as connection:
        assert {*connection.execute(sa.select(bundle_task_event.c.bundle_id)).scalars()} == {"bun-2"}
    assert len(forgotten) == 2


def test_retention_keeps_objects_of_complete_bundle(engine, records, buckets, task):
    task("bun-1", failed=False)
    for state in (BundleTaskState.WAITING_FOR_SHUTDOWN, BundleTaskState.BUNDLING, BundleTaskState.STORING):
        records.change_state("bun-1", state)
    assert records.complete("bun-1")
    age(engine, 8)
    TaskRetention(records, lambda _: 0, timedelta(days=7)).run_once()
    with engine.connect() as connection:
        assert connection.execute(sa.select(bundle_part)).all() == []
    assert len([*buckets.list("bucket", "")]) == 2


@pytest.mark.parametrize("reason", ["orphaned objects", "power recovery"])
def test_retention_keeps_task_with_work_to_do(engine, records, task, reason):
    task("bun-1")
    if reason == "power recovery":
        forget_objects(records, "bun-1")
        records.schedule_power_recovery("bun-1", utc_now())
    age(engine, 100)
    TaskRetention(records, lambda _: 0, timedelta(days=7)).run_once()
    assert kept(engine) == ["bun-1"]


def test_retention_deletes_more_than_one_batch(engine, records, task, monkeypatch):
    monkeypatch.setattr("thrave.tasks.housekeeping.DELETE_BATCH", 2)
    for number in range(5):
        forget_objects(records, task(f"bun-{number}"))
    age(engine, 8)
    more = [1, 1, 0]
    TaskRetention(records, lambda _: more.pop(0), timedelta(days=7)).run_once()
    assert (kept(engine), more) == ([], [])


def test_retry_schedule_has_growing_intervals():
    now = [0.0]
    retries, tried = RetrySchedule(1.0, 10.0, clock=lambda: now[0]), []
    while now[0] < 60:
        if retries.is_due("it"):
            tried.append(now[0])
            retries.record_failure("it")
        now[0] += 0.5
    assert tried == [0.0, 1.0, 3.0, 7.0, 15.0, 25.0, 35.0, 45.0, 55.0]
    assert retries.is_due("another")
    retries.forget("it")
    assert retries.is_due("it")
