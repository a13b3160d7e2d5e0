"""The host registry: transitions of states, the database's clock, adoption."""

from datetime import timedelta

import pytest

import thrave.database
from thrave.components import open_components
from thrave.concurrency import utc_now
from thrave.config import Settings
from thrave.database import host as host_table
from thrave.tasks.errors import AdopterError, HostInUse, HostStateError
from thrave.tasks.hosts import HostRegistry
from thrave.tasks.models import HOST_TRANSITIONS, BundleRequest, HostEvent, HostState
from thrave.tasks.repository import TaskRepository


@pytest.fixture
def hosts(components):
    for name in ("host-a", "host-b"):
        components.hosts.acquire_lease(name, worker_concurrency=1)
    return components.hosts


@pytest.fixture
def change(components):
    """Return a function that changes the row of a host directly."""

    def change(name, **values):
        with components.database.begin() as connection:
            connection.execute(host_table.update().where(host_table.c.host == name).values(**values))

    return change


def add_task(components, bundle_id, host="host-a"):
    request = BundleRequest(
        account_id="1" * 12, owner_id="1" * 12, instance_id=f"i-{bundle_id}", bucket="bucket", prefix=bundle_id,
        access_key_id="AKIA", upload_policy="policy", upload_policy_signature="signature",
    )  # fmt: skip
    with components.database.begin() as connection:
        components.records().add(connection, bundle_id, host, request)


def find(hosts, name):
    return next(one for one in hosts.list() if one.host == name)


def an_hour_ago():
    return utc_now() - timedelta(hours=1)


@pytest.mark.parametrize("before", HostState)
def test_host_states_change_as_in_the_table(hosts, change, before):
    acts = {
        HostEvent.AGENT_STARTS: lambda: hosts.acquire_lease("host-a", worker_concurrency=1),
        HostEvent.DRAIN: lambda: hosts.drain("host-a"),
        HostEvent.AGENT_HAS_DRAINED: lambda: hosts.record_drained(lease),
        HostEvent.ACTIVATE: lambda: hosts.activate("host-a"),
        HostEvent.FENCE: lambda: hosts.adopt("host-a", by="host-b", powered_off=True),
    }
    for event, act in acts.items():
        lease = hosts.acquire_lease("host-a", worker_concurrency=1)
        change("host-a", state=before)
        after = HOST_TRANSITIONS[event].get(before)
        if after is None and event in {HostEvent.DRAIN, HostEvent.ACTIVATE}:
            with pytest.raises(HostStateError, match=f"Host host-a is {before}: "):
                act()
        else:
            act()
        assert find(hosts, "host-a").state is (after or before), event


def test_agent_without_lease_cannot_record_drained(hosts):
    earlier = hosts.acquire_lease("host-a", worker_concurrency=1)
    hosts.acquire_lease("host-a", worker_concurrency=1)
    hosts.drain("host-a")
    assert not hosts.record_drained(earlier)
    assert find(hosts, "host-a").state is HostState.DRAINING


@pytest.mark.postgres
@pytest.mark.parametrize("hours", [-1, 1])
def test_task_times_are_those_of_the_database(postgres, tmp_path, monkeypatch, hours):
    components = open_components(Settings(data_dir=tmp_path / "data", database_url=postgres.new_database()))
    records = components.records()
    add_task(components, "bun-1")
    wrong = utc_now() + timedelta(hours=hours)
    monkeypatch.setattr(thrave.database, "utc_now", lambda: wrong)
    add_task(components, "bun-2")
    records.start_run("bun-1")
    records.schedule_power_recovery("bun-1", timedelta(minutes=1))
    assert records.cancel("bun-1")
    assert [task.bundle_id for task in records.of_account("1" * 12, kept=timedelta(minutes=30))] == ["bun-1", "bun-2"]
    first, second = records.of_account("1" * 12, kept=timedelta(minutes=30))
    times = [
        second.start_time,
        first.update_time,
        first.power_recovery_until,
        *(e.time for e in records.history("bun-1")),
    ]
    for time in times:
        assert abs(time - records.now()) < timedelta(minutes=30)
    assert records.delete_ended(timedelta(minutes=30), limit=10) == 0
    components.queues.close()
    components.database.dispose()


