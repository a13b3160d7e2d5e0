"""Queries of tasks for operators, on both kinds of database."""

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from thrave.bundle.model import BundleKey, PartRecord
from thrave.database import bundle_task, migrate, open_engine
from thrave.tasks.errors import BundleTaskNotFound, TaskFailure
from thrave.tasks.journal import StoredBatch, StoredObject
from thrave.tasks.models import UNFINISHED, BundleRequest, BundleTaskState, TaskEvent
from thrave.tasks.queries import StateDuration, TaskFilter, TaskQueries, bytes_done, state_durations, time_in

S = BundleTaskState
T0 = datetime(2026, 11, 23, 12, tzinfo=UTC)
WAY = {
    S.PENDING: (),
    S.BUNDLING: (S.WAITING_FOR_SHUTDOWN, S.BUNDLING),
    S.STORING: (S.WAITING_FOR_SHUTDOWN, S.BUNDLING, S.STORING),
    S.COMPLETE: (S.WAITING_FOR_SHUTDOWN, S.BUNDLING, S.STORING, S.COMPLETE),
    S.FAILED: (S.WAITING_FOR_SHUTDOWN, S.FAILED),
}


@pytest.fixture
def engine(database, tmp_path):
    engine = open_engine(database.get("database_url", f"sqlite:///{tmp_path / 'thrave.db'}"))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def queries(engine, records):
    return TaskQueries(engine, records)


@pytest.fixture
def add(engine, records):
    """Return a function that records a task which started `minute` minutes after T0, and changes its state."""

    def task(bundle_id, minute=0, *, account_id="1" * 12, instance_id=None, host="kvm-1", state=S.PENDING):
        request = BundleRequest(
            account_id=account_id, owner_id=account_id, instance_id=instance_id or f"i-{bundle_id}", bucket="bucket",
            prefix=bundle_id, access_key_id="AKIA", upload_policy="policy", upload_policy_signature="signature",
        )  # fmt: skip
        with engine.begin() as connection:
            records.add(connection, bundle_id, host, request)
        for step in WAY[state]:
            assert records.change_state(bundle_id, step)
        time = T0 + timedelta(minutes=minute)
        mine = bundle_task.update().where(bundle_task.c.bundle_id == bundle_id)
        with engine.begin() as connection:
            connection.execute(mine.values(start_time=time, update_time=time))

    return task


def ids(seen):
    return [one.task.bundle_id for one in seen]


@pytest.fixture
def five(add):
    add("one", 1, account_id="2" * 12, state=S.COMPLETE)
    add("two", 2, host="kvm-2", state=S.FAILED)
    add("three", 3, instance_id="i-3", state=S.BUNDLING)
    add("four", 4, host="kvm-2")
    add("five", 5, instance_id="i-1", state=S.STORING)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, ["one", "two", "three", "four", "five"]),
        ({"account_id": "2" * 12}, ["one"]),
        ({"instance_id": "i-3"}, ["three"]),
        ({"host": "kvm-2"}, ["two", "four"]),
        ({"states": frozenset({S.COMPLETE, S.FAILED})}, ["one", "two"]),
        ({"states": frozenset({S.BUNDLING})}, ["three"]),
        ({"states": frozenset({S.FAILED, S.BUNDLING})}, ["two", "three"]),
        ({"since": T0 + timedelta(minutes=3)}, ["three", "four", "five"]),
        ({"host": "kvm-2", "states": frozenset({S.PENDING}), "since": T0}, ["four"]),
        ({"host": "nowhere"}, []),
    ],
)
def test_latest_returns_selected_tasks_newest_last(five, queries, wanted, expected):
    assert ids(queries.latest(TaskFilter(**wanted), limit=10)) == expected


def test_latest_returns_newest_tasks(five, queries):
    assert ids(queries.latest(TaskFilter(), limit=2)) == ["four", "five"]


def test_of_names_unknown_task(five, queries):
    assert ids(queries.of(["five", "one"])) == ["one", "five"]
    with pytest.raises(BundleTaskNotFound, match="six"):
        queries.of(["one", "six"])


