"""The cache of the background probes' results, and the probe of the store."""

import json
import socket
import threading
from types import SimpleNamespace

import pytest

from support.manual_clock import ManualClock
from thrave.components import open_components
from thrave.config import Settings
from thrave.doctor import component_probes
from thrave.doctor.checks import Finding, Outcome
from thrave.doctor.component_probes import MAX_AGE, database_probe, hypervisor_probe, store_probe
from thrave.health import DATABASE, HYPERVISOR, MAX_READY_AGE, STORE, HealthCache


@pytest.fixture
def clock(monkeypatch):
    clock = ManualClock()
    monkeypatch.setattr(component_probes, "monotonic", clock)
    return clock


@pytest.fixture
def health(clock):
    return HealthCache({STORE: MAX_AGE}, clock)


@pytest.fixture
def attempts(monkeypatch):
    """The outcomes of the next attempts of checks; then every attempt fails. `names` are the checks that ran."""
    attempts = SimpleNamespace(outcomes=[], names=[])

    def evaluate_check(check, _context):
        attempts.names.append(check.name)
        outcome = attempts.outcomes.pop(0) if attempts.outcomes else Outcome.FAILED
        return Finding(check, outcome, f"{check.name} {outcome}")

    monkeypatch.setattr(component_probes, "evaluate_check", evaluate_check)
    return attempts


def test_health_cache_returns_the_last_error_until_a_good_result(health):
    health.record(STORE, "disk full")
    assert health.error(STORE) == "disk full"
    health.record(STORE, None)
    assert health.error(STORE) is None


def test_health_cache_ignores_an_error_older_than_the_maximum_age(health, clock):
    health.record(STORE, "disk full")
    clock.now += MAX_AGE
    assert health.error(STORE) == "disk full"
    clock.now += 1
    assert health.error(STORE) is None


def test_health_cache_without_probes_has_no_error_and_does_not_wait():
    assert HealthCache().error(STORE) is None


def test_health_cache_waits_no_longer_than_the_maximum_age_for_the_first_result():
    assert HealthCache({STORE: 0.01}).error(STORE) is None


def test_health_cache_lets_all_requests_wait_for_the_first_result(health):
    errors, asking = [], threading.Barrier(9)

    def ask():
        asking.wait()
        errors.append(health.error(STORE))

    requests = [threading.Thread(target=ask) for _ in range(8)]
    for request in requests:
        request.start()
    asking.wait()
    health.record(STORE, "trouble")
    for request in requests:
        request.join()
    assert errors == ["trouble"] * 8


def test_store_probe_repeats_a_failed_check_once_before_it_counts(health, attempts):
    attempts.outcomes = [Outcome.FAILED, Outcome.OK]
    store_probe(Settings(upload_credentials="policy", store="s3", s3_endpoint="http://127.0.0.1:1"), health).run()
    assert (attempts.names, health.error(STORE)) == (["available"] * 2, None)
    store_probe(Settings(), health).run()
    assert (attempts.names[2:], health.error(STORE)) == (["available"] * 2, "available failed")


def test_store_probe_waits_longer_after_a_good_result(health, clock, attempts):
    probe = store_probe(Settings(), health)
    probe.run_if_due()
    probe.run_if_due()
    assert len(attempts.names) == 4
    attempts.outcomes = [Outcome.OK] * 4
    probe.run_if_due()
    assert attempts.names[4:] == ["available", "key"]
    clock.now += component_probes.GOOD_INTERVALS[STORE] - 1
    probe.run_if_due()
    assert len(attempts.names) == 6
    clock.now += 1
    probe.run_if_due()
    assert len(attempts.names) == 8


def test_store_probe_starts_no_further_call_while_calls_hang(health, monkeypatch):
    calls, respond = [], threading.Event()

    def hang(check, _context):
        calls.append(check.name)
        assert respond.wait(60)
        return Finding(check, Outcome.OK, "")

    monkeypatch.setattr(component_probes, "CHECK_TIMEOUT", 0.01)
    monkeypatch.setattr(component_probes, "evaluate_check", hang)
    probe = store_probe(Settings(), health)
    for _ in range(3):
        probe.run()
    assert (calls, health.error(STORE)) == (["available"] * 2, "no result after 0 s")
    respond.set()
    for call in probe._hanging:
        assert call.wait(60)
    monkeypatch.setattr(component_probes, "CHECK_TIMEOUT", 60.0)
    probe.run()
    assert health.error(STORE) is None


