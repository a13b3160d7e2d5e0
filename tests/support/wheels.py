"""Builds wheels of this checkout, in a copy: setuptools would write into the checkout."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def copy_source(folder: Path) -> Path:
    """Copy what a wheel is built from into a new folder, and return the folder."""
    for name in ("src", "packaging"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("LICENSE", "MANIFEST.in", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(source: Path, wheels: Path) -> Path:
    """Build the wheel of a copy of the source, and return its path."""
    before = {*wheels.glob("*.whl")}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, source], check=True)
    (wheel,) = {*wheels.glob("*.whl")} - before
    return wheel
