"""Drain of a host: its agent ends also after errors, and reports unfinished work."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog

from support.eventually import eventually
from thrave.agent import START_AGAIN, Agent
from thrave.components import open_components
from thrave.compute.base import Overlay
from thrave.compute.instance import VolumeFile
from thrave.compute.power_records import PowerAction, PowerRecords
from thrave.concurrency import start_thread
from thrave.config import Settings
from thrave.tasks.errors import TaskFailure
from thrave.tasks.models import BundleRequest, HostState

INSTANCE = "i-0123456789abcdef0"


class IdleWorker:
    """A worker without a task queue."""

    def drain(self, _seconds):
        pass


@pytest.fixture
def components(tmp_path):
    components = open_components(Settings(data_dir=tmp_path / "data", host_id="host-a", drain_timeout=0.1))
    yield components
    components.queues.close()
    components.database.dispose()


@pytest.fixture
def lease(components):
    lease = components.hosts.acquire_lease("host-a", worker_concurrency=1)
    components.hosts.drain("host-a")
    return lease


@pytest.fixture
def agent(components):
    agent = Agent(components)
    agent._worker = IdleWorker()
    return agent


def state_after_drain(components, agent, lease):
    def has_ended():
        agent._heartbeat(lease)
        return agent._has_ended.is_set()

    eventually(has_ended, "the agent ends")
    (host,) = components.hosts.list()
    return host.state


@pytest.mark.parametrize("error", [OSError("database unavailable"), SystemExit(1)])
@pytest.mark.parametrize("moment", ["started_tasks", "record_drained"])
def test_failed_drain_is_repeated_at_later_heartbeat(components, agent, lease, monkeypatch, moment, error):
    failures, works = [error, error], getattr(components.hosts, moment)

    def fail_at_first(*args):
        if failures:
            raise failures.pop()
        return works(*args)

    monkeypatch.setattr(components.hosts, moment, fail_at_first)
    assert state_after_drain(components, agent, lease) is HostState.DRAINED
    assert failures == []


def test_drain_without_thread_is_repeated(components, agent, lease, monkeypatch):
    refused = []

    def refuse_at_first(*args, **options):
        if not refused:
            refused.append(True)
            raise RuntimeError("can't start new thread")
        return start_thread(*args, **options)

    monkeypatch.setattr("thrave.agent.start_thread", refuse_at_first)
    assert state_after_drain(components, agent, lease) is HostState.DRAINED


@pytest.fixture
def records(components):
    """The repository of tasks on the draining host."""
    records = components.records()
    add_task(components, "bun-1")
    records.start_run("bun-1")
    return records


def add_task(components, bundle_id):
    request = BundleRequest(
        account_id="1" * 12, owner_id="1" * 12, instance_id=INSTANCE, bucket=bundle_id, prefix="prefix",
        access_key_id="AKIA", upload_policy="policy", upload_policy_signature="signature",
    )  # fmt: skip
    with components.database.begin() as connection:
        components.records().add(connection, bundle_id, "host-a", request)


def leave(components, records, kind):
    """End the task with unfinished work for its instance; return a function that finishes the work."""
    power = PowerRecords(components.database)
    if kind == "power_requests":
        power.add_request(INSTANCE, PowerAction.REBOOT)
    elif kind == "to_recover":
        records.schedule_power_recovery("bun-1", timedelta(hours=1))
    else:
        records.record_overlay("bun-1", Overlay(volume=VolumeFile(path=Path("/disk")), overlay=Path("/overlay")))
    records.fail("bun-1", TaskFailure("Server.InternalError", "whatever"))
    return {
        "power_requests": lambda: power.finish_request(power.get(INSTANCE)),
        "to_recover": lambda: records.schedule_power_recovery("bun-1", None),
        "to_merge": lambda: records.record_overlay("bun-1", None),
    }[kind]


@pytest.fixture
def clock(monkeypatch):
    """The agent's clock; instead of a wait it calls `clock.sleeping`."""
    clock = SimpleNamespace(now=0.0, sleeping=lambda: None)

    def sleep(seconds):
        clock.sleeping()
        clock.now += seconds

    monkeypatch.setattr("thrave.agent.monotonic", lambda: clock.now)
    monkeypatch.setattr("thrave.agent.sleep", sleep)
    return clock


KINDS = ["power_requests", "to_recover", "to_merge"]


def drain(agent, lease):
    """Drain, and return the logged unfinished work."""
    agent._update_state(HostState.DRAINING)
    with structlog.testing.capture_logs() as logged:
        agent._drain(lease)
    return [line for line in logged if line["log_level"] == "error"]


@pytest.mark.parametrize("kind", KINDS)
def test_drain_waits_for_power_recovery(components, agent, lease, records, clock, kind):
    waits, finish = [], leave(components, records, kind)

    def sleeping():
        waits.append(components.hosts.list()[0].state)
        if len(waits) == 3:
            finish()

    clock.sleeping = sleeping
    agent._drain_until = 100.0
    assert drain(agent, lease) == []
    assert waits == [HostState.DRAINING] * 3
    assert components.hosts.list()[0].state is HostState.DRAINED


@pytest.mark.parametrize("kind", KINDS)
def test_drain_logs_instances_that_are_not_recovered_in_time(components, agent, lease, records, clock, kind):
    leave(components, records, kind)
    (line,) = drain(agent, lease)
    assert {name: line[name] for name in KINDS} == {name: [INSTANCE] if name == kind else [] for name in KINDS}
    assert clock.now > 0
    assert components.hosts.list()[0].state is HostState.DRAINING
    assert agent.wait() == 0


@pytest.mark.parametrize("kind", ["to_recover", "to_merge"])
def test_drain_does_not_wait_for_instances_of_waiting_tasks(components, agent, lease, records, clock, kind):
    leave(components, records, kind)
    add_task(components, "bun-2")
    (line,) = drain(agent, lease)
    assert (line[kind], line["waiting"], line["tasks"]) == ([INSTANCE], [INSTANCE], {})
    assert clock.now == 0
    assert components.hosts.list()[0].state is HostState.DRAINING


def test_agent_with_unfinished_work_restarts_if_drain_was_cancelled(components, agent, lease, records, clock):
    clock.sleeping = lambda: components.hosts.activate("host-a")
    (line,) = drain(agent, lease)
    assert line["tasks"] == {"bun-1": INSTANCE}
    assert agent.wait() == START_AGAIN


@pytest.mark.usefixtures("records")
def test_drain_reports_unfinished_tasks_and_host_is_not_drained(components, agent, lease):
    with structlog.testing.capture_logs() as logged:
        assert state_after_drain(components, agent, lease) is HostState.DRAINING
    (line,) = [line for line in logged if line["log_level"] == "error"]
    assert line["tasks"] == {"bun-1": INSTANCE}


def test_agent_restarts_if_drain_was_cancelled(components, agent, lease, monkeypatch):
    started_tasks = components.hosts.started_tasks

    def activate_meanwhile(name):
        components.hosts.activate(name)
        return started_tasks(name)

    monkeypatch.setattr(components.hosts, "started_tasks", activate_meanwhile)
    assert state_after_drain(components, agent, lease) is HostState.ACTIVE
    assert agent.wait() == START_AGAIN
