"""What tests of several rooms share: stores, a PostgreSQL, a libvirtd, each started once; and databases."""

import signal
from pathlib import Path

import pytest

from support.libvirt.guest import guest_image
from support.libvirt.libvirt_host import running_host
from support.servers import stores
from support.servers.postgres import running_postgres
from support.service.forked_server import ForkedServer

# A run under nohup or in the background ignores these signals, and so would every program that the tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


# Those that take longest, the longest first. pytest-xdist gives each file to one worker.
LONG_FILES = (
    "docs/test_howtos.py", "tasks/test_kill_sweep.py", "cli/test_signals.py", "fleet/test_fleet.py",
    "tasks/test_bundling.py", "clients/test_clients.py", "test_listening.py", "bundle/test_costs.py", "test_ground.py",
    "tasks/test_storing.py", "cli/test_bundle_signals.py", "cli/test_bundle_places.py",
    "buckets/test_service_on_stores.py", "test_costs.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Run the files with long tests first, so that no worker is left alone with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("libvirt")}
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: (places.get(item.path, len(places)), item.path not in slow))


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory):
    with stores.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as store:
        yield store


@pytest.fixture(scope="session")
def rgw(tmp_path_factory):
    with stores.ceph_rgw(tmp_path_factory.mktemp("rgw")) as store:
        yield store


@pytest.fixture(scope="session")
def postgres():
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def libvirtd():
    """One for each module: what is undefined while it runs, libvirt may have again after its next start."""
    with running_host() as host:
        yield host


@pytest.fixture(scope="session")
def guest():
    """What guests are made of."""
    return guest_image()


@pytest.fixture
def thrave_server(tmp_path):
    """As the fixture for other people's tests, which tests/packaging uses, but started in a tenth of the time."""
    with ForkedServer.running(tmp_path / "thrave") as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request):
    """The settings that choose the database: an empty one of each kind."""
    if request.param == "sqlite":
        return {}
    return {"database_url": request.getfixturevalue("postgres").new_database()}
