"""A host that drains: whatever fails, its agent ends, and unfinished tasks are reported."""

import pytest
import structlog

from support.eventually import eventually
from thrave.agent import START_AGAIN, Agent
from thrave.concurrency import supervised
from thrave.config import Settings
from thrave.ground import open_ground
from thrave.tasks.host_states import HostState
from thrave.tasks.task import BundleRequest


class IdleWorker:
    """A worker without an engine."""

    def drain(self, _seconds):
        pass


@pytest.fixture
def ground(tmp_path):
    ground = open_ground(Settings(data=tmp_path / "data", host_name="host-a", drain_timeout=0.1))
    yield ground
    ground.queues.close()
    ground.database.dispose()


@pytest.fixture
def fence(ground):
    fence = ground.hosts.take("host-a", tasks_at_once=1)
    ground.hosts.drain("host-a")
    return fence


@pytest.fixture
def agent(ground):
    agent = Agent(ground)
    agent._worker = IdleWorker()
    return agent


def state_after_drain(ground, agent, fence):
    def is_over():
        agent._heartbeat(fence)
        return agent._over.is_set()

    eventually(is_over, "the agent ends")
    (host,) = ground.hosts.list()
    return host.state


@pytest.mark.parametrize("error", [OSError("the database is away"), SystemExit(1)])
@pytest.mark.parametrize("moment", ["begun", "drained"])
def test_a_drain_that_fails_is_begun_again_at_a_later_heartbeat(ground, agent, fence, monkeypatch, moment, error):
    failures, works = [error, error], getattr(ground.hosts, moment)

    def fail_at_first(*args):
        if failures:
            raise failures.pop()
        return works(*args)

    monkeypatch.setattr(ground.hosts, moment, fail_at_first)
    assert state_after_drain(ground, agent, fence) is HostState.DRAINED
    assert failures == []


def test_a_drain_for_which_no_thread_can_be_started_is_begun_again(ground, agent, fence, monkeypatch):
    refused = []

    def refuse_at_first(*args, **options):
        if not refused:
            refused.append(True)
            raise RuntimeError("can't start new thread")
        return supervised(*args, **options)

    monkeypatch.setattr("thrave.agent.supervised", refuse_at_first)
    assert state_after_drain(ground, agent, fence) is HostState.DRAINED


def test_tasks_that_are_unfinished_after_drain_timeout_are_reported_and_the_host_is_not_drained(ground, agent, fence):
    request = BundleRequest(
        account_id="1" * 12, owner_id="1" * 12, instance_id="i-00000001", bucket="bucket", prefix="prefix",
        access_key_id="AKIA", upload_policy="policy", upload_policy_signature="signature",
    )  # fmt: skip
    with ground.database.begin() as connection:
        ground.records().add(connection, "bun-1", "host-a", request)
    ground.records().take_up("bun-1")
    with structlog.testing.capture_logs() as logged:
        assert state_after_drain(ground, agent, fence) is HostState.DRAINING
    (line,) = [line for line in logged if line["log_level"] == "error"]
    assert line["tasks"] == {"bun-1": "i-00000001"}


def test_agent_ends_to_be_started_anew_if_the_drain_was_ended_meanwhile(ground, agent, fence, monkeypatch):
    begun = ground.hosts.begun

    def activate_meanwhile(name):
        ground.hosts.activate(name)
        return begun(name)

    monkeypatch.setattr(ground.hosts, "begun", activate_meanwhile)
    assert state_after_drain(ground, agent, fence) is HostState.ACTIVE
    assert agent.wait() == START_AGAIN
