"""A private libvirt host: libvirtd and all processes that it starts, in namespaces that end with the test.

libvirt's folders are private folders in a mount namespace, so the machine's own libvirt is never touched, and several
such hosts are independent. Without root, libvirtd runs for the user's session, with folders from its environment. All
processes are in one pid namespace: if its first process is killed, the kernel kills the others at once, as a power
failure does. The first process ends with the test's process. Guests survive the daemon, as on any host. Tests call the
host only through virsh.
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

_DRIVER = "libvirt-daemon-driver-qemu"  # libvirt-daemon does not depend on it
_READY = 60.0  # seconds
_IS_ROOT = os.geteuid() == 0
# Other users than root need a user namespace as well, in which they keep their user id.
_UNSHARED, _ENTERED = ([], []) if _IS_ROOT else (["--user", "--map-current-user"], ["--user", "--preserve-credentials"])
_BOUND = (
    "/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/run", "/etc/passwd", "/etc/group",
)  # fmt: skip
# The first process adopts processes without parent, such as libvirt's guests. It must not leave them as zombies, which
# libvirt would take for guests that do not end. The hidden files would cost libvirt seconds to examine; no guest here
# needs them, and on some machines /dev/kvm exists but does not work.
_FIRST = """
folder=$0
for path; do  # no paths without root
    [ -e "$path" ] || mkdir -p "$path"  # a mount point must exist
    mount --bind "$folder$path" "$path" || exit
done
touch "$folder/nothing"
[ $# = 0 ] || for path in /dev/kvm /usr/bin/qemu-system-i386; do
    [ -e "$path" ] || continue
    # If the mount were writable, libvirt would examine QEMU at each definition.
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
    """A virsh command failed; the message is that of virsh."""


class Host:
    """A libvirt host, off until `power_on`."""

    def __init__(self, folder: Path) -> None:
        """Use `folder` for all files. Its path must be short, since it has sockets."""
        self.folder = folder
        self._socket = folder / "sockets" / "libvirt-sock"
        self.uri = f"qemu:///{'system' if _IS_ROOT else 'session'}?socket={self._socket}"
        self._virsh = require("virsh", package="libvirt-clients")
        self._machine: subprocess.Popen[str] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self._configure()

    def power_on(self) -> None:
        """Start the host: libvirtd accepts connections, and no guest is running."""
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
            unavailable(f"a private libvirtd cannot be started: {(self.folder / 'first.out').read_text()}")
        (self._first,) = psutil.Process(self._machine.pid).children()
        self.start_daemon()

    def lose_power(self) -> None:
        """End every process at once. Everything that they have written stays, as if it had been synced to the disks."""
        if self._machine is not None:
            self._first.kill()
            self._machine.communicate()
            if self._daemon is not None:
                self._daemon.wait()
            self._machine = None

    def start_daemon(self) -> None:
        """Start libvirtd, and wait until it accepts connections. It reconnects to running guests."""
        configuration = self.folder / "etc/libvirt/libvirtd.conf"
        libvirtd = require("libvirtd", package=f"libvirt-daemon {_DRIVER}")
        argv = self._inside(libvirtd, "-f", configuration, "-p", self.folder / "run" / "libvirtd.pid")
        folders = {
            "CONFIG": "etc",
            "CACHE": "var/cache",
            "DATA": "var/lib",
        }  # of a session; laid out as the system
        environment = {f"XDG_{name}_HOME": str(self.folder / path) for name, path in folders.items()}
        environment["XDG_RUNTIME_DIR"] = str(self.folder / "run")
        with (self.folder / "libvirtd.out").open("ab") as output:
            self._daemon = subprocess.Popen(argv, stdout=output, stderr=output, env={**os.environ, **environment})
        eventually(self._answers, "libvirtd accepts connections", details=self.log, timeout=_READY)

    def kill_daemon(self) -> None:
        """End libvirtd by SIGKILL. Its guests keep running."""
        self._kill(self.folder / "run" / "libvirtd.pid")
        self._daemon.wait()

    def kill_guest(self, name: str) -> None:
        """End a guest's QEMU by SIGKILL."""
        (pidfile,) = (self.folder / "run" / "libvirt" / "qemu").rglob(f"{name}.pid")
        self._kill(pidfile)

    def virsh(self, *words: object) -> str:
        """Run a virsh command and return its output.

        Raises:
            VirshError: The command fails.
        """
        argv = [self._virsh, "--connect", self.uri, "--quiet", *map(str, words)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise VirshError(done.stderr.strip())
        return done.stdout

    def log(self) -> str:
        """Return the last lines of libvirtd's logs."""
        logs = [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("libvirtd.*")]
        return "\n".join(logs)

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
    """Yield a running host; end it with all its processes after the block."""
    require("qemu-system-x86_64", package="qemu-system-x86")
    with tempfile.TemporaryDirectory(prefix="thrave-") as folder:
        host = Host(Path(folder))
        try:
            host.power_on()
            yield host
        finally:
            host.lose_power()


def _empty(folder: Path) -> None:
    """Remove the content of a folder, as a reboot does with a file system in memory."""
    shutil.rmtree(folder)
    folder.mkdir()
