"""Pastes every how-to into a new shell on a terminal, as an ordinary user in an empty directory.

The programs that a page has the reader install are on the PATH; nothing else is prepared. The environment gives free
ports to the variables in which the pages have their ports. Indented lines are not pasted.

The pages that configure a libvirt host (`HOST_PAGES`) are the exception: they run as root, with a libvirt of the tests,
and with temporary folders in place of the host's.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from support.eventually import eventually
from support.libvirt.guest_domain import Domain
from support.paste import (
    CONTAINER_PAGES,
    HOST_PAGES,
    INSTALLATION_PAGES,
    blocks_of,
    install_commands,
    kill_session,
    paste,
    running,
)
from support.required_programs import require, unavailable
from support.service.systemd_sandbox import confined
from thrave import host_files
from thrave.compute.libvirt.domain_metadata import NAMESPACE

ROOT = Path(__file__).parents[2]
HOWTOS = [ROOT / "README.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]
PASTED_HERE = [page for page in HOWTOS if page.stem not in CONTAINER_PAGES | INSTALLATION_PAGES]
TIMEOUT = 240.0  # seconds for a page
ORDINARY_USER = ("unshare", "--map-user=1000", "--map-group=1000")
"""Root's processes become those of an ordinary user, in a user namespace; they keep access to root's own files."""
PORTS = {"PORT": 1, "TLS_PORT": 1, "S3_PORT": 4, "POSTGRES_PORT": 1, "NGINX_PORT": 2, "CADDY_PORT": 1}
"""Variables of the pages, and how many successive ports each names. SeaweedFS also takes those 10000 higher."""
PROGRAMS = {
    "jq": "jq", "openssl": "openssl", "qemu-img": "qemu-utils", "curl": "curl", "nginx": "nginx", "caddy": "caddy",
    "/usr/lib/postgresql": "postgresql", "ansible-playbook": "ansible-core",
}  # fmt: skip
GUEST = "win-web"
"""The domain of these pages; it runs and is not adopted."""
START = "systemctl enable --now thrave"
HOST_FILES = Path(host_files.__file__).parent
UNIT = HOST_FILES / "systemd" / "thrave.service"


@pytest.mark.parametrize("howto", PASTED_HERE, ids=lambda path: path.stem)
def test_howto_works_when_pasted(howto, tmp_path, request):
    text = howto.read_text()
    require_installed(text)
    folder, home = tmp_path / "empty", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(home)}
    environment |= free_ports_of(text)
    prefix = ordinary_user()
    if howto.stem in HOST_PAGES:
        text, environment, prefix = on_a_host(text, folder, request, environment)
    pasted = paste(blocks_of(text, without=["Install"]), folder, environment, timeout=TIMEOUT, prefix=prefix)
    try:
        assert pasted.status == 0, pasted.output
        if START not in howto.read_text():  # systemd's service stays
            eventually(lambda: not running(pasted.session), "everything that the page started has ended")
    finally:
        kill_session(pasted.session)


@pytest.mark.parametrize("howto", HOWTOS[1:], ids=lambda path: path.stem)
def test_howto_names_what_it_needs_and_cleans_up(howto):
    headings = re.findall(r"^## (.*)", howto.read_text(), re.MULTILINE)
    assert "Before you begin" in headings
    assert headings[-1] == "Clean up"


@pytest.mark.parametrize("howto", HOWTOS, ids=lambda path: path.stem)
def test_howto_stops_at_first_error(howto):
    first = blocks_of(howto.read_text(), without=["Install"])[0]
    assert first.startswith(("set -e\n", "(\nset -e\n"))


@pytest.mark.parametrize("howto", HOWTOS, ids=lambda path: path.stem)
def test_howto_checks_programs_before_it_begins(howto, tmp_path):
    """Without the programs of the page, the shell ends in the first block, with the name of a missing one."""
    first, *_ = blocks_of(howto.read_text(), without=["Install"])
    (tmp_path / "bin").mkdir()
    for program in ("bash", "setsid"):
        (tmp_path / "bin" / program).symlink_to(require(program, package=program))
    pasted = paste([first], tmp_path, {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}, timeout=TIMEOUT)
    assert "not found" in pasted.output
    assert pasted.blocks == 0
    assert pasted.status != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def require_installed(text: str) -> None:
    """Skip the test without the Debian packages that the page has the reader install."""
    wanted = " ".join(install_commands(text)).split()
    for program, package in PROGRAMS.items():
        if package in wanted and not program.startswith("/"):
            require(program, package=package)
        elif package in wanted and not Path(program).exists():
            unavailable(f"{package} is not installed: scripts/system-packages {package}")


def ordinary_user() -> tuple[str, ...]:
    """Return the program that executes a shell of root as an ordinary user."""
    if os.geteuid() != 0:
        return ()
    if subprocess.run([*ORDINARY_USER, "true"], check=False, capture_output=True).returncode:
        unavailable("user namespaces are not available here")
    return ORDINARY_USER


def free_ports_of(text: str) -> dict[str, str]:
    """Return free ports for the variables of a page."""
    return {name: str(free_range(count)) for name, count in PORTS.items() if f"{name}=${{{name}:-" in text}


def free_range(count: int) -> int:
    """Return the first of `count` successive free ports, where those 10000 higher are free, too."""
    while True:
        with ExitStack() as stack, suppress(OSError, OverflowError):
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            others = [*range(first + 1, first + count), *range(first + 10000, first + 10000 + count)]
            for port in others:
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def on_a_host(
    text: str, folder: Path, request: pytest.FixtureRequest, environment: dict[str, str]
) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """Return the page with the folders of the tests, and an environment in which it finds a libvirt."""
    host = request.getfixturevalue("libvirtd")
    if GUEST in "".join(blocks_of(text)):
        guest = Domain(host, GUEST, folder.parent / GUEST, request.getfixturevalue("guest"), "000000000000")
        request.addfinalizer(guest.remove)
        host.virsh("metadata", GUEST, "--config", "--uri", NAMESPACE, "--remove")
        guest.start()
    if START in text:
        settings = (HOST_FILES / "thrave.toml").read_text()  # installed by an indented line
        (folder / "thrave.toml").write_text(settings.replace("/var/lib/thrave", str(folder / "data")))
        (starts,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
        argv = [*starts.split(), "--listen-port", environment["PORT"]]
        text = text.replace(START, shlex.join(confined(UNIT, [folder], argv)) + " &")
    for there, here in {
        "runuser -u thrave -- ": "",
        "/opt/thrave/bin": Path(sys.executable).parent,
        "/var/lib/thrave": folder / "data",
        "/etc/thrave": folder,
        "/var/lib/libvirt/images": folder,
    }.items():
        text = text.replace(there, str(here))
    return text, {**environment, "THRAVE_LIBVIRT_URI": host.uri}, ()
