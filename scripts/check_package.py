"""Builds wheel and sdist, checks them, and runs `thrave demo` from the wheel with every Python of the machine.

    python scripts/check_package.py [--python VERSION] [FOLDER]

Every Python from 3.11 on the PATH or below pyenv's `versions` gets a new virtual environment with the wheel, without
access to the checkout. Then some tests are run in the unpacked sdist, with the wheel, which was built from it. Prints
one line for each; fails if one fails, or if no Python is found. If all is well, the two files are moved to FOLDER.
With `--python 3.11` only that Python is tried.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 11)
CONSTRAINTS = ROOT / "constraints.txt"

# Tests of the sdist that need no other program, and read files of every folder.
SDIST_TESTS = (
    "tests/bundle/test_vectors.py", "tests/docs/test_architecture.py", "tests/docs/test_links.py",
    "tests/packaging/test_host_files_installer.py", "tests/packaging/test_installation.py",
    "tests/packaging/test_metadata.py", "tests/packaging/test_workflows.py", "tests/test_check_words.py",
    "tests/test_config.py",
)  # fmt: skip
SDIST_TEST_TOOLS = ("hypothesis", "psutil", "pytest", "pytest-timeout", "pyyaml")


def main() -> int:
    """Build, check and run the package; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", metavar="VERSION", help="try only this Python, such as 3.11")
    parser.add_argument("target", nargs="?", type=Path, metavar="FOLDER", help="move wheel and sdist to this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="thrave-package-") as name:
        folder = Path(name)
        wheel = build(folder)
        pythons = find_pythons()
        if arguments.python:
            pythons = {version: python for version, python in pythons.items() if version == arguments.python}
        if not pythons:
            print(f"Python {arguments.python or '3.11 or newer'} was not found", file=sys.stderr)
            return 1
        failed = [version for version, python in pythons.items() if not demo(folder, wheel, version, python)]
        if failed or not check_sdist(folder, interpreter(folder / next(iter(pythons)))):
            return 1
        if arguments.target:
            arguments.target.mkdir(parents=True, exist_ok=True)
            for file in (folder / "dist").iterdir():
                shutil.move(file, arguments.target / file.name)
    return 0


def build(folder: Path) -> Path:
    """Build both distributions, check their metadata as an index does, and return the wheel."""
    python = environment(folder / "tools", Path(sys.executable), "build", "twine")
    run(python, "-m", "build", "--outdir", folder / "dist", ROOT)
    run(python, "-m", "twine", "check", "--strict", *sorted((folder / "dist").iterdir()))
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def find_pythons() -> dict[str, Path]:
    """Return a program for each minor version of Python that is installed and works; keys are such as `3.11`."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders = [Path(folder) for folder in os.get_exec_path()] + sorted((pyenv / "versions").glob("*/bin"))
    found: dict[tuple[int, int], Path] = {}
    for folder in folders:
        for program in sorted(folder.glob("python3.*")):
            match = re.fullmatch(r"python(3)\.(\d+)", program.name)
            version = (3, int(match[2])) if match else (0, 0)
            if version >= OLDEST and version not in found and runs(program):
                found[version] = program
    return {f"{major}.{minor}": found[major, minor] for major, minor in sorted(found)}


def runs(program: Path) -> bool:
    """Whether a program is a Python that works; pyenv also has shims for versions that are not selected."""
    try:
        return subprocess.run([program, "-c", "import venv"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def demo(folder: Path, wheel: Path, version: str, python: Path) -> bool:
    """Run `thrave demo` from the wheel with a Python; print the result and return whether it worked."""
    try:
        installed = environment(folder / version, python, f"{wheel}[demo]")
        sqlite = run(installed, "-c", "import sqlite3; print(sqlite3.sqlite_version)").strip()
        run(installed.with_name("thrave"), "demo", "--size", "64MiB", "--data-dir", folder / version / "demo")
    except subprocess.CalledProcessError as error:
        print(f"Python {version} ({python}): failed\n{error.output}", flush=True)
        return False
    print(f"Python {version} ({python}), SQLite {sqlite}: thrave demo works from the wheel", flush=True)
    return True


def check_sdist(folder: Path, python: Path) -> bool:
    """Run tests in the unpacked sdist with an installed wheel; print the result and return whether they pass."""
    (archive,) = (folder / "dist").glob("*.tar.gz")
    (folder / "sdist").mkdir()
    run("tar", "-xzf", archive, "-C", folder / "sdist")
    (unpacked,) = (folder / "sdist").iterdir()
    try:
        install(python, *SDIST_TEST_TOOLS)
        result = run(python, "-m", "pytest", "-q", *SDIST_TESTS, folder=unpacked)
    except subprocess.CalledProcessError as error:
        print(f"tests of the sdist: failed\n{error.output}", flush=True)
        return False
    print(f"tests of the sdist: {result.strip().splitlines()[-1]}", flush=True)
    return True


def environment(folder: Path, python: Path, *requirements: str) -> Path:
    """Create a virtual environment with these packages; return its Python."""
    run(python, "-m", "venv", *([] if has_pip(python) else ["--without-pip"]), folder)
    install(interpreter(folder), *requirements)
    return interpreter(folder)


def interpreter(folder: Path) -> Path:
    """Return the Python of a virtual environment."""
    return folder / "bin" / "python"


def has_pip(python: Path) -> bool:
    """Whether a Python can create environments with pip. Debian's needs the package python3-venv."""
    return subprocess.run([python, "-c", "import ensurepip"], capture_output=True, check=False).returncode == 0


def install(python: Path, *requirements: str) -> None:
    """Install packages into the virtual environment of a Python."""
    # Its own pip if it has one, since ours may not support it (pip 23.0 and Python 3.12).
    own = (python.parent / "pip").exists()
    pip = [python, "-m", "pip"] if own else [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "--disable-pip-version-check", "install", "--quiet", "--constraint", CONSTRAINTS, *requirements)


def run(*command: object, folder: Path = Path("/")) -> str:
    """Run a program in a folder, without the checkout in its environment, and return its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "THRAVE_", "AWS_"))}
    words = [str(word) for word in command]
    result = subprocess.run(
        words, cwd=folder, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode:
        raise subprocess.CalledProcessError(result.returncode, words, output=f"{' '.join(words)}\n{result.stdout}")
    return result.stdout


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.output}")
