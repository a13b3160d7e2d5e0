"""Every fault of the table between Thrave and a real store: the state of the bucket and of the instance after it."""

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
from thrave.cli.exit_codes import exit_code
from thrave.cli.folders import FolderError
from thrave.compute import power
from thrave.tasks import store_calls

pytestmark = pytest.mark.s3

NORMAL = StoreTimeouts(timeout=30, retry_timeout=30)
STALLS = (faults.no_response, faults.stalled_response)


@pytest.fixture(scope="module")
def bench(seaweedfs, proxy, tmp_path_factory):
    bench = FaultBench(tmp_path_factory.mktemp("faults"), seaweedfs, proxy.url)
    yield bench
    bench.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Short waits between attempts, but a long one before an upload is abandoned, for a busy machine."""
    monkeypatch.setattr(store_calls, "STOP_TIMEOUT", 60.0)
    monkeypatch.setattr(retrying_store, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(power, "POLL_INTERVAL", 0.01)


def parametrize(table, *only):
    """Each cell of these columns for one fault and for repeated faults; only the latter if both results are equal.

    `make test` runs the first cell of each row and each column, `make test-sweep` the others.
    """
    parameters, rows, columns = [], set(), set()
    for fault, kind, outcome in cases(table, only):
        marks = [pytest.mark.sweep] if name(fault) in rows and kind in columns else []
        rows.add(name(fault))
        columns.add(kind)
        parameters += [
            pytest.param(
                fault,
                kind,
                outcome.always if is_repeated else outcome.once,
                is_repeated,
                id=f"{name(fault)}-{kind}-{'always' if is_repeated else 'once'}",
                marks=marks,
            )
            for is_repeated in (False, True)
            if is_repeated or outcome.once != outcome.always
        ]
    return pytest.mark.parametrize(("fault", "kind", "outcome", "is_repeated"), parameters)


def timeouts_for(fault, is_repeated):
    return StoreTimeouts(timeout=0.3 if fault in STALLS else 30, retry_timeout=0.15 if is_repeated else 30)


@parametrize(WHEN_CLAIMED, *CLAIMING)
def test_bucket_is_claimed_or_refused_despite_fault(fault, kind, outcome, is_repeated, bench, proxy):
    rule = Rule(kind, fault, is_repeated=is_repeated)
    with proxy.injecting(rule):
        assert bench.claim(kind, timeouts_for(fault, is_repeated)) == outcome
    assert rule.injected


@parametrize(WHEN_STORED, *STORING[:5])
def test_bundle_is_complete_or_removed_despite_fault(fault, kind, outcome, is_repeated, bench, proxy):
    rule = Rule(kind, fault, first=2 if kind is Kind.HEAD_OBJECT else 1, is_repeated=is_repeated)
    with proxy.injecting(rule):
        task = bench.bundle(kind, timeouts_for(fault, is_repeated))
    assert rule.injected
    assert (task.error_code or SURVIVES) == outcome, task.error_message
    assert bench.instance_runs(task)
    if outcome == SURVIVES:
        assert bench.opens_to_same_disk(NORMAL)
        bench.clear()
    elif fault in STALLS or kind is Kind.HEAD_OBJECT:
        # A deletion is verified by HEAD. On a busy machine the cleanup may not finish while the store stalls.
        bench.delete_orphaned_objects(NORMAL)
    assert bench.files() == []


@parametrize(WHEN_STORED, Kind.DELETE_OBJECTS)
def test_objects_of_a_failed_task_are_removed_now_or_later(fault, kind, outcome, is_repeated, bench, proxy):
    rule = Rule(kind, fault, is_repeated=is_repeated)
    with proxy.injecting(rule, Rule(Kind.PUT_MANIFEST, faults.denied_early)):
        task = bench.bundle(kind, timeouts_for(fault, is_repeated))
    assert rule.injected
    assert task.error_code == "Client.S3Error"
    assert bench.instance_runs(task)
    assert bench.has_recorded_objects(task) == (outcome == LATER)
    bench.delete_orphaned_objects(NORMAL)
    assert not bench.has_recorded_objects(task)
    assert bench.files() == []


@pytest.fixture(scope="module")
def bundled(bench):
    """A bench with a complete bundle."""
    assert bench.bundle(Kind.PUT_OBJECT, NORMAL).error_code is None
    yield bench
    bench.clear()


@parametrize(WHEN_STORED, Kind.GET_RANGE)
def test_bundle_opens_to_the_same_bytes_or_not_at_all(fault, kind, outcome, is_repeated, bundled, proxy, monkeypatch):
    timeouts, rule = timeouts_for(fault, is_repeated), Rule(kind, fault, is_repeated=is_repeated)
    monkeypatch.setattr(remote_folders, "RETRY_TIMEOUT", timeouts.retry_timeout)
    with proxy.injecting(rule):
        assert open_result(bundled, timeouts, proxy.url) == outcome
    assert rule.injected


def open_result(bench, timeouts, url):
    try:
        return SURVIVES if bench.opens_to_same_disk(timeouts, url=url) else "differs"
    except (BundleError, FolderError) as error:
        return exit_code(error).name


def test_page_equals_the_table():
    assert PAGE.read_text() == page(), "PYTHONPATH=tests python -m support.store_faults.fault_table"
