"""What the figures were measured on: processor, memory, kernel, versions."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from measure import CORES

_LIBRARIES = ("isal", "cryptography", "thrave")
_PROGRAMS = ("gzip", "pigz", "igzip", "openssl", "tar")
_TELLING_FLAGS = {"sha_ni", "aes", "vaes", "avx2", "avx512f"}


def machine() -> dict[str, object]:
    """All of it, for the results."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    cpu = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "flags": sorted(_TELLING_FLAGS & set(cpu.get("flags", "").split())),
        "cores": CORES,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "programs": {name: _program_version(name) for name in _PROGRAMS},
    }


def _program_version(name: str) -> str:
    if shutil.which(name) is None:
        return "not installed"
    argument = "version" if name == "openssl" else "--version"
    said = subprocess.run([name, argument], capture_output=True, text=True, check=False)
    return (said.stdout or said.stderr).splitlines()[0]
