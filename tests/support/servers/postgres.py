"""A real PostgreSQL: one server per session, one database per test.

Programs of the Debian package create a cluster in a temporary folder, on a free port of 127.0.0.1. The server refuses
to run as root, so root starts it as `nobody`.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import psycopg

from support.eventually import eventually
from support.required_programs import missing

PACKAGE = "postgresql"
_NOBODY = 65534
_START_TIMEOUT = 60.0  # seconds
_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "max_connections": "200",
    "log_min_messages": "fatal",
}


class Postgres:
    """A PostgreSQL server for tests."""

    def __init__(self, folder: Path, programs: Path, port: int) -> None:
        self._folder = folder
        self._programs = programs
        self._port = port
        self._process = None
        self._databases = 0

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        options = [f"--{name}={value}" for name, value in {**_OPTIONS, "port": str(self._port)}.items()]
        self._process = subprocess.Popen(
            [self._programs / "postgres", "-D", self._folder / "data", *options], **_as_nobody(), cwd=self._folder
        )

        def connect():
            assert self._process.poll() is None, "PostgreSQL ended"
            psycopg.connect(self._url("postgres"), connect_timeout=5).close()
            return True

        eventually(connect, "PostgreSQL accepts connections", ignore=psycopg.OperationalError, timeout=_START_TIMEOUT)

    def kill(self) -> None:
        """End all processes as a power failure would; `start` starts the server again."""
        self._process.send_signal(signal.SIGQUIT)  # "immediate shutdown": recovery at the next start
        self._process.wait()

    def new_database(self, options: str = "") -> str:
        """Create an empty database, with options of CREATE DATABASE, and return its URL."""
        self._databases += 1
        name = f"thrave_{self._databases}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} {options}")
        return self._url(name)

    def _url(self, database: str) -> str:
        return f"postgresql://thrave@127.0.0.1:{self._port}/{database}"


@contextmanager
def running_postgres():
    """Run a server until the end of the block."""
    programs = _programs()
    with tempfile.TemporaryDirectory(prefix="thrave-postgres-") as folder:
        if os.geteuid() == 0:
            shutil.chown(folder, _NOBODY, _NOBODY)
        initdb = [programs / "initdb", "-D", Path(folder) / "data", "-U", "thrave", "-A", "trust", "--no-sync"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, **_as_nobody(), cwd=folder)
        server = Postgres(Path(folder), programs, _free_port())
        server.start()
        try:
            yield server
        finally:
            server.kill()


def _programs() -> Path:
    """Where the package keeps the programs of its newest version; they are not on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[4]))
    if not found:
        missing("postgres", package=PACKAGE)
    return found[-1].parent


def _as_nobody() -> dict[str, object]:
    return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