@pytest.mark.postgres
@pytest.mark.parametrize("hours", [-1, 1])
def test_clock_of_agent_machine_has_no_effect(postgres, tmp_path, monkeypatch, hours):
    components = open_components(Settings(data_dir=tmp_path / "data", database_url=postgres.new_database()))
    hosts = components.hosts
    with monkeypatch.context() as agent:
        agent.setattr(thrave.database, "utc_now", lambda: utc_now() + timedelta(hours=hours))
        lease = hosts.acquire_lease("host-a", worker_concurrency=1)
        hosts.heartbeat(lease)
    hosts.acquire_lease("host-b", worker_concurrency=1)
    seen = find(hosts, "host-a")
    assert not seen.is_lost
    assert timedelta(0) <= seen.silence < timedelta(minutes=30)
    with pytest.raises(HostInUse):
        hosts.adopt("host-a", by="host-b")
    components.queues.close()
    components.database.dispose()


def test_host_intervals_are_settings_of_its_agent(components, hosts, change):
    operators = HostRegistry(
        components.database, components.records(), components.queues, heartbeat_interval=0.1, heartbeat_timeout=0.4
    )
    change("host-a", heartbeat_time=utc_now() - timedelta(seconds=30))
    assert (find(operators, "host-a").heartbeat_timeout, find(operators, "host-a").is_lost) == (60.0, False)
    with pytest.raises(HostInUse, match=r"sent a heartbeat 3\d s ago"):
        operators.adopt("host-a", by="host-b")
    change("host-a", heartbeat_timeout=20.0)
    assert find(hosts, "host-a").is_lost
    hosts.adopt("host-a", by="host-b")


@pytest.mark.parametrize(
    ("by", "values", "says"),
    [
        ("host-a", {}, "cannot adopt its own tasks"),
        ("host-b", {"state": HostState.FENCED}, "is fenced. Only an active host"),
        ("host-b", {"state": HostState.DRAINING}, "is draining. Only an active host"),
        ("host-b", {"state": HostState.DRAINED}, "is drained. Only an active host"),
        ("host-b", {"heartbeat_time": an_hour_ago}, r"has sent no heartbeat for 36\d\d s"),
    ],
)
def test_adopt_rejects_host_without_agent(hosts, change, by, values, says):
    change(
        "host-b", **{name: value() if callable(value) else value for name, value in values.items()} or {"version": "1"}
    )
    lease = hosts.acquire_lease("host-a", worker_concurrency=1)
    with pytest.raises(AdopterError, match=says):
        hosts.adopt("host-a", by=by, powered_off=True)
    assert hosts.heartbeat(lease) is HostState.ACTIVE  # nothing has changed


def test_adopted_tasks_can_return_to_their_host(components, hosts):
    add_task(components, "bun-1")
    assert hosts.adopt("host-a", by="host-b", powered_off=True) == ["bun-1"]
    assert find(hosts, "host-a").adopted_by == "host-b"
    assert hosts.adopt("host-b", by="host-a", powered_off=True) == ["bun-1"]
    hosts.acquire_lease("host-a", worker_concurrency=1)
    assert find(hosts, "host-a").adopted_by is None


def test_requeue_lost_skips_waiting_tasks_of_draining_host(components, hosts, change):
    add_task(components, "bun-1")
    add_task(components, "bun-2")
    components.records().start_run("bun-1")
    hosts.drain("host-a")
    assert hosts.started_tasks("host-a") == ["bun-1"]
    hosts.requeue_lost("host-a")
    assert components.queues.scheduled("host-a") == {"bun-1"}
    hosts.activate("host-a")
    hosts.requeue_lost("host-a")
    assert components.queues.scheduled("host-a") == {"bun-1", "bun-2"}


def test_retire_is_atomic(components, hosts, monkeypatch):
    lease = hosts.acquire_lease("host-a", worker_concurrency=1)
    for bundle_id in ("bun-1", "bun-2"):
        add_task(components, bundle_id)
    fail, failed = TaskRepository.fail, []

    def second_is_cut_off(records, bundle_id, *args, **options):
        if failed:
            raise ConnectionError
        failed.append(bundle_id)
        return fail(records, bundle_id, *args, **options)

    with monkeypatch.context() as crash:
        crash.setattr(TaskRepository, "fail", second_is_cut_off)
        with pytest.raises(ConnectionError):
            hosts.retire("host-a", powered_off=True)
    assert hosts.heartbeat(lease) is HostState.ACTIVE
    assert [components.records().state(bundle_id) for bundle_id in ("bun-1", "bun-2")] == ["pending", "pending"]
    assert hosts.retire("host-a", powered_off=True) == ["bun-1", "bun-2"]
    assert [host.host for host in hosts.list()] == ["host-b"]
    assert components.records().get("bun-2").error_code == "Server.HostLost"
    assert not components.queues.scheduled("host-a")
