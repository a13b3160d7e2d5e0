"""Builds wheel and sdist, checks them, and runs `thrave demo` from the wheel with every Python of the machine.

    python scripts/check_package.py

Every Python from 3.11 on the PATH or below pyenv's `versions` gets a new virtual environment with the wheel, without
access to the checkout. Prints one line for each; fails if one fails, or if no Python is found.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 11)
CONSTRAINTS = ROOT / "constraints.txt"


def main() -> int:
    """Build, check and run the package; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="thrave-package-") as name:
        folder = Path(name)
        wheel = build(folder)
        pythons = find_pythons()
        if not pythons:
            print(f"no Python {'.'.join(map(str, OLDEST))} or newer found", file=sys.stderr)
            return 1
        failed = [version for version, python in pythons.items() if not demo(folder, wheel, version, python)]
    return 1 if failed else 0


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


def environment(folder: Path, python: Path, *requirements: str) -> Path:
    """Create a virtual environment with these packages; return its Python."""
    # Debian's Python needs python3-venv for a pip of its own: without it, our pip installs into the environment. Other
    # Pythons use their own, since an older pip may not support them (pip 23.0 and Python 3.12).
    has_pip = subprocess.run([python, "-c", "import ensurepip"], capture_output=True, check=False).returncode == 0
    run(python, "-m", "venv", *([] if has_pip else ["--without-pip"]), folder)
    inside = folder / "bin" / "python"
    pip = [inside, "-m", "pip"] if has_pip else [sys.executable, "-m", "pip", "--python", inside]
    run(*pip, "--disable-pip-version-check", "install", "--quiet", "--constraint", CONSTRAINTS, *requirements)
    return inside


def run(*command: object) -> str:
    """Run a program without the checkout in its environment, and return its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "THRAVE_", "AWS_"))}
    words = [str(word) for word in command]
    result = subprocess.run(
        words, cwd="/", env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode:
        raise subprocess.CalledProcessError(result.returncode, words, output=f"{' '.join(words)}\n{result.stdout}")
    return result.stdout


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.output}")
