"""Installs each client from PyPI, npm or Debian, and returns the command that runs its driver.

Downloads and builds are kept in `.cache/clients`, in folders named after their content. If a client cannot be
installed, its tests are skipped, or fail in CI.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from support.required_programs import require, require_file, unavailable

CACHE = Path(__file__).parents[2] / ".cache" / "clients"
DRIVERS = Path(__file__).parent / "drivers"
TIMEOUT = 280  # seconds; downloading or building one client takes less than half a minute


@dataclass(frozen=True)
class Command:
    """An argument vector, and its environment variables."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class Kit(Protocol):
    """A client and its driver."""

    def prepare(self) -> Command:
        """Install the client if needed; return the driver's command."""
        ...


@dataclass(frozen=True)
class PyPI:
    """A Python package of an exact version, in its own virtual environment.

    Attributes:
        newest_python: The newest Python that can import the package; None: any.
    """

    requirement: str
    driver: str
    newest_python: tuple[int, int] | None = None

    def prepare(self) -> Command:
        interpreter = self._interpreter()
        python = cached(self.requirement, lambda folder: self._install(folder, interpreter)) / "bin" / "python"
        if self.driver.endswith(".py"):
            return Command((str(python), str(DRIVERS / self.driver)))
        return Command((str(DRIVERS / self.driver),), {"AWS_CLI": str(python.with_name("aws"))})

    def _install(self, folder: Path, interpreter: str) -> None:
        run(interpreter, "-m", "venv", "--without-pip", folder)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python")
        run(*pip, "install", "--quiet", "--no-compile", self.requirement)

    def _interpreter(self) -> str:
        """Return a Python that can import the package. Without one skip the test, also in CI: no package is missing."""
        if self.newest_python is None or sys.version_info[:2] <= self.newest_python:
            return sys.executable
        major, newest = self.newest_python
        for program in (f"python{major}.{minor}" for minor in range(newest, 7, -1)):
            # pyenv has a shim also for versions that are not selected.
            if shutil.which(program) and subprocess.run([program, "-c", ""], check=False).returncode == 0:
                return program
        pytest.skip(f"{self.requirement} needs Python {major}.{newest} or older, and none is here")


@dataclass(frozen=True)
class Npm:
    """An npm package of an exact version."""

    requirement: str
    driver: str

    def prepare(self) -> Command:
        node = require("node", package="nodejs")
        folder = cached(self.requirement, self._install)
        return Command((node, str(DRIVERS / self.driver)), {"NODE_PATH": str(folder / "node_modules")})

    def _install(self, folder: Path) -> None:
        npm = require("npm", package="npm")
        run(npm, "install", "--prefix", folder, "--no-package-lock", "--ignore-scripts", self.requirement)


@dataclass(frozen=True)
class Debian:
    """A Debian package; `holds` is one of its files."""

    package: str
    holds: str
    arguments: tuple[str, ...]
    driver: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def prepare(self) -> Command:
        require_file(Path(self.holds), package=self.package)
        return Command((*self.arguments, str(DRIVERS / self.driver)), self.environment)


@dataclass(frozen=True)
class DebianGo:
    """A Debian package of Go sources; the driver is built with it."""

    package: str
    holds: str
    driver: str

    def prepare(self) -> Command:
        require_file(Path(self.holds), package=self.package)
        source = (DRIVERS / self.driver).read_bytes()
        folder = cached(f"{self.driver}-{hashlib.sha256(source).hexdigest()[:12]}", self._build)
        return Command((str(folder / "driver"),))

    def _build(self, folder: Path) -> None:
        go = require("go", package="golang-go")
        places = {"GOPATH": "/usr/share/gocode", "GOCACHE": str(CACHE / "go-build"), "GO111MODULE": "off"}
        # Without optimisation: compiling these large packages takes longer than the tests.
        run(go, "build", "-gcflags=all=-N -l", "-o", folder / "driver", DRIVERS / self.driver, environment=places)


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache; call `make` to fill it if it is incomplete."""
    folder = CACHE / name.replace("/", "-").replace("==", "-")
    whole = folder / ".whole"
    if not whole.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        whole.touch()
    return folder


def run(*words: object, environment: Mapping[str, str] | None = None) -> None:
    """Run a program that downloads or builds a client."""
    command = [str(word) for word in words]
    environment = {**os.environ, **(environment or {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        unavailable(f"{' '.join(command)}: {done.stderr.strip()[-1000:]}")
