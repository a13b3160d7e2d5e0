"""A private libvirt host: libvirtd and all it starts, in namespaces that end with the test.

What libvirt keeps on a machine is bound to a private folder in a mount namespace, so that the machine's own libvirt is
never touched and two such hosts never meet; who is not root has a libvirtd of their session, which keeps everything in
folders that it is told. All processes are in one pid namespace: with the first of them the kernel
kills the rest at once, as a power failure does, and the first one ends when the test's process does, whatever way.
Guests outlive the daemon, as on any host. It is talked to by virsh alone.
"""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from support.eventually import eventually
from support.required_programs import require, unavailable

_DRIVER = "libvirt-daemon-driver-qemu"  # of which libvirt-daemon can do without
_READY = 60.0  # seconds
_IS_ROOT = os.geteuid() == 0
# Who is not root may have namespaces if one of them is of users, and stays who they are in it.
_UNSHARED, _ENTERED = ([], []) if _IS_ROOT else (["--user", "--map-current-user"], ["--user", "--preserve-credentials"])
_BOUND = (
    "/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/run", "/etc/passwd", "/etc/group",
)  # fmt: skip
# The first process takes in those that have lost their parent, which libvirt's guests have: so it must not leave them
# as zombies, which libvirt would take for guests that do not die. What is hidden, libvirt would examine for seconds; no
# guest here needs it, and there are machines where /dev/kvm is there and does not work.
_FIRST = """
folder=$0
for path; do  # none for who is not root
    [ -e "$path" ] || mkdir -p "$path"  # what is private can only be put over something
    mount --bind "$folder$path" "$path" || exit
done
touch "$folder/nothing"
[ $# = 0 ] || for path in /dev/kvm /usr/bin/qemu-system-i386; do
    [ -e "$path" ] || continue
    # If it could be written to, libvirt would measure QEMU at each definition.
    mount --bind "$folder/nothing" "$path" && mount -o remount,bind,ro "$path" || exit
done
echo ready
exec env --ignore-signal=CHLD cat >/dev/null
"""
_LIBVIRTD_CONF = """\
unix_sock_dir = "{folder}/sockets"
unix_sock_group = "root"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "3:file:{folder}/libvirtd.log"
"""
_AS_ROOT = """\
user = "root"
group = "root"
"""
_QEMU_CONF = """\
security_driver = "none"
cgroup_controllers = []
namespaces = []
remember_owner = 0
stdio_handler = "file"
"""
_USER = "libvirt-qemu"  # libvirt wants it to exist even where its configuration names another one


class VirshError(Exception):
    """What virsh was asked to do, it could not; the message is its own."""