def test_store_probe_records_a_failure_and_the_recovery(health, tmp_path):
    probe = store_probe(Settings(data_dir=tmp_path / "data"), health)
    probe.run_if_due()
    assert "is not a data directory" in health.error(STORE)
    (tmp_path / "data").mkdir()
    probe.run_if_due()
    assert health.error(STORE) is None


def test_store_probe_reports_a_store_that_refuses_connections(health):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    key = {"s3_access_key_id": "AKIA", "s3_secret_access_key": "secret"}
    settings = Settings(store="s3", upload_credentials="service", s3_endpoint=f"http://127.0.0.1:{port}", **key)
    store_probe(settings, health).run()
    assert "Cannot connect" in health.error(STORE)


@pytest.mark.parametrize(
    ("results", "status", "states"),
    [
        ({}, 503, {DATABASE: "unknown", STORE: "unknown"}),
        ({DATABASE: None}, 503, {DATABASE: "ok", STORE: "unknown"}),
        ({DATABASE: None, STORE: "disk full"}, 503, {DATABASE: "ok", STORE: "failed"}),
        ({DATABASE: None, STORE: None}, 200, {DATABASE: "ok", STORE: "ok"}),
    ],
)
def test_readyz_names_each_component_that_cannot_be_used(clock, results, status, states):
    health = HealthCache({DATABASE: MAX_AGE, STORE: MAX_AGE}, clock)
    for probe, error in results.items():
        health.record(probe, error)
    response = health.respond("/readyz", with_errors=False)
    document = json.loads(response.body)
    assert (response.status, document["status"]) == (status, "ready" if status == 200 else "not ready")
    assert document["components"] == {name: {"state": state} for name, state in states.items()}


def test_readyz_has_errors_for_operators_only(health):
    health.record(STORE, "disk full")
    assert b"disk full" not in health.respond("/readyz", with_errors=False).body
    components = json.loads(health.respond("/readyz", with_errors=True).body)["components"]
    assert components == {STORE: {"state": "failed", "error": "disk full"}}


def test_readyz_ignores_a_result_of_a_probe_that_no_longer_runs(health, clock):
    health.record(STORE, None)
    clock.now += MAX_READY_AGE
    assert health.respond("/readyz", with_errors=True).status == 200
    clock.now += 1
    response = health.respond("/readyz", with_errors=True)
    assert (response.status, b"not checked for 61 s" in response.body) == (503, True)


def test_database_probe_reports_a_missing_database_and_the_recovery(tmp_path):
    settings = Settings(data_dir=tmp_path)
    health = HealthCache({DATABASE: MAX_AGE})
    probe = database_probe(settings, health)
    probe.run()
    assert "is not a data directory" in health.error(DATABASE)
    open_components(settings).database.dispose()
    probe.run()
    assert health.error(DATABASE) is None
    probe._context.close()


def test_hypervisor_probe_reports_an_instance_folder_that_cannot_be_read(tmp_path):
    health = HealthCache({HYPERVISOR: MAX_AGE})
    probe = hypervisor_probe(Settings(data_dir=tmp_path), health)
    probe.run()
    assert health.error(HYPERVISOR) is None  # no instance was added yet
    (tmp_path / "instances").write_text("")
    probe.run()
    assert health.error(HYPERVISOR) == f"{tmp_path / 'instances'}: Not a directory"


def test_hypervisor_probe_reports_a_libvirt_that_does_not_run(tmp_path):
    health = HealthCache({HYPERVISOR: MAX_AGE})
    settings = Settings(
        data_dir=tmp_path, hypervisor="libvirt", libvirt_uri=f"qemu+unix:///system?socket={tmp_path}/no"
    )
    hypervisor_probe(settings, health).run()
    assert health.error(HYPERVISOR)
