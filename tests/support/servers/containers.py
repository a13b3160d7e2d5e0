"""Podman with a storage of its own, and the images that packaging/containers is based on, without an image registry.

`debian:13-slim` is a new Debian of debootstrap, in which pip finds a wheel of this checkout. One image replaces that of
PostgreSQL, with Debian's package and two variables of the official image, and that of SeaweedFS, with the `weed` of the
other tests.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from support.required_programs import require, require_root, unavailable
from support.wheels import build_wheel, copy_source

ROOT = Path(__file__).parents[3]
BASE = "docker.io/library/debian:13-slim"
POSTGRES = "docker.io/library/postgres:17-trixie"
SEAWEEDFS = "docker.io/chrislusf/seaweedfs:4.48"
_CACHED_DEBIAN = ROOT / ".cache/debian/trixie.tar"
"""The same file as in scripts/fresh-debian."""

_MAX_LIMIT = 4096  # open files, and processes

_POSTGRES_ENTRYPOINT = """#!/bin/sh
set -e
if [ "$(id -u)" = 0 ]; then
    install -d -o postgres -m 700 "$PGDATA" /var/run/postgresql
    install -o postgres -m 600 "$POSTGRES_PASSWORD_FILE" /tmp/password
    exec setpriv --reuid postgres --regid postgres --init-groups "$0"
fi
[ -s "$PGDATA/PG_VERSION" ] || {
    initdb --username "$POSTGRES_USER" --pwfile /tmp/password --auth-host scram-sha-256 --auth-local trust
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
    pg_ctl start -w -o "-c listen_addresses=''"
    createdb --username "$POSTGRES_USER" "$POSTGRES_USER"
    pg_ctl stop -m fast
}
exec postgres -c listen_addresses='*'
"""
_CONTAINERFILE = f"""FROM {BASE}
RUN apt-get update && apt-get install -y --no-install-recommends postgresql-17 wget
COPY --chmod=755 entrypoint weed /usr/bin/
ENV PATH=/usr/lib/postgresql/17/bin:/usr/sbin:/usr/bin:/sbin:/bin PGDATA=/var/lib/postgresql/data
STOPSIGNAL SIGINT
ENTRYPOINT ["entrypoint"]
"""


class Podman:
    """Podman, with images and containers in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Not every machine of CI lets root raise limits, or has systemd and only one version of cgroups.
        limits = [f"{name}={_MAX_LIMIT}:{_MAX_LIMIT}" for name in ("nofile", "nproc")]
        (folder / "containers.conf").write_text(
            f"[containers]\ndefault_ulimits = {json.dumps(limits)}\n"
            f'[network]\nnetwork_backend = "netavark"\nnetwork_config_dir = "{folder}/networks"\n'
            '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
            # Nothing is shared with the other containers of this machine.
            f'lock_type = "file"\ntmp_dir = "{folder}/tmp"\n'
        )
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
        )
        self.environment = {
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }

    def __call__(self, *words: object, **options) -> str:
        """Run a command of podman and return its output."""
        done = subprocess.run(
            ["podman", *map(str, words)],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def make_images(self) -> None:
        """Make the images that a registry would have."""
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            self._import_debian(folder / "debian")
            (folder / "entrypoint").write_text(_POSTGRES_ENTRYPOINT)
            weed = shutil.which("weed", path=Path(sys.executable).parent)
            shutil.copy(Path(weed).resolve(), folder / "weed")
            self("build", "--tag", POSTGRES, "--tag", SEAWEEDFS, "--file", "-", folder, input=_CONTAINERFILE)

    def _import_debian(self, root: Path) -> None:
        root.mkdir()
        subprocess.run(["tar", "-C", root, "-xf", _debian()], check=True)
        # As in the official image: no sync after each file.
        (root / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")
        build_wheel(copy_source(root.with_name("source")), root / "opt/wheels")
        settings = ["[global]", "find-links = /opt/wheels"]
        if "PIP_INDEX_URL" in os.environ:
            settings.append(f"index-url = {os.environ['PIP_INDEX_URL']}")
        if certificate := os.environ.get("PIP_CERT"):  # a local network may have its own certificate authority
            shutil.copy(certificate, root / "etc/local-network.crt")
            settings.append("cert = /etc/local-network.crt")
        (root / "etc/pip.conf").write_text("\n".join([*settings, ""]))
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
            self("import", "--quiet", "-", BASE, stdin=tar.stdout)


@contextmanager
def podman():
    """Podman until the end of the block, without remaining containers and images."""
    require_root("run containers here")
    for program, package in {
        "podman": "podman", "runc": "runc", "iptables": "iptables", "debootstrap": "debootstrap",
    }.items():  # fmt: skip
        require(program, package=package)
    with tempfile.TemporaryDirectory(prefix="thrave-podman-", dir="/var/tmp") as folder:  # overlayfs needs a disk
        engine = Podman(Path(folder))
        try:
            yield engine
        finally:
            engine("rm", "--all", "--force")


def _debian() -> Path:
    """Return the archive of a minimal Debian, downloaded once."""
    if not _CACHED_DEBIAN.exists():
        _CACHED_DEBIAN.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir="/var/tmp") as root:
            mirror = os.environ.get("MIRROR", "http://deb.debian.org/debian")
            done = subprocess.run(
                ["debootstrap", "--variant=minbase", "trixie", root, mirror],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                unavailable(f"debootstrap failed: {done.stdout[-500:]}")
            partial = _CACHED_DEBIAN.with_suffix(".partial")
            subprocess.run(["tar", "-C", root, "--one-file-system", "-cf", partial, "."], check=True)
            partial.rename(_CACHED_DEBIAN)
    return _CACHED_DEBIAN
