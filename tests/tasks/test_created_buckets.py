"""Buckets that requests created: removed if their task fails, kept in every other case."""

import threading
from dataclasses import replace

import pytest

from thrave.buckets.directory_store import DirectoryStore
from thrave.database import migrate, open_engine
from thrave.tasks import created_buckets as module
from thrave.tasks.created_buckets import BucketBusyError, CreatedBuckets
from thrave.tasks.errors import TaskCancelled
from thrave.tasks.models import BundleRequest, BundleTaskState

OWNER, BUCKET, HOST = "111111111111", "my-bucket", "localhost"
REQUEST = BundleRequest(
    account_id=OWNER, owner_id=OWNER, instance_id="i-1", bucket=BUCKET, prefix="winami", access_key_id="AKIA",
    upload_policy="e30=", upload_policy_signature="none", created_bucket=True,
)  # fmt: skip


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def engine(request, tmp_path):
    url = f"sqlite:///{tmp_path / 'thrave.db'}"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres").new_database()
    engine = open_engine(url)
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def created_buckets(engine, records):
    return CreatedBuckets(engine, records)


@pytest.fixture
def buckets(tmp_path):
    buckets = DirectoryStore(tmp_path / "buckets")
    assert buckets.create(BUCKET, OWNER) is True
    return buckets


@pytest.fixture
def add(engine, records):
    """Return a function that records a task and returns it."""

    def add(bundle_id, **changes):
        request = replace(REQUEST, **{"instance_id": f"i-{bundle_id}", "prefix": bundle_id, **changes})
        with engine.begin() as connection:
            records.add(connection, bundle_id, HOST, request)
        return records.get(bundle_id)

    return add


def fail(records, bundle_id):
    records.fail(bundle_id, TaskCancelled())


def test_bucket_of_failed_task_is_removed_with_its_owner(add, records, created_buckets, buckets, tmp_path):
    add("bun-1")
    fail(records, "bun-1")
    created_buckets.remove_all(buckets, HOST)
    assert buckets.owner(BUCKET) is None
    assert [*(tmp_path / "buckets" / ".owners").iterdir()] == []
    assert records.get("bun-1").created_bucket is None


def test_bucket_with_another_task_is_kept(add, records, created_buckets, buckets):
    add("bun-1")
    add("bun-2", created_bucket=False)
    fail(records, "bun-1")
    created_buckets.remove_all(buckets, HOST)
    assert buckets.owner(BUCKET) == OWNER
    fail(records, "bun-2")
    created_buckets.remove_all(buckets, HOST)
    assert buckets.owner(BUCKET) is None


def test_bucket_with_objects_is_kept_with_its_owner(add, records, created_buckets, buckets):
    add("bun-1")
    fail(records, "bun-1")
    buckets.put(BUCKET, "mine", b"x")
    created_buckets.remove_all(buckets, HOST)
    assert (buckets.owner(BUCKET), records.get("bun-1").created_bucket) == (OWNER, None)


def test_bucket_whose_objects_could_not_be_deleted_is_removed_later(add, records, created_buckets, buckets):
    add("bun-1")
    records.journal("bun-1").record_upload("bun-1.part.0")
    buckets.put(BUCKET, "bun-1.part.0", b"x")
    fail(records, "bun-1")
    created_buckets.remove_all(buckets, HOST)
    assert (buckets.owner(BUCKET), records.get("bun-1").created_bucket) == (OWNER, True)
    buckets.delete(BUCKET, ["bun-1.part.0"])
    created_buckets.remove_all(buckets, HOST)
    assert (buckets.owner(BUCKET), records.get("bun-1").created_bucket) == (None, None)


def test_bucket_that_existed_before_is_kept(add, records, created_buckets, buckets):
    add("bun-1", created_bucket=False)
    fail(records, "bun-1")
    created_buckets.remove_all(buckets, HOST)
    assert buckets.owner(BUCKET) == OWNER


def test_bucket_of_complete_task_is_kept(add, records, created_buckets, buckets):
    add("bun-1")
    for state in (BundleTaskState.WAITING_FOR_SHUTDOWN, BundleTaskState.BUNDLING, BundleTaskState.STORING):
        records.change_state("bun-1", state)
    assert records.complete("bun-1")
    created_buckets.remove_all(buckets, HOST)
    assert (buckets.owner(BUCKET), records.get("bun-1").created_bucket) == (OWNER, None)


def test_bucket_in_use_is_not_removed(add, records, created_buckets, buckets, monkeypatch):
    """A second request uses the bucket that the failed first task is about to remove."""
    monkeypatch.setattr(module, "LOCK_TIMEOUT", 0.05)
    add("bun-1")
    fail(records, "bun-1")
    with created_buckets.in_use(BUCKET):
        assert buckets.create(BUCKET, OWNER) is False
        created_buckets.remove_all(buckets, HOST)
        assert buckets.owner(BUCKET) == OWNER
        add("bun-2", created_bucket=False)
    created_buckets.remove_all(buckets, HOST)
    assert buckets.owner(BUCKET) == OWNER


def test_bucket_cannot_be_used_while_it_is_removed(engine, records, created_buckets, buckets, monkeypatch):
    monkeypatch.setattr(module, "LOCK_TIMEOUT", 0.05)
    removing, over = threading.Event(), threading.Event()

    class Slow:
        def remove(self, bucket, owner):
            removing.set()
            over.wait(60)
            return buckets.remove(bucket, owner)

    thread = threading.Thread(target=created_buckets.remove, args=(Slow(), BUCKET, OWNER))
    thread.start()
    assert removing.wait(60)
    try:
        with pytest.raises(BucketBusyError), CreatedBuckets(engine, records).in_use(BUCKET):
            pass
    finally:
        over.set()
        thread.join()
    with created_buckets.in_use(BUCKET):
        assert buckets.owner(BUCKET) is None


def test_bucket_can_be_used_by_many_requests_at_once(engine, records, created_buckets):
    with created_buckets.in_use(BUCKET), CreatedBuckets(engine, records).in_use(BUCKET):
        pass