def test_latest_makes_two_queries(five, queries, engine):
    seen = []
    sa.event.listen(engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
    queries.latest(TaskFilter(), limit=100)
    assert len([query for query in seen if query.startswith("SELECT bundle")]) == 2


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (TaskFilter(account_id="1" * 12), "bundle_task_by_account"),
        (TaskFilter(since=T0), "bundle_task_by_start_time"),  # the index has the order of the result
        (TaskFilter(host="kvm-1", states=UNFINISHED), "bundle_task_in_progress_on_host"),
        (TaskFilter(instance_id="i-3", states=frozenset({S.BUNDLING})), "bundle_task_in_progress"),
    ],
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_filter_uses_index(engine, wanted, index):
    query = sa.select(bundle_task).where(*wanted.conditions()).order_by(bundle_task.c.start_time.desc()).limit(100)
    text = query.compile(engine, compile_kwargs={"literal_binds": True})
    with engine.connect() as connection:
        plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]
    assert any(index in line for line in plan)


def test_stored_totals_count_stored_objects(add, records, queries, part):
    add("one", state=S.BUNDLING)
    journal = records.journal("one")
    journal.start_sealing(BundleKey(bytes(16), bytes(16)))
    journal.record_upload("one.part.0", part(0))
    journal.record_upload("one.part.1", part(1), StoredBatch([StoredObject("one.part.0", 100)]))
    journal.record_upload("one.manifest.json")
    journal.record_stored(StoredBatch([StoredObject("one.manifest.json", 7)]))
    (seen,) = queries.of(["one"])
    assert (seen.stored.objects, seen.stored.parts, seen.stored.size, [*seen.orphaned_keys]) == (3, 1, 107, [])


@pytest.fixture
def part():
    return lambda index: PartRecord(index=index, filename=f"one.part.{index}", size=100, sha1="0" * 40, sha256="0" * 64)


def test_report_lists_orphaned_keys_of_failed_task(add, records, queries):
    add("one", state=S.BUNDLING)
    records.journal("one").record_upload("one.part.0")
    records.fail("one", TaskFailure("Client.S3Error", "no"))
    (seen,) = queries.of(["one"])
    assert [*seen.orphaned_keys] == ["one.part.0"]
    records.journal("one").end_deletion(["one.part.0"])
    (seen,) = queries.of(["one"])
    assert [*seen.orphaned_keys] == []


def event(second, state, message=None):
    return TaskEvent(T0 + timedelta(seconds=second), state, message)


HISTORY = [
    event(0, S.PENDING), event(2, S.WAITING_FOR_SHUTDOWN), event(5, S.BUNDLING), event(6, S.BUNDLING, "calls repeated"),
    event(15, S.STORING), event(16, S.COMPLETE),
]  # fmt: skip


@pytest.mark.parametrize(
    ("happened", "now", "seconds"),
    [
        (HISTORY, 99, [2, 3, 10, None, 1, None]),
        (HISTORY[:4], 9, [2, 3, 4, None]),
        (HISTORY[:1], 1, [1]),
        ([], 1, []),
    ],
    ids=["complete", "in progress", "pending", "from before there was a history"],
)
def test_state_durations_end_at_next_state_or_now(happened, now, seconds):
    spent = state_durations(happened, T0 + timedelta(seconds=now))
    assert spent == [
        StateDuration(event, None if lasted is None else timedelta(seconds=lasted))
        for event, lasted in zip(happened, seconds, strict=True)
    ]


def test_time_in_returns_total_of_state():
    spent = state_durations(HISTORY, T0)
    assert time_in(S.BUNDLING, spent) == timedelta(seconds=10)
    assert time_in(S.CANCELLING, spent) == timedelta()


@pytest.mark.parametrize(
    ("length", "size", "done"), [(1, None, None), (3, 1000, 250), (5, 1000, 1000), (6, 1000, 1000)]
)
def test_bytes_done_is_known_once_volume_is_open(add, records, length, size, done):
    add("one", state=S.BUNDLING)
    records.set_progress("one", S.BUNDLING, 25)
    if size is not None:
        records.set_volume_size("one", size)
    assert bytes_done(records.get("one"), HISTORY[:length]) == done
