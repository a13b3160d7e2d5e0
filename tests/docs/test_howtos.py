"""Every how-to, run as it is written: its shell blocks in one script, its files beside it.

Where one is about a host that was set up for good, its folders and its user are stood in for, and its unit by the
command and the sandbox in it. Lines that are indented change a host as root, or are typed in a guest, and are not run.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from support.components import require
from support.confinement import confined
from support.disks import make_disk
from support.domain import Domain
from thrave.compute.domain_metadata import NAMESPACE

ROOT = Path(__file__).parents[2]
HOWTOS = [ROOT / "README.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]
SHELL = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```", re.DOTALL | re.MULTILINE)
PORT = "8773"
STORE = "http://127.0.0.1:8333"
"""Where how-tos find SeaweedFS and in it its user Alice."""
STORE_PORT = "8333"
DATABASE = "postgresql://thrave@127.0.0.1:5432/thrave"
"""Where how-tos find PostgreSQL."""
# On a busy machine QEMU cannot measure how long a passphrase's key takes, and gives up.
AGAIN = 'qemu-img() { for _ in 1 2 3 4 5; do command qemu-img "$@" && return; done; return 1; }'
LIBVIRT = 'hypervisor = "libvirt"'
"""What a how-to says that needs libvirt."""
GUEST = "win-web"
"""The domain that how-tos are about; it runs, and nobody has adopted it."""
START = "systemctl enable --now thrave"
UNIT = ROOT / "packaging" / "systemd" / "thrave.service"


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("howto", HOWTOS, ids=lambda path: path.stem)
def test_the_howto_works_as_it_is_written(howto, tmp_path, request):
    require("jq", package="jq")
    require("openssl", package="openssl")
    text = as_here(howto.read_text(), tmp_path, request)
    make_disk(tmp_path / "disk.raw", 24 << 20)
    (tmp_path / "vectors").symlink_to(ROOT / "tests" / "data" / "vectors")
    for name, content in FILE.findall(text):
        (tmp_path / name).write_text(content)
    script = "\n".join(["set -euo pipefail", AGAIN, *SHELL.findall(text)])
    status, said = run(script, tmp_path, **(libvirt_of(script, tmp_path, request) if LIBVIRT in text else {}))
    assert status == 0, said


def as_here(text: str, folder: Path, request: pytest.FixtureRequest) -> str:
    """A how-to with what stands for its stores, its database and its host."""
    port = free_port()
    text = text.replace(PORT, port)
    if STORE in text:
        text = text.replace(STORE, request.getfixturevalue("seaweedfs").url)
    if STORE_PORT in text:
        store = request.getfixturevalue("seaweedfs")
        text = text.replace(f"http://127.0.0.1:{STORE_PORT}", store.url)
    if DATABASE in text:
        text = text.replace(DATABASE, request.getfixturevalue("postgres").new_database())
    if START in text:
        (starts,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
        text = text.replace(START, shlex.join(confined(UNIT, [folder], [*starts.split(), "--port", port])) + " &")
    for there, here in {
        "runuser -u thrave -- ": "",
        "/opt/thrave/bin": Path(sys.executable).parent,
        "/var/lib/thrave": folder / "data",
        "/etc/thrave": folder,
    }.items():
        text = text.replace(there, str(here))
    return text


def libvirt_of(script: str, folder: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """Where a how-to finds libvirt, and the guest there if it does something with one."""
    host = request.getfixturevalue("libvirtd")
    if GUEST in script:
        guest = Domain(host, GUEST, folder / GUEST, request.getfixturevalue("guest"), "000000000000")
        request.addfinalizer(guest.remove)
        host.virsh("metadata", GUEST, "--config", "--uri", NAMESPACE, "--remove")
        guest.start()
    return {"THRAVE_LIBVIRT_URI": host.uri}


def run(script: str, folder: Path, **environment: str) -> tuple[int, str]:
    """Run a script in a session of its own, none of which outlives it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "said.txt").open("w+") as said:
        shell = subprocess.Popen(
            [shutil.which("bash"), "-c", script],
            cwd=folder,
            env={**os.environ, "PATH": path, "AWS_PAGER": "", **environment},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = shell.wait(timeout=120)
        finally:
            with suppress(ProcessLookupError):  # nothing was left of it
                os.killpg(shell.pid, signal.SIGKILL)
        said.seek(0)
        return status, said.read()


def test_the_index_names_every_howto():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [path.name for path in HOWTOS[1:] if f"howto/{path.name}" not in index] == []
