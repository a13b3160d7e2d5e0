"""A fleet on one machine: API and agent processes on one PostgreSQL.

Each process has a data directory with a copy of the vault's key and of the service's identity, as on separate machines.
The hosts share the buckets and, with `shared`, the folder of instances.
"""

import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.eventually import eventually
from support.service.forked_server import ForkedServer, fork_thrave, run_thrave
from thrave.components import open_components
from thrave.config import DataDirectory, Settings
from thrave.tasks.errors import HostInUse

TIMEOUT = 60  # seconds


@dataclass
class Fleet:
    """The processes of a fleet; tests create accounts and instances through the API process `first`."""

    root: Path
    settings: dict[str, str]
    shared: bool = True
    first: "Api" = None
    processes: list[subprocess.Popen] = field(default_factory=list)

    def api(self, name="api-1"):
        """Start an API process."""
        server = Api(self.data(name), self._environment)
        server.start()
        self.first = self.first or server
        self.processes.append(server.process)
        return server

    def agent(self, name, **settings):
        """Start the agent of a host; return its process once it runs tasks."""
        given = {f"THRAVE_{setting.upper()}": str(value) for setting, value in settings.items()}
        environment = {**os.environ, **self._environment, **given}
        process = fork_thrave(["agent", "--host-id", name, "--data-dir", self.data(name).root], environment)
        self.processes.append(process)
        assert process.stdout.readline() == f"working as {name}\n"
        return process

    def stop(self):
        """Kill every remaining process."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate(timeout=TIMEOUT)

    def thrave(self, *arguments, data=None):
        """Run a `thrave` command on the data directory of the first API process."""
        words = [*arguments, "--data-dir", data or self.first.data.root]
        return run_thrave(words, {**os.environ, **self._environment}, timeout=TIMEOUT)

    def adopt(self, lost, *, by):
        """Let a host adopt the tasks of another host, as soon as the other host counts as lost."""
        with self.components() as components:
            adopted = eventually(
                lambda: [components.hosts.adopt(lost, by=by)], f"{by} adopts the tasks of {lost}", ignore=HostInUse
            )
        return adopted[0]

    @contextmanager
    def components(self):
        """Open the components of the first API process in this process."""
        components = open_components(Settings(data_dir=self.first.data.root, **self.settings))
        try:
            yield components
        finally:
            components.queues.close()
            components.database.dispose()

    @property
    def _environment(self):
        shared = {"instance_dir": self.root / "instances"} if self.shared else {}
        return {f"THRAVE_{name.upper()}": str(value) for name, value in {**shared, **self.settings}.items()}

    def data(self, name):
        """Return a data directory with the files that every process needs; the first process creates them."""
        data = DataDirectory(self.root / name)
        if self.first and not data.root.exists():
            data.root.mkdir(mode=0o700)
            shutil.copy2(self.first.data.vault_key, data.vault_key)
            shutil.copytree(self.first.data.service, data.service)
            data.buckets.symlink_to(self.first.data.buckets, target_is_directory=True)
        return data


class Api(ForkedServer):
    """A process of `thrave api`."""

    command = "api"
