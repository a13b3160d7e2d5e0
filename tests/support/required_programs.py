"""What a test needs: without a program or library it is skipped, or fails in CI (`CI=true`); without root, skipped."""

import os
import shutil
from pathlib import Path

import pytest

from thrave.volumes import qemu_nbd
from thrave.volumes.errors import ToolNotInstalled

_ELSEWHERE = ("/usr/sbin", "/sbin", "/usr/local/sbin")


def require(program: str, *, package: str) -> str:
    """The path of a program; without it the test is skipped, or fails in CI, with the Debian package to install."""
    path = shutil.which(program) or shutil.which(program, path=os.pathsep.join(_ELSEWHERE))
    if path is None:
        missing(program, package=package)
    return path


def require_file(path: Path, *, package: str) -> Path:
    """A file of a Debian package; without it as `require`."""
    if not path.exists():
        missing(str(path), package=package)
    return path


def missing(component: str, *, package: str) -> None:
    """Skip the test for want of a Debian package's component; in CI (`CI=true`) fail it."""
    unavailable(f"{component} is not installed: scripts/system-packages {package}")


def unavailable(reason: str) -> None:
    """Skip the test for want of a component; in CI (`CI=true`) fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def require_root(task: str) -> None:
    """Skip the test for an ordinary user, also in CI: CI runs the tests as root, too."""
    if os.geteuid() != 0:
        pytest.skip(f"only root can {task}")


def require_libnbd() -> None:
    """Load libnbd's binding; without it as `require`."""
    try:
        qemu_nbd.load_binding()
    except ToolNotInstalled as error:
        missing(error.component, package=error.package)