class Host:
    """A host, to be switched on."""

    def __init__(self, folder: Path) -> None:
        """Keep everything in `folder`, whose path must be short: sockets lie in it."""
        self.folder = folder
        self._socket = folder / "sockets" / "libvirt-sock"
        self.uri = f"qemu:///{'system' if _IS_ROOT else 'session'}?socket={self._socket}"
        self._virsh = require("virsh", package="libvirt-clients")
        self._machine: subprocess.Popen[str] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self._configure()

    def power_on(self) -> None:
        """Start it as a machine starts: no guest runs, and libvirtd answers."""
        _empty(self.folder / "run")
        unshare = ["unshare", *_UNSHARED, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        argv = [*unshare, "sh", "-c", _FIRST, self.folder, *(_BOUND if _IS_ROOT else ())]
        with (self.folder / "first.out").open("ab") as output:
            self._machine = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True
            )
        assert self._machine.stdout is not None
        if self._machine.stdout.readline() != "ready\n":
            self._machine.communicate()
            self._machine = None
            unavailable(f"no libvirtd of the tests' own can be had here: {(self.folder / 'first.out').read_text()}")
        (self._first,) = psutil.Process(self._machine.pid).children()
        self.start_daemon()

    def lose_power(self) -> None:
        """End every process at once; what they have written stays, as if the disks had been told to sync."""
        if self._machine is not None:
            self._first.kill()
            self._machine.communicate()
            if self._daemon is not None:
                self._daemon.wait()
            self._machine = None

    def start_daemon(self) -> None:
        """Start libvirtd, and wait until it answers; the guests that run are taken up again."""
        configuration = self.folder / "etc/libvirt/libvirtd.conf"
        libvirtd = require("libvirtd", package=f"libvirt-daemon {_DRIVER}")
        argv = self._inside(libvirtd, "-f", configuration, "-p", self.folder / "run" / "libvirtd.pid")
        folders = {"CONFIG": "etc", "CACHE": "var/cache", "DATA": "var/lib"}  # of a session; they are as the machine's
        environment = {f"XDG_{name}_HOME": str(self.folder / path) for name, path in folders.items()}
        environment["XDG_RUNTIME_DIR"] = str(self.folder / "run")
        with (self.folder / "libvirtd.out").open("ab") as output:
            self._daemon = subprocess.Popen(argv, stdout=output, stderr=output, env={**os.environ, **environment})
        eventually(self._answers, "libvirtd accepts connections", details=self.log, timeout=_READY)

    def kill_daemon(self) -> None:
        """End libvirtd by SIGKILL; its guests run on."""
        self._kill(self.folder / "run" / "libvirtd.pid")
        self._daemon.wait()

    def kill_guest(self, name: str) -> None:
        """End a guest's QEMU by SIGKILL."""
        (pidfile,) = (self.folder / "run" / "libvirt" / "qemu").rglob(f"{name}.pid")
        self._kill(pidfile)

    def virsh(self, *words: object) -> str:
        """What virsh prints.

        Raises:
            VirshError: It fails.
        """
        argv = [self._virsh, "--connect", self.uri, "--quiet", *map(str, words)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise VirshError(done.stderr.strip())
        return done.stdout

    def log(self) -> str:
        """The last that libvirtd has said."""
        said = [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("libvirtd.*")]
        return "\n".join(said)

    def _configure(self) -> None:
        for path in _BOUND:
            bound = self.folder / path.lstrip("/")
            if Path(path).is_file():
                bound.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, bound)
            else:
                bound.mkdir(parents=True)
        for path, line in (("passwd", f"{_USER}:x:64055:64055::/:/usr/sbin/nologin"), ("group", f"{_USER}:x:64055:")):
            known = self.folder / "etc" / path
            if f"{_USER}:" not in known.read_text():
                known.write_text(f"{known.read_text()}{line}\n")
        (self.folder / "sockets").mkdir()
        (self.folder / "etc/libvirt/libvirtd.conf").write_text(_LIBVIRTD_CONF.format(folder=self.folder))
        (self.folder / "etc/libvirt/qemu.conf").write_text(_QEMU_CONF + (_AS_ROOT if _IS_ROOT else ""))

    def _inside(self, *argv: object) -> list[str]:
        return ["nsenter", f"--target={self._first.pid}", *_ENTERED, "--mount", "--pid", *map(str, argv)]

    def _kill(self, pidfile: Path) -> None:
        pid = pidfile.read_text().strip()
        subprocess.run(self._inside("sh", "-c", 'kill -KILL "$0"', pid), check=True)

    def _answers(self) -> bool:
        assert self._daemon is not None
        assert self._daemon.poll() is None, f"libvirtd has ended: {self.log()}"
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(str(self._socket))
            return True
        return False


@contextmanager
def running_host() -> Iterator[Host]:
    """A host that is on, and gone at the end with all that it has started."""
    require("qemu-system-x86_64", package="qemu-system-x86")
    with tempfile.TemporaryDirectory(prefix="thrave-") as folder:
        host = Host(Path(folder))
        try:
            host.power_on()
            yield host
        finally:
            host.lose_power()


def _empty(folder: Path) -> None:
    """Remove what is in a folder, as a machine's start does with what lies in memory."""
    shutil.rmtree(folder)
    folder.mkdir()
