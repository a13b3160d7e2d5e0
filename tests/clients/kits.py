"""How each client is had: from PyPI, from npm or from Debian; and the command that runs its driver.

What is fetched or built is kept in `.cache/clients`, in a folder named after exactly what is in it, so it is fetched
once. What cannot be had skips the tests of that client, or fails them in CI.
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
TIMEOUT = 280  # seconds; fetching or building any one of them takes less than half a minute


@dataclass(frozen=True)
class Command:
    """An argument vector, and what it needs in its environment."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class Kit(Protocol):
    """A client and its driver."""

    def prepare(self) -> Command:
        """Get the client, unless it is there; give the driver's command."""
        ...


@dataclass(frozen=True)
class PyPI:
    """A Python package of an exact version, in a virtual environment of its own.

    Attributes:
        newest_python: The newest Python that can import it, if it is not the newest of all.
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
        """Return a Python that can import the package; skip the test without one, in CI too: nothing is missing."""
        if self.newest_python is None or sys.version_info[:2] <= self.newest_python:
            return sys.executable
        major, newest = self.newest_python
        for program in (f"python{major}.{minor}" for minor in range(newest, 7, -1)):
            # A shim of pyenv is there also for a version that is not selected.
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
    """A Debian package for a program of Debian's; `holds` is a file of it."""

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
        # Not optimised: the packages are large, and compiling them takes longer than all that is done with them.
        run(go, "build", "-gcflags=all=-N -l", "-o", folder / "driver", DRIVERS / self.driver, environment=places)


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache; `make` fills it if it is not whole."""
    folder = CACHE / name.replace("/", "-").replace("==", "-")
    whole = folder / ".whole"
    if not whole.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        whole.touch()
    return folder


def run(*words: object, environment: Mapping[str, str] | None = None) -> None:
    """Run a program that fetches or builds a client."""
    command = [str(word) for word in words]
    environment = {**os.environ, **(environment or {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        unavailable(f"{' '.join(command)}: {done.stderr.strip()[-1000:]}")
