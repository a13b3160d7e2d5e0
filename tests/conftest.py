"""Fixtures for all tests: object stores, PostgreSQL and libvirtd, each started once, a service, and databases.

`tests/support/README.md` lists what else tests can use.
"""

import signal
import threading
from pathlib import Path

import hypothesis
import pytest
import sqlalchemy as sa

from support.eventually import eventually
from support.instances.command_machine import Machine
from support.libvirt.guest import guest_image
from support.libvirt.libvirt_host import running_host
from support.servers import stores
from support.servers.postgres import running_postgres
from support.service.forked_server import ForkedServer
from thrave import concurrency
from thrave.components import open_components
from thrave.config import Settings
from thrave.database import migrate, open_engine

# A run under nohup or in the background ignores these signals, and so would every program that the tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# On a busy machine any example may take long. What else holds depends on the environment (CI).
hypothesis.settings.register_profile(
    "thrave", hypothesis.settings.default, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("thrave")


# Files with the longest run time, longest first. pytest-xdist gives each file to one worker.
LONG_FILES = (
    "docs/test_howtos.py", "tasks/test_kill_sweep.py", "cli/test_server_signals.py", "fleet/test_fleet.py",
    "tasks/test_workflow.py", "clients/test_clients.py", "test_http_server.py", "bundle/test_padding_costs.py",
    "test_components.py", "tasks/test_uploads.py", "cli/test_bundle_signals.py", "cli/test_bundle_locations.py",
    "buckets/test_service_on_stores.py", "test_costs.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Run the files with long tests first, so that they do not keep one worker busy alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("libvirt")}
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG_FILES)}
    if missing := [str(path) for path in places if not path.exists()]:
        raise pytest.UsageError(f"LONG_FILES in tests/conftest.py names files that do not exist: {missing}")
    items.sort(key=lambda item: (places.get(item.path, len(places)), item.path not in slow))


# One for each process: it delivers the events of all libvirt connections.
ENDLESS_THREADS = {"libvirt events"}


def background_threads():
    """The running threads that were started in `thrave.concurrency`, and that end before the process does."""
    return {
        thread
        for thread in threading.enumerate()
        if getattr(getattr(thread, "_target", None), "func", None) is concurrency._run
        and thread.name not in ENDLESS_THREADS
    }


@pytest.fixture(scope="session", autouse=True)
def engines():
    """The engines of SQLAlchemy that were created and not disposed of, also by the product in this process."""
    engines, create = [], sa.create_engine

    def create_engine(*arguments, **options):
        engines.append(create(*arguments, **options))
        return engines[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sa, "create_engine", create_engine)
        yield engines
    for engine in engines:
        engine.dispose()


@pytest.fixture(autouse=True)
def no_database_connection_remains(engines):
    """Close the connections of the test: Python 3.13 warns of one that is collected as garbage, in a later test."""
    before = len(engines)
    yield
    for engine in engines[before:]:
        engine.dispose()
    del engines[before:]


@pytest.fixture(autouse=True)
def no_background_thread_remains(no_database_connection_remains):
    """Wait until the background threads of the test have ended: later they would write to the log of another test."""
    before = background_threads()
    yield
    eventually(
        lambda: background_threads() - before,
        "the background threads of the test end",
        until=lambda remaining: not remaining,
    )


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
    """One libvirt host per module: libvirt may show a domain that was undefined again after its next start."""
    with running_host() as host:
        yield host


@pytest.fixture(scope="session")
def guest():
    """Kernel, initial RAM disk and NTFS volume of the guest that domains boot."""
    return guest_image()


@pytest.fixture
def thrave_server(tmp_path):
    """Replaces the plugin's fixture of this name: a forked server starts in a tenth of the time."""
    with ForkedServer.running(tmp_path / "thrave") as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request):
    """Settings that select an empty database, one of each kind."""
    if request.param == "sqlite":
        return {}
    return {"database_url": request.getfixturevalue("postgres").new_database()}


@pytest.fixture
def alice(thrave_server):
    """An account of `thrave_server` and its access key."""
    return thrave_server.account("alice")


@pytest.fixture
def machine(tmp_path):
    """A machine that commands of an instance start and stop; its state is a file."""
    folder = tmp_path / "machine"
    folder.mkdir()
    return Machine(folder)


@pytest.fixture
def engine(tmp_path):
    """A SQLite database with the tables of this release."""
    engine = open_engine(f"sqlite:///{tmp_path / 'thrave.db'}")
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def components(database, tmp_path):
    """The components that processes share, opened on each kind of database."""
    components = open_components(Settings(data_dir=tmp_path / "data", **database))
    yield components
    components.queues.close()
    components.database.dispose()
