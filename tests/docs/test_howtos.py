"""Runs every how-to as a reader pastes it: all its shell blocks in one shell, in an empty folder.

The PATH has Thrave, the AWS CLI, SeaweedFS and the Debian packages of the tests. Ports are replaced by free ones.
PostgreSQL, which refuses to run as root, and the permanent parts of a host (folders, user, systemd unit, guest) are
replaced by those of the tests. Indented lines change a host as root or belong in a guest; they are not run.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from support.eventually import eventually
from support.libvirt.guest_domain import Domain
from support.required_programs import require
from support.servers.stores import free_ports
from support.service.systemd_sandbox import confined
from thrave import host_files
from thrave.compute.libvirt.domain_metadata import NAMESPACE

ROOT = Path(__file__).parents[2]
HOWTOS = [ROOT / "README.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]
SHELL = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
PORT = "8773"
PROXY_PORTS = ("8774", "8775", "8776")
WEED = "-s3.port=8333"
STORE_PORT = "8333"
DATABASE = "postgresql://thrave@127.0.0.1:5432/thrave"
POSTGRES = "\n".join(f"{program}() {{ :; }}" for program in ("initdb", "pg_ctl", "createdb"))
"""Replaces the programs of PostgreSQL."""
# On a busy machine QEMU cannot measure how long a passphrase's key takes, and gives up.
AGAIN = 'qemu-img() { for _ in 1 2 3 4 5; do command qemu-img "$@" && return; done; return 1; }'
LIBVIRT = 'hypervisor = "libvirt"'
"""Text of a how-to that needs libvirt. The settings of the systemd unit have it, too."""
GUEST = "win-web"
"""The domain in the how-tos; it runs and is not adopted."""
START = "systemctl enable --now thrave"
HOST_FILES = Path(host_files.__file__).parent
UNIT = HOST_FILES / "systemd" / "thrave.service"


@pytest.mark.parametrize("howto", HOWTOS, ids=lambda path: path.stem)
def test_howto_works_when_pasted(howto, tmp_path, request):
    require("jq", package="jq")
    require("openssl", package="openssl")
    text = as_here(howto.read_text(), tmp_path, request)
    script = "\n".join([AGAIN, *SHELL.findall(text)])
    uses_systemd = START in howto.read_text()
    environment = libvirt_of(script, tmp_path, request) if uses_systemd or LIBVIRT in text else {}
    status, output = run(script, tmp_path, uses_systemd=uses_systemd, **environment)
    assert status == 0, output


@pytest.mark.parametrize("howto", HOWTOS, ids=lambda path: path.stem)
def test_howto_stops_at_first_error(howto):
    assert SHELL.findall(howto.read_text())[0].startswith("set -e\n")


def as_here(text: str, folder: Path, request: pytest.FixtureRequest) -> str:
    """Return a how-to with free ports, and with replacements for its database and host."""
    port, store, *others = map(str, free_ports(8, above=10000))
    weed, proxies = others[:3], others[3:]
    text = text.replace(PORT, port)
    if PROXY_PORTS[0] in text:
        require("nginx", package="nginx")
        require("caddy", package="caddy")
        for there, here in zip(PROXY_PORTS, proxies, strict=True):
            text = text.replace(there, here)
    roles = " ".join(f"-{role}.port={number}" for role, number in zip(("master", "volume", "filer"), weed, strict=True))
    text = text.replace(WEED, f"{WEED} {roles} -s3.port.iceberg=0 -s3.port.lance=0").replace(STORE_PORT, store)
    if DATABASE in text:
        text = text.replace(DATABASE, request.getfixturevalue("postgres").new_database())
        text = text.replace("initdb", f"{POSTGRES}\ninitdb", 1)
    if START in text:
        settings = (HOST_FILES / "thrave.toml").read_text()  # installed by an indented line
        (folder / "thrave.toml").write_text(settings.replace("/var/lib/thrave", str(folder / "data")))
        (starts,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
        text = text.replace(
            START, shlex.join(confined(UNIT, [folder], [*starts.split(), "--listen-port", port])) + " &"
        )
    for there, here in {
        "runuser -u thrave -- ": "",
        "/opt/thrave/bin": Path(sys.executable).parent,
        "/var/lib/thrave": folder / "data",
        "/etc/thrave": folder,
    }.items():
        text = text.replace(there, str(here))
    return text


def libvirt_of(script: str, folder: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """Return the environment in which a how-to finds libvirt; start the guest if the how-to uses one."""
    host = request.getfixturevalue("libvirtd")
    if GUEST in script:
        guest = Domain(host, GUEST, folder / GUEST, request.getfixturevalue("guest"), "000000000000")
        request.addfinalizer(guest.remove)
        host.virsh("metadata", GUEST, "--config", "--uri", NAMESPACE, "--remove")
        guest.start()
    return {"THRAVE_LIBVIRT_URI": host.uri}


def run(script: str, folder: Path, *, uses_systemd: bool, **environment: str) -> tuple[int, str]:
    """Run a script in a new session. Fail if a process that it started, except a systemd unit, outlives it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "THRAVE_"))}
    output = folder.parent / f"{folder.name}.txt"
    with output.open("w") as file:
        shell = subprocess.Popen(
            [shutil.which("bash"), "-c", script],
            cwd=folder,
            env={**clean, "PATH": path, "HOME": str(folder), **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = shell.wait(timeout=240)
            if not uses_systemd:
                eventually(lambda: not running(shell.pid), "everything that the how-to started has ended")
        finally:
            with suppress(ProcessLookupError):  # no process remains
                os.killpg(shell.pid, signal.SIGKILL)
    return status, output.read_text()


def running(session: int) -> list[psutil.Process]:
    """Return the processes of a session that have not ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
