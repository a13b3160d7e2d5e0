"""Every fault of the table, on the way to a real store: what comes of it, in the bucket and in the instance."""

import pytest

from support.store_faults import faults
from support.store_faults.fault_bench import FaultBench, StoreTimeouts
from support.store_faults.fault_proxy import Kind, Rule
from support.store_faults.fault_table import (
    CLAIMING,
    LATER,
    PAGE,
    STORING,
    SURVIVES,
    WHEN_CLAIMED,
    WHEN_STORED,
    cases,
    name,
    page,
)
from thrave.buckets import retrying_store
from thrave.bundle.errors import BundleError
from thrave.cli import remote_folders
from thrave.cli.folders import FolderError
from thrave.cli.main import exit_code
from thrave.compute import power
from thrave.tasks import store_calls

pytestmark = pytest.mark.s3

CALM = StoreTimeouts(timeout=30, patience=30)
STALLS = (faults.silence, faults.silence_midway)


@pytest.fixture(scope="module")
def bench(seaweedfs, proxy, tmp_path_factory):
    bench = FaultBench(tmp_path_factory.mktemp("faults"), seaweedfs, proxy.url)
    yield bench
    bench.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses; and no upload is abandoned only because the machine is busy."""
    monkeypatch.setattr(store_calls, "STOP_TIMEOUT", 60.0)
    monkeypatch.setattr(retrying_store, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(power, "POLL_INTERVAL", 0.01)


def parametrize(table, *only):
    """Each cell of these columns twice: met once, and again and again; where both come to the same, the latter."""
    given = [
        pytest.param(fault, kind, outcome.always if again else outcome.once, again, id=f"{name(fault)}-{kind}-{times}")
        for fault, kind, outcome in cases(table, only)
        for again, times in ((False, "once"), (True, "always"))
        if again or outcome.once != outcome.always
    ]
    return pytest.mark.parametrize(("fault", "kind", "outcome", "again"), given)


def temper(fault, again):
    return StoreTimeouts(timeout=0.3 if fault in STALLS else 30, patience=0.15 if again else 30)


@parametrize(WHEN_CLAIMED, *CLAIMING)
def test_bucket_is_claimed_or_refused_despite_fault(fault, kind, outcome, again, bench, proxy):
    rule = Rule(kind, fault, again=again)
    with proxy.doing(rule):
        assert bench.claim(kind, temper(fault, again)) == outcome
    assert rule.met


@parametrize(WHEN_STORED, *STORING[:5])
def test_bundle_is_complete_or_removed_despite_fault(fault, kind, outcome, again, bench, proxy):
    rule = Rule(kind, fault, first=2 if kind is Kind.HEAD_OBJECT else 1, again=again)
    with proxy.doing(rule):
        task = bench.bundle(kind, temper(fault, again))
    assert rule.met
    assert (task.error_code or SURVIVES) == outcome, task.error_message
    assert bench.instance_runs(task)
    if outcome == SURVIVES:
        assert bench.opens_to_the_same(CALM)
        bench.clear()
    elif fault in STALLS or kind is Kind.HEAD_OBJECT:
        # A deletion is proved by HEAD; and on a busy machine a stalling store may take too long for the clean-up.
        bench.look_for_left_overs(CALM)
    assert bench.files() == []


@parametrize(WHEN_STORED, Kind.DELETE_OBJECTS)
def test_objects_of_a_failed_task_are_removed_now_or_later(fault, kind, outcome, again, bench, proxy):
    rule = Rule(kind, fault, again=again)
    with proxy.doing(rule, Rule(Kind.PUT_MANIFEST, faults.denied_midway)):
        task = bench.bundle(kind, temper(fault, again))
    assert rule.met
    assert task.error_code == "Client.S3Error"
    assert bench.instance_runs(task)
    assert bench.is_written_down(task) == (outcome == LATER)
    bench.look_for_left_overs(CALM)
    assert not bench.is_written_down(task)
    assert bench.files() == []


@pytest.fixture(scope="module")
def bundled(bench):
    """A bundle that is complete."""
    assert bench.bundle(Kind.PUT_OBJECT, CALM).error_code is None
    yield bench
    bench.clear()


@parametrize(WHEN_STORED, Kind.GET_RANGE)
def test_bundle_opens_to_the_same_bytes_or_not_at_all(fault, kind, outcome, again, bundled, proxy, monkeypatch):
    mood, rule = temper(fault, again), Rule(kind, fault, again=again)
    monkeypatch.setattr(remote_folders, "RETRY_TIMEOUT", mood.patience)
    with proxy.doing(rule):
        assert opened(bundled, mood, proxy.url) == outcome
    assert rule.met


def opened(bench, mood, url):
    try:
        return SURVIVES if bench.opens_to_the_same(mood, url=url) else "differs"
    except (BundleError, FolderError) as error:
        return exit_code(error).name


def test_page_is_made_from_the_table():
    assert PAGE.read_text() == page(), "PYTHONPATH=tests python -m support.store_faults.fault_table"
