"""An API process whose PostgreSQL is stopped, frozen or out of connections returns `Unavailable`, and soon."""

import os
import signal
from contextlib import contextmanager, suppress

import psutil
import psycopg
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from support.eventually import eventually
from support.servers.postgres import running_postgres
from support.service.fleet import Fleet

pytestmark = pytest.mark.postgres
QUIET = Config(retries={"total_max_attempts": 1}, read_timeout=120)  # seconds; the service gives up first
CALLS = ("describe_bundle_tasks", "describe_instances")
LINES = ("request failed", "no answer from the database")
MAX_LOG = 8192  # bytes
WAIT = 60  # seconds


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL for this module only, since it is stopped and frozen."""
    with running_postgres() as server:
        yield server


@contextmanager
def stderr_in(path):
    """Redirect stderr of processes that the block starts to a file."""
    before = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@pytest.fixture
def fleet(server, tmp_path):
    url = server.new_database()
    name = url.rpartition("/")[2]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN")
        connection.execute(f"ALTER DATABASE {name} OWNER TO {name}")
        connection.execute(f"GRANT ALL ON SCHEMA public TO {name}")
    fleet = Fleet(tmp_path, {"database_url": url.replace("thrave@", f"{name}@")})
    fleet.role, fleet.superuser_url = name, url
    fleet.log = tmp_path / "log"
    with stderr_in(fleet.log):
        fleet.api()
    yield fleet
    fleet.stop()


def code_of(call):
    with pytest.raises(ClientError) as refused:
        call()
    return refused.value.response["Error"]["Code"]


def await_response(client):
    eventually(client.describe_bundle_tasks, "DescribeBundleTasks succeeds", ignore=ClientError, timeout=WAIT)


def has_line(logged):
    return any(line in logged for line in LINES)


def check_unavailable(fleet, client, times):
    for _ in range(times):
        for call in CALLS:
            assert code_of(getattr(client, call)) == "Unavailable"
    # Another thread writes the log.
    logged = eventually(fleet.log.read_text, f"the log has one of {LINES}", until=has_line)
    assert "Traceback" not in logged
    assert len(logged) < MAX_LOG


def test_stopped_database_makes_api_unavailable(fleet, server):
    client = fleet.first.client(fleet.first.account("alice")[1], config=QUIET)
    await_response(client)
    server.kill()
    try:
        check_unavailable(fleet, client, 20)
    finally:
        server.start()
    await_response(client)


def test_database_without_free_connection_makes_api_unavailable(fleet):
    client = fleet.first.client(fleet.first.account("alice")[1], config=QUIET)
    await_response(client)
    with psycopg.connect(fleet.superuser_url, autocommit=True) as connection:
        connection.execute(f"ALTER ROLE {fleet.role} CONNECTION LIMIT 0")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [fleet.role])
        check_unavailable(fleet, client, 20)
        connection.execute(f"ALTER ROLE {fleet.role} CONNECTION LIMIT -1")
    await_response(client)


def test_hanging_database_makes_api_unavailable(fleet, server):
    """As behind a firewall that drops packets: connections stay open without responses."""
    client = fleet.first.client(fleet.first.account("alice")[1], config=QUIET)
    await_response(client)
    frozen = [psutil.Process(server._process.pid)]
    frozen += frozen[0].children(recursive=True)
    for process in frozen:
        process.send_signal(signal.SIGSTOP)
    try:
        check_unavailable(fleet, client, 1)
    finally:
        for process in frozen:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
    await_response(client)
