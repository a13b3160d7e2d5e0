"""scripts/make-venv and scripts/system-packages, which `make` runs before anything is installed."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SYSTEM_PACKAGES = ROOT / "scripts/system-packages"
MAKE_VENV = ROOT / "scripts/make-venv"


@pytest.fixture
def programs(tmp_path):
    """Programs to find first: an ordinary user whose sudo asks for a password, and no package installed."""
    folder = tmp_path / "programs"
    folder.mkdir()

    def program(name, *lines):
        path = folder / name
        path.write_text("\n".join(["#!/bin/sh", f'echo "{name} $*" >>{tmp_path}/calls', *lines, ""]))
        path.chmod(0o755)

    program("id", "echo 1000")
    program("dpkg-query", "exit 1")
    program("apt-get")
    program(
        "sudo", f'[ "$1" != -n ] || [ -e {tmp_path}/trusted ] || exit 1', '[ "$1" = -v ] || [ "$1" = -n ] || exec "$@"'
    )
    program.calls = (tmp_path / "calls").read_text
    return program


def environment(tmp_path, **more):
    without_ci = {name: value for name, value in os.environ.items() if name != "CI"}
    return {**without_ci, "PATH": f"{tmp_path}/programs:{os.environ['PATH']}", **more}


def test_system_packages_without_root_prints_the_command(programs, tmp_path):
    run = subprocess.run(
        [SYSTEM_PACKAGES, "one", "two"], env=environment(tmp_path), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "sudo apt-get install one two" in run.stderr
    assert "apt-get " not in programs.calls()


def test_system_packages_without_root_fails_in_ci(programs, tmp_path):
    run = subprocess.run(
        [SYSTEM_PACKAGES, "one"], env=environment(tmp_path, CI="true"), stdin=subprocess.DEVNULL,
        capture_output=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1


def test_system_packages_uses_sudo_without_password(programs, tmp_path):
    (tmp_path / "trusted").touch()
    subprocess.run([SYSTEM_PACKAGES, "one"], env=environment(tmp_path), stdin=subprocess.DEVNULL, check=True)
    assert re.search(r"^apt-get .*install .*one", programs.calls(), re.MULTILINE)


def test_system_packages_lets_sudo_ask_for_a_password_on_a_terminal(programs, tmp_path):
    ours, theirs = pty.openpty()
    try:
        subprocess.run([SYSTEM_PACKAGES, "one"], env=environment(tmp_path), stdin=theirs, check=True)
    finally:
        os.close(ours)
        os.close(theirs)
    calls = programs.calls()
    assert calls.index("sudo -v") < calls.index("apt-get ")


def test_make_venv_replaces_an_environment_without_pip(tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "old").touch()
    subprocess.run([MAKE_VENV, sys.executable, venv], check=True)
    subprocess.run([venv / "bin/python", "-m", "pip", "--version"], check=True)
    (venv / "kept").touch()
    subprocess.run([MAKE_VENV, sys.executable, venv], check=True)
    assert (venv / "kept").exists()
    assert not (venv / "old").exists()


def test_make_venv_without_python_names_the_packages(tmp_path):
    run = subprocess.run([MAKE_VENV, "python3.999", tmp_path / "venv"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "python3.999 is not installed. On Debian: sudo apt-get install python3 python3-venv" in run.stderr


def test_make_venv_rejects_a_python_that_is_too_old(programs, tmp_path):
    programs("python3.9", '[ "$1" = --version ] && echo Python 3.9.2', '[ "$1" = --version ]')
    run = subprocess.run(
        [MAKE_VENV, "python3.9", tmp_path / "venv"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "Python 3.9.2 is too old: Thrave needs Python 3.11 or newer" in run.stderr


def test_make_venv_creates_nothing_and_names_the_package_without_ensurepip(programs, tmp_path):
    programs("python3.99", '[ "$2" != "import ensurepip, venv" ]')
    run = subprocess.run(
        [MAKE_VENV, "python3.99", tmp_path / "venv"], env=environment(tmp_path), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert "sudo apt-get install python3.99-venv" in run.stderr
    assert not (tmp_path / "venv").exists()
