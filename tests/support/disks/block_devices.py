"""Block devices made from files. They need root; without kernel support the test is skipped."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.required_programs import require


@contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    """Attach a file to a loop device."""
    losetup = require("losetup", package="mount")
    argv = [losetup, "--find", "--show", str(file)]
    attached = subprocess.run(argv, capture_output=True, text=True, check=False)
    if attached.returncode:
        pytest.skip(f"no loop device here: {attached.stderr.strip()}")
    device = attached.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run([losetup, "--detach", device], check=True)
