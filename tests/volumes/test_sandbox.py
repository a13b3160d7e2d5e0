"""The sandbox of the process that reads a guest's file system: what the process can still do."""

import platform
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from thrave.volumes import ntfs_sandbox, sandbox
from thrave.volumes.errors import SandboxUnavailableError
from thrave.volumes.partitions import Partition

pytest.importorskip("pytsk3")

# Each attempt has its own process, since the kernel may kill the process.
ATTEMPTS = {
    "open": "open('/etc/passwd')",
    "create": "open('loot', 'w')",
    "unlink": "os.unlink('precious')",
    "truncate": "os.truncate('precious', 0)",
    "rename": "os.rename('precious', 'other')",
    "link": "os.link('precious', 'other')",
    "symlink": "os.symlink('precious', 'other')",
    "mkdir": "os.mkdir('made')",
    "chmod": "os.chmod('.', 0o777)",
    "chown": "os.chown('precious', os.getuid(), os.getgid())",
    "utime": "os.utime('precious')",
    "stat": "os.stat('precious')",
    "listdir": "os.listdir('.')",
    "chdir": "os.chdir('/')",
    "xattr": "os.setxattr('precious', 'user.a', b'b')",
    "socket": "socket.socket()",
    "socket pair": "socket.socketpair()",
    "pipe": "os.pipe()",
    "dup": "os.dup(0)",
    "memfd": "os.memfd_create('x')",
    "fork": "os.fork()",
    "exec": "os.execv('/bin/true', ['true'])",
    "thread": "threading.Thread(target=print).start()",
    "signal parent": "os.kill(os.getppid(), 0)",
    "signal group": "os.killpg(0, signal.SIGCONT)",
    "priority": "os.nice(1)",
    "user": "os.setuid(os.getuid())",
    "limits": "resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
    "limits of the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
    "memory of the parent": "call(310, os.getppid(), 0, 0, 0, 0, 0)",
    "trace": "call(101, 16, os.getppid(), 0, 0)",
    "shared memory": "call(29, 0, 4096, 0o1600)",
    "message queue": "call(68, 0, 0o1600)",
    "kernel keys": "call(250, 0, 0)",
    "io_uring": "call(425, 8, 0)",
    "namespaces": "call(272, 0x10000000)",
    "bpf": "call(321, 0, 0, 0)",
    "filter removed": "call(157, 22, 0, 0, 0, 0)",
    "the 32-bit numbers": "call(0x40000000 + 39)",
    "code": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
    "code, made executable": "libc.mprotect(address, 4096, 5) == 0 or oops()",
    "write elsewhere": "os.write(2, b'x')",
    "read elsewhere": "os.read(1, 1)",
    "much memory": "bytearray(1 << 30)",
}

PROGRAM = """
import ctypes, mmap, os, resource, signal, socket, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
page = mmap.mmap(-1, 4096)
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page)))
def oops():
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def call(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, arguments)) != -1 or oops()
from thrave.volumes.ntfs_sandbox import _confine
_confine()
print("confined", flush=True)
try:
    {attempt}
except (OSError, MemoryError, RuntimeError, ValueError):
    print("refused", flush=True)
else:
    print("could", flush=True)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of the calls are x86-64's")
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_sandbox_refuses(attempt, tmp_path):
    (tmp_path / "precious").write_text("precious")
    program = PROGRAM.format(attempt=ATTEMPTS[attempt])
    done = subprocess.run(
        [sys.executable, "-c", program], stdin=subprocess.DEVNULL, capture_output=True, cwd=tmp_path, check=False
    )
    said = done.stdout.decode().splitlines()
    assert said[0] == "confined", done.stderr
    assert "could" not in said
    assert said[1:] == ["refused"] or done.returncode < 0
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert (tmp_path / "precious").read_text() == "precious"


def test_sandboxed_process_has_an_empty_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("THRAVE_S3_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    seen = tmp_path / "seen"
    instead = tmp_path / "python"
    instead.write_text(f"#!/bin/sh\n/usr/bin/env > {seen}\n")
    instead.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(instead))
    with ntfs_sandbox._process("nothing", 0) as process:
        process.stdout.read()
    # Set by the shell itself.
    assert {line.split("=")[0] for line in seen.read_text().splitlines()} <= {"PWD", "OLDPWD", "SHLVL", "_"}


def test_check_sandbox_passes_on_this_host():
    ntfs_sandbox.check_sandbox()


@pytest.fixture
def on_another_machine(tmp_path, monkeypatch):
    """Make the child process run on a machine without a seccomp filter."""
    code = (
        "import platform; platform.machine = lambda: 'riscv64'; "
        "from thrave.volumes import ntfs_sandbox; ntfs_sandbox.main()"
    )
    instead = tmp_path / "python"
    # -P -B -m thrave.volumes.ntfs_sandbox TASK LENGTH
    instead.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$5" "$6"\n')
    instead.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(instead))


@pytest.mark.usefixtures("on_another_machine")
def test_no_volume_is_read_without_sandbox():
    class Unread:
        size = 1 << 20

        def read_into(self, offset, buffer):
            raise AssertionError(offset)

    with pytest.raises(SandboxUnavailableError, match=r"no seccomp filter for Linux on riscv64"):
        ntfs_sandbox.scan_unused(Unread(), Partition(0, 1 << 20))
    with pytest.raises(SandboxUnavailableError, match="cannot be confined"):
        ntfs_sandbox.check_sandbox()


def verdict(machine, architecture, number, *arguments):
    """Run the filter program for one system call, as the kernel does."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *[*arguments, 0, 0, 0, 0, 0, 0][:6])
    program, at, value = sandbox._build_filter(machine), 0, 0
    while True:
        step = program[at]
        at += 1
        if step.code == sandbox._LOAD:
            value = struct.unpack_from("<I", data, step.k)[0]
        elif step.code == sandbox._JUMP_EQUAL:
            at += step.jt if value == step.k else step.jf
        elif step.code == sandbox._JUMP_SET:
            at += step.jt if value & step.k else step.jf
        else:
            return step.k


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_allows_only_the_table(machine):
    architecture = sandbox._AUDIT_ARCH[machine]
    numbers = {getattr(call, machine): call for call in sandbox.ALLOWED_CALLS.values()}
    for number in (*range(600), *range(0x40000000, 0x40000258), 0xFFFFFFFF):
        call = numbers.get(number)
        fits = [call.equals or 0] * 6 if call else [0] * 6
        assert (verdict(machine, architecture, number, *fits) == sandbox._ALLOW) == (call is not None), number
        if call and call.argument is not None:
            fits[call.argument] = 2 if call.equals is not None else call.without_bits
            assert verdict(machine, architecture, number, *fits) == sandbox._REFUSE
    for other in (0x40000003, 0x40000028, *set(sandbox._AUDIT_ARCH.values()) - {architecture}):
        assert verdict(machine, other, 0) == sandbox._KILL


def test_filter_agrees_with_the_kernel_table():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    defined = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR_")]
    numbers = {name.removeprefix("__NR_"): int(number) for _, name, number in defined}
    assert {name: call.x86_64 for name, call in sandbox.ALLOWED_CALLS.items()} == {
        name: numbers[name] for name in sandbox.ALLOWED_CALLS
    }


def test_confine_cannot_be_called_twice():
    """The first filter refuses the calls of the second one."""
    program = textwrap.dedent("""
        import sys
        from thrave.volumes.sandbox import confine, ConfinementError
        confine()
        try:
            confine()
        except (OSError, ConfinementError):
            print("refused", flush=True)
    """)
    done = subprocess.run([sys.executable, "-c", program], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.stdout == b"refused\n"
