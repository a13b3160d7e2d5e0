"""Runs a program in the sandbox of a systemd unit, as far as possible, on machines without systemd.

    python systemd_sandbox.py UNIT WRITABLE… -- PROGRAM ARGUMENT…

Always applied: NoNewPrivileges, an empty CapabilityBoundingSet, PrivateDevices, ProtectProc=invisible, ProcSubset=pid
and ProtectSystem=strict (except /tmp and the named folders). With the values of the unit: RestrictAddressFamilies,
SystemCallFilter and MemoryDenyWriteExecute. The user does not change: only root can start the Python of the tests.
"""

import ctypes
import ctypes.util
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM  # seccomp.h: SCMP_ACT_ALLOW, SCMP_ACT_ERRNO
_EQUAL, _MASKED_EQUAL = 4, 7  # seccomp.h: SCMP_CMP_EQ, SCMP_CMP_MASKED_EQ
_WRITE, _EXEC, _SHM_EXEC = 2, 4, 0o100000  # mman.h, shm.h
_FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}  # socket.h

# A separate /proc for the sandbox; it ends with the namespace.
_PROC = 'mount -t proc -o subset=pid,hidepid=invisible proc "$0" && exec "$@"'
_INSIDE = "(inside)"


class _Comparison(ctypes.Structure):
    """scmp_arg_cmp, libseccomp(3): an argument of a system call, and what it must be."""

    _fields_ = (("argument", ctypes.c_uint), ("how", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def confined(unit: Path, writable: Sequence[Path], argv: Sequence[str]) -> list[str]:
    """Return a command that runs `argv` in the sandbox of the unit, with write access only to these folders."""
    from support.required_programs import require, require_root  # this file is also run as a program

    require("bwrap", package="bubblewrap")
    require("systemd-analyze", package="systemd")
    require_root("make the namespaces of a sandbox")
    return [sys.executable, __file__, str(unit), *map(str, writable), "--", *argv]


def main() -> None:
    """Restart in the file system of the sandbox; there set the system call filter and execute the program."""
    words = sys.argv[1:]
    end = words.index("--")
    unit, folders, argv = words[0], words[1:end], words[end + 1 :]
    if folders != [_INSIDE]:
        _run_inside(folders, [sys.executable, __file__, unit, _INSIDE, "--", *argv])
    said = re.findall(r"^(\w+)=(.*)$", Path(unit).read_text(), re.MULTILINE)
    (families,) = [value.split() for name, value in said if name == "RestrictAddressFamilies"]
    assert ("MemoryDenyWriteExecute", "yes") in said
    _filter(
        _allowed([value for name, value in said if name == "SystemCallFilter"]),
        [_FAMILIES[family] for family in families],
    )
    os.execvp(argv[0], argv)


def _run_inside(writable: Sequence[str], argv: Sequence[str]) -> None:
    # The folders of the tests are in /tmp, which is writable in a unit; here only the named ones may be writable.
    binds = [("--ro-bind", str(Path(folder).parent)) for folder in writable] + [
        ("--bind", folder) for folder in writable
    ]
    places = [word for option, folder in [("--bind", "/tmp"), *binds] for word in (option, folder, folder)]
    sandbox = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--bind", "/mnt", "/proc", *places, "--cap-drop", "ALL"]
    os.execvp("unshare", ["unshare", "--mount", "sh", "-c", _PROC, "/mnt", *sandbox, "--", *argv])


def _allowed(filters: Sequence[str]) -> set[str]:
    """Return the system calls that lines of SystemCallFilter allow; systemd always allows @default."""
    allowed = {*_names("@default")}
    for line in filters:
        names = {name for word in line.removeprefix("~").split() for name in _names(word)}
        allowed = allowed - names if line.startswith("~") else allowed | names
    return allowed


def _names(word: str) -> Iterator[str]:
    if not word.startswith("@"):
        yield word
        return
    listed = subprocess.run(["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines()[1:]:
        if (name := line.strip()) and not name.startswith("#"):
            yield from _names(name)


def _filter(allowed: set[str], families: Sequence[int]) -> None:
    """Make the kernel refuse every other system call of this process and its children."""
    seccomp = ctypes.CDLL(ctypes.util.find_library("seccomp") or "libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(_REFUSE))
    only = {
        "mmap": [(2, _MASKED_EQUAL, _WRITE | _EXEC, protection) for protection in (0, _WRITE, _EXEC)],
        "mprotect": [(2, _MASKED_EQUAL, _EXEC, 0)],
        "pkey_mprotect": [(2, _MASKED_EQUAL, _EXEC, 0)],
        "shmat": [(2, _MASKED_EQUAL, _SHM_EXEC, 0)],
        "socket": [(0, _EQUAL, family, 0) for family in families],
    }
    for name in sorted(allowed):
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        for rule in only.get(name, [()]) if number >= 0 else []:  # negative: a system call of other processors
            comparisons = (_Comparison * 1)(_Comparison(*rule))
            failed = seccomp.seccomp_rule_add_array(context, _ALLOW, number, 1 if rule else 0, comparisons)
            assert failed == 0, (name, failed)
    assert seccomp.seccomp_load(context) == 0


if __name__ == "__main__":
    main()
