"""A fleet on one machine: API and agent processes on one PostgreSQL.

Each has a data directory of its own with a copy of the vault's key and the service's identity, as on machines of its
own. The hosts share the buckets and, if wanted, the folder of instances: storage that all of them reach.
"""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.eventually import eventually
from support.service.forked_server import ForkedServer, fork_thrave
from thrave.components import open_components
from thrave.config import DataDirectory, Settings
from thrave.tasks.errors import HostInUse

TIMEOUT = 60  # seconds


@dataclass
class Fleet:
    """The processes of a fleet; `first` is an API process that accounts and instances are made through."""

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
        """Start the agent of a host; give its process once it works."""
        given = {f"THRAVE_{setting.upper()}": str(value) for setting, value in settings.items()}
        environment = {**os.environ, **self._environment, **given}
        process = fork_thrave(["agent", "--host-id", name, "--data-dir", self.data(name).root], environment)
        self.processes.append(process)
        assert process.stdout.readline() == f"working as {name}\n"
        return process

    def stop(self):
        """End every process that is left."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate(timeout=TIMEOUT)

    def thrave(self, *arguments, data=None):
        """Run a command of an operator's on the machine of the first API process."""
        return subprocess.run(
            [sys.executable, "-m", "thrave", *arguments, "--data-dir", data or self.first.data.root],
            check=False, env={**os.environ, **self._environment}, capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip

    def adopt(self, lost, *, by):
        """Let a host adopt the tasks of another host, as soon as the other host counts as lost."""
        with self.ground() as ground:
            adopted = eventually(
                lambda: [ground.hosts.adopt(lost, by=by)], f"{by} adopts the tasks of {lost}", ignore=HostInUse
            )
        return adopted[0]

    @contextmanager
    def ground(self):
        """The rooms of the first API process, in this process."""
        ground = open_components(Settings(data_dir=self.first.data.root, **self.settings))
        try:
            yield ground
        finally:
            ground.queues.close()
            ground.database.dispose()

    @property
    def _environment(self):
        shared = {"instance_dir": self.root / "instances"} if self.shared else {}
        return {f"THRAVE_{name.upper()}": str(value) for name, value in {**shared, **self.settings}.items()}

    def data(self, name):
        """A data directory with what every process must have; the first process makes it."""
        data = DataDirectory(self.root / name)
        if self.first and not data.root.exists():
            data.root.mkdir(mode=0o700)
            shutil.copy2(self.first.data.vault_key, data.vault_key)
            shutil.copytree(self.first.data.service, data.service)
            data.buckets.symlink_to(self.first.data.buckets, target_is_directory=True)
        return data


class Api(ForkedServer):
    """`thrave api` in a process of its own."""

    command = "api"
