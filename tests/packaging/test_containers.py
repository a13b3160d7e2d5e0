"""The Containerfile and the compose file of packaging/containers, which docs/howto/run-in-containers.md has as well.

The page is pasted with real containers: support/servers/containers.py says which images replace those of a registry.
"""

import json
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from support.paste import blocks_of, kill_session, paste
from support.servers.containers import BASE, podman
from support.servers.stores import free_ports

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "packaging/containers"
PAGE = (ROOT / "docs/howto/run-in-containers.md").read_text()
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
CONTAINERFILE = (FOLDER / "Containerfile").read_text()
INSTALL = (ROOT / "docs/howto/install-and-upgrade.md").read_text()
UNINSTALL = (ROOT / "docs/howto/uninstall.md").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
CHECKS = """{
for service in thrave database store; do podman healthcheck run thrave_${service}_1; done
podman inspect $(podman ps -aq) > ../containers.json
podman image inspect localhost/thrave:0.1.0 > ../image.json
podman top thrave_thrave_1 user capeff > ../processes.txt
podman exec thrave_thrave_1 sh -c '! touch /usr/file && ! touch /var/lib/file'
podman exec thrave_thrave_1 stat -c '%U %a' secrets/pgpass secrets/store.credentials > ../modes.txt
podman exec -e AWS_SHARED_CREDENTIALS_FILE=secrets/store.credentials -e AWS_ENDPOINT_URL=http://store:8333 \\
    thrave_thrave_1 thrave verify s3://bundles/winami.manifest.xml --certificate service/cert.pem
cp -r secrets ..
podman stop --time 120 thrave_thrave_1
podman inspect --format '{{.State.ExitCode}}' thrave_thrave_1 > ../status.txt
} < /dev/null
"""
"""Pasted before the page's last block. Without /dev/null the programs would read what is pasted next."""


@pytest.mark.parametrize("name", ["Containerfile", "compose.yaml"])
def test_page_writes_the_file_of_the_repository(name):
    (text,) = re.findall(rf"^cat > {re.escape(name)} <<'EOF'\n(.*?)^EOF\n", PAGE, re.DOTALL | re.MULTILINE)
    assert text == (FOLDER / name).read_text()


def test_each_image_has_a_version():
    images = [service["image"] for service in COMPOSE["services"].values()]
    images += re.findall(r"^FROM (\S+)", CONTAINERFILE, re.MULTILINE)
    tags = [image.rpartition("/")[2].partition(":")[2] for image in images]
    assert all(re.match(r"\d", tag) for tag in tags), images
    assert f"ARG VERSION={VERSION}\n" in CONTAINERFILE
    assert COMPOSE["services"]["thrave"]["image"] == f"localhost/thrave:{VERSION}"


def test_no_secret_is_in_the_compose_file():
    for name, service in COMPOSE["services"].items():
        assert not [key for key in service.get("environment", {}) if re.search("PASSWORD$|SECRET", key)], name
    assert all({*secret} == {"file"} for secret in COMPOSE["secrets"].values())


@pytest.fixture(scope="module")
def engine():
    """Podman, with the images that a registry would have."""
    with podman() as found:
        found.make_images()
        yield found


@pytest.mark.containers
@pytest.mark.timeout(1200)
def test_page_works_when_pasted(engine, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    (port,) = free_ports(1)
    environment = {
        **engine.environment,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "PORT": str(port),
    }
    *blocks, last = blocks_of(PAGE)
    pasted = paste([*blocks, CHECKS, last], folder, environment, timeout=900)
    try:
        assert pasted.status == 0, pasted.output
    finally:
        kill_session(pasted.session)
    assert engine("ps", "--all", "--quiet") + engine("volume", "ls", "--quiet") == "", pasted.output
    header, *processes = (tmp_path / "processes.txt").read_text().splitlines()
    assert header.split() == ["USER", "EFFECTIVE", "CAPS"]
    assert {tuple(line.split()) for line in processes} == {("thrave", "none")}
    assert (tmp_path / "modes.txt").read_text() == "thrave 600\nthrave 600\n"
    assert (tmp_path / "status.txt").read_text() == "0\n"
    (image,) = json.loads((tmp_path / "image.json").read_text())
    assert image["Config"]["User"] == "thrave"
    visible = (tmp_path / "containers.json").read_text() + (tmp_path / "image.json").read_text()
    secrets = [
        (tmp_path / "secrets/postgres-password").read_text(),
        json.loads((tmp_path / "secrets/store.json").read_text())["identities"][0]["credentials"][0]["secretKey"],
    ]
    assert [secret for secret in secrets if secret in visible] == []


@pytest.mark.containers
@pytest.mark.timeout(600)
def test_thrave_is_installed_on_a_debian_host_and_uninstalled(engine):
    """The lines of the two pages for root. No systemd runs in the container, so `systemctl` starts nothing."""
    install, uninstall = (commands_after("On a Debian host, as root", page) for page in (INSTALL, UNINSTALL))
    assert "host-files install" in install
    assert "host-files remove" in uninstall
    script = f"""
        systemctl() {{ echo systemctl "$@"; }}
        apt-get -q update
        apt-get -q -y install systemd
        find / -xdev -path /proc -prune -o -name '*thrave*' -print > before
        {install.replace("apt-get install", "apt-get -q -y install")}
        runuser -u thrave -- /opt/thrave/bin/thrave account create alice --config /etc/thrave/thrave.toml
        test -s /var/lib/thrave/thrave.db
        {uninstall}
        find / -xdev -path /proc -prune -o -name '*thrave*' -print | diff before -
        ! getent passwd thrave thrave-api
    """
    output = engine("run", "--rm", BASE, "bash", "-ec", script)
    assert "systemctl enable --now thrave" in output
    assert "systemctl disable --now thrave" in output


def commands_after(words, page):
    """Return the indented lines that follow a paragraph which begins with these words."""
    (lines,) = re.findall(rf"^{words}.*?\n\n((?:    [^\n]*\n)+)", page, re.DOTALL | re.MULTILINE)
    return lines
