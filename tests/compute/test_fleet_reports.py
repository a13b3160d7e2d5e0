"""Which host of a fleet reports an instance, if hosts share the folder of instances."""

from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from thrave.compute import fleet
from thrave.compute.description_files import InstanceDescription
from thrave.compute.directory_driver import DirectoryDriver
from thrave.compute.errors import HypervisorUnavailable
from thrave.compute.fleet import InstanceReporter
from thrave.compute.instance import InstanceState, VolumeFile
from thrave.database import instance as instance_table

FIRST, SECOND = "i-00000000000000001", "i-00000000000000002"


@pytest.fixture
def instances(tmp_path):
    return DirectoryDriver(tmp_path / "instances")


@pytest.fixture
def add(instances, tmp_path):
    """Return a function that adds an instance."""
    disk = tmp_path / "disk.raw"
    disk.touch()

    def add(instance_id, **details):
        volume = VolumeFile(path=disk)
        given = {"instance_id": instance_id, "account_id": "1" * 12, "platform": "windows", "root_volume": volume}
        instances.add(InstanceDescription(**given, **details))

    return add


@pytest.fixture
def agent(components, instances):
    """Return a function that acquires the lease of a host and returns its reporter."""

    def agent(name, among=instances):
        lease = components.hosts.acquire_lease(name, worker_concurrency=1)
        return InstanceReporter(components.database, among, name, lease.is_held)

    return agent


@pytest.fixture
def owners(components):
    """Return a function that returns the hosts of the instances in the database."""

    def owners():
        with components.database.connect() as connection:
            query = sa.select(instance_table.c.instance_id, instance_table.c.host)
            return {row.instance_id: row.host for row in connection.execute(query)}

    return owners


class InterruptedDriver:
    """A driver that calls a function after each `list`, before the instances are reported."""

    def __init__(self, inner, interrupt):
        self._inner = inner
        self._interrupt = interrupt

    def list(self, *args, **options):
        listed = self._inner.list(*args, **options)
        self._interrupt()
        return listed

    def get(self, instance_id):
        return self._inner.get(instance_id)


class UnavailableDriver:
    """A driver without connection: it lists no instance, and `get` fails."""

    def list(self, *_args, **_options):
        return []

    def get(self, instance_id):
        raise HypervisorUnavailable(instance_id, "libvirt does not answer")


def test_instance_is_reported_by_its_named_host(agent, add, owners, tmp_path):
    was_run = tmp_path / "was-run"
    state = ("sh", "-c", f"echo >> {was_run}; echo running")
    a, b = agent("host-a"), agent("host-b")
    add(FIRST, host="host-b", state_command=state)
    a.report()
    assert not was_run.exists()  # no command of another host's instance is run
    assert owners() == {}
    b.report()
    a.report()
    assert owners() == {FIRST: "host-b"}


def test_instance_without_host_belongs_to_first_reporter(agent, add, owners, instances, monkeypatch):
    warned = []
    monkeypatch.setattr(fleet, "log", SimpleNamespace(warning=lambda _event, **fields: warned.append(fields)))
    b = agent("host-b")
    a = agent("host-a", among=InterruptedDriver(instances, b.report))
    add(FIRST)
    add(SECOND, host="host-a")
    for _ in range(3):
        a.report()
    assert owners() == {FIRST: "host-b", SECOND: "host-a"}  # the conflict did not stop the report
    assert warned == [{"instance_id": FIRST, "host": "host-a", "other": "host-b"}]


@pytest.mark.parametrize("change", ["removed", "stopped"])
def test_report_after_adoption_changes_no_row_of_adopter(components, agent, add, owners, instances, change):
    add(FIRST, host="host-a")
    add(SECOND, host="host-a")
    b = agent("host-b")

    def adopt():
        components.hosts.adopt("host-a", by="host-b", powered_off=True)
        b.report()

    agent("host-a").report()
    lease = components.hosts.acquire_lease("host-a", worker_concurrency=1)
    late = InstanceReporter(components.database, InterruptedDriver(instances, adopt), "host-a")  # no lease check
    lease = InstanceReporter(components.database, instances, "host-a", lease.is_held)
    if change == "removed":
        instances.remove(FIRST)
    else:
        instances.force_stop(FIRST)
    late.report()
    lease.report()
    expected = {SECOND: "host-b"} if change == "removed" else {FIRST: "host-b", SECOND: "host-b"}
    assert owners() == expected


def test_adopted_instance_is_reported_by_new_host(components, agent, add, owners, instances):
    add(FIRST, host="host-a")
    agent("host-a").report()
    b = agent("host-b")
    components.hosts.adopt("host-a", by="host-b", powered_off=True)
    returned = agent("host-a")
    instances.force_stop(FIRST)
    for reports in (returned, b, returned):
        reports.report()
    assert owners() == {FIRST: "host-b"}
    with components.database.connect() as connection:
        assert connection.execute(sa.select(instance_table.c.state)).scalar() == InstanceState.STOPPED


def test_unreadable_instance_keeps_its_row(components, agent, add, owners, instances, tmp_path):
    add(FIRST, host="host-a")
    add(SECOND, host="host-a")
    agent("host-a").report()
    lease = components.hosts.acquire_lease("host-b", worker_concurrency=1)
    components.hosts.adopt("host-a", by="host-b", powered_off=True)

    def report(among=instances):
        InstanceReporter(components.database, among, "host-b", lease.is_held).report()

    def rows():
        with components.database.connect() as connection:
            return connection.execute(sa.select(instance_table).order_by(instance_table.c.instance_id)).all()

    report()
    before = rows()
    report(among=UnavailableDriver())
    file = tmp_path / "instances" / f"{FIRST}.json"
    content = file.read_bytes()
    file.write_text("{")
    report()
    report(among=InterruptedDriver(instances, lambda: file.write_bytes(content)))  # readable again after it was skipped
    file.unlink()
    file.mkdir()  # not even root can read it
    report()
    assert rows() == before

    file.rmdir()
    file.write_bytes(content)
    agent("host-a").report()
    report()
    assert owners() == {FIRST: "host-b", SECOND: "host-b"}
    file.unlink()
    report()
    assert owners() == {SECOND: "host-b"}
