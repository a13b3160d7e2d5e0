"""Fixtures of tests that run parts of a task in this process; `support/service/upload_bench.py` has the parts."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from support.crashes.kill_sweep import kill_remaining_services
from support.service.stall_clock import StallClock
from support.service.upload_bench import UploadBench, directory
from thrave.tasks.repository import TaskRepository
from thrave.vault import Vault


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown():
    """Stop killed services before the fixtures end: one of them unmounts the disk that a service works on."""
    kill_remaining_services()


@pytest.fixture
def buckets(tmp_path):
    """A directory store whose calls a test can block; all are released at the end."""
    buckets = directory(tmp_path)
    yield buckets
    buckets.release_all()


@pytest.fixture
def run_in_thread(buckets):
    """Starts a function in another thread and returns its future."""
    with ThreadPoolExecutor() as threads:
        yield threads.submit
        buckets.release_all()


@pytest.fixture
def stall_clock(monkeypatch):
    """The clock of the task monitor; it stops until the test advances it."""
    clock = StallClock()
    monkeypatch.setattr("thrave.tasks.monitor.monotonic", clock.monotonic)
    return clock


@pytest.fixture
def bench(tmp_path):
    """A task whose volume is to be uploaded, in a database and a bucket of its own."""
    with closing(UploadBench(tmp_path, directory(tmp_path))) as bench:
        yield bench


@pytest.fixture
def records(engine, tmp_path):
    return TaskRepository(engine, Vault.open_or_create(tmp_path / "vault.key"))
