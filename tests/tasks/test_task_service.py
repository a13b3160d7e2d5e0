"""Responses about tasks that depend only on the database."""

import time
from datetime import timedelta

import pytest
import sqlalchemy as sa

from thrave.concurrency import utc_now
from thrave.database import bundle_task, task_in_progress
from thrave.tasks import task_service
from thrave.tasks.errors import BundleTaskNotFound
from thrave.tasks.models import FINISHED, BundleTaskState
from thrave.tasks.repository import TaskRepository
from thrave.tasks.task_service import BundleTaskService
from thrave.vault import Vault

OWNER = "111111111111"
RETENTION = timedelta(days=7)


@pytest.fixture
def tasks(engine, tmp_path):
    records = TaskRepository(engine, Vault.open_or_create(tmp_path / "vault.key"))
    return BundleTaskService(
        engine, records, lambda *_: None, default_host="localhost", retention=RETENTION, max_per_account=20
    )


@pytest.fixture
def selects(engine):
    """Return a list that gets every query from now on."""
    seen = []
    sa.event.listen(engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
    return seen


def insert(engine, bundle_id, state, *, ended=timedelta()):
    row = {
        "bundle_id": bundle_id, "account_id": OWNER, "owner_id": OWNER, "instance_id": bundle_id, "host": "localhost",
        "state": state, "start_time": utc_now() - RETENTION * 2, "update_time": utc_now() - ended, "bucket": "bucket",
        "prefix": bundle_id, "access_key_id": "AKIA",
    }  # fmt: skip
    with engine.begin() as connection:
        connection.execute(bundle_task.insert(), row)


@pytest.mark.parametrize("state", BundleTaskState)
def test_describe_reads_task_until_it_has_ended(engine, tasks, selects, state):
    insert(engine, "bun-1", state)
    tasks.describe(OWNER, ["bun-1"])
    selects.clear()
    assert tasks.describe(OWNER, ["bun-1"])[0].state is state
    assert len(selects) == (0 if state in FINISHED else 1)


def test_cached_task_is_hidden_from_other_accounts(engine, tasks):
    insert(engine, "bun-1", "complete")
    tasks.describe(OWNER, ["bun-1"])
    with pytest.raises(BundleTaskNotFound):
        tasks.describe("222222222222", ["bun-1"])


def test_cached_task_is_shown_until_retention_ends(engine, tasks, monkeypatch):
    insert(engine, "bun-1", "complete", ended=RETENTION - timedelta(hours=1))
    tasks.describe(OWNER, ["bun-1"])
    later = time.monotonic() + 2 * 3600
    monkeypatch.setattr(task_service, "monotonic", lambda: later)
    with pytest.raises(BundleTaskNotFound):
        tasks.describe(OWNER, ["bun-1"])


def test_task_is_not_shown_after_retention(engine, tasks):
    insert(engine, "bun-1", "complete", ended=RETENTION + timedelta(hours=1))
    insert(engine, "bun-2", "complete", ended=RETENTION - timedelta(hours=1))
    with pytest.raises(BundleTaskNotFound):
        tasks.describe(OWNER, ["bun-1"])
    assert [task.bundle_id for task in tasks.describe(OWNER)] == ["bun-2"]


def test_cache_has_maximum_size(engine, tasks, monkeypatch):
    monkeypatch.setattr(task_service, "MAX_CACHED", 2)
    ids = [f"bun-{number}" for number in range(5)]
    for bundle_id in ids:
        insert(engine, bundle_id, "failed")
    assert [task.bundle_id for task in tasks.describe(OWNER, ids)] == ids
    assert len(tasks._ended) <= 2


def test_task_in_progress_condition_equals_unfinished_states(engine):
    for state in BundleTaskState:
        insert(engine, f"bun-{state}", state)
    query = sa.select(bundle_task.c.state).where(task_in_progress)
    with engine.connect() as connection:
        assert set(connection.execute(query).scalars()) == {*BundleTaskState} - FINISHED
