"""Confines this process permanently to reading stdin, writing stdout, computing and exiting.

Resource limits (no file, no process, little memory and time), no new privileges, no core dump and no tracing, Landlock
where the kernel has it, and a seccomp filter that allows a short list of system calls; all others fail with EPERM. If a
layer cannot be set up, the process must exit; only Landlock may be missing.

Sources: Linux Documentation/userspace-api (seccomp_filter.rst, landlock.rst), linux/filter.h, linux/audit.h; the call
numbers are those of arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

import ctypes
import os
import platform
import resource
import struct
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

CPU_SECONDS = 120
MEMORY = 512 << 20
"""Bytes of address space, of which $Bitmap takes at most 64 MiB."""

_NOBODY = 65534
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 22, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SECCOMP_MODE_FILTER = 2
_PROT_EXEC = 4

# Classic BPF (linux/bpf_common.h) and the offsets of struct seccomp_data. Both machines are little-endian.
_LOAD, _JUMP_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_AT_NUMBER, _AT_MACHINE = 0, 4
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # the second: errno 1, EPERM


class _Call(NamedTuple):
    """An allowed system call: its numbers, and a condition on one argument."""

    x86_64: int
    aarch64: int
    argument: int | None = None
    """Index of the argument; None: no condition."""
    equals: int | None = None
    without_bits: int | None = None


ALLOWED_CALLS = {
    "read": _Call(0, 63, argument=0, equals=0),  # only stdin: answers of the parent
    "write": _Call(1, 64, argument=0, equals=1),  # only stdout: requests to the parent
    "mmap": _Call(9, 222, argument=2, without_bits=_PROT_EXEC),
    "mprotect": _Call(10, 226, argument=2, without_bits=_PROT_EXEC),
    "munmap": _Call(11, 215),
    "mremap": _Call(25, 216),
    "brk": _Call(12, 214),
    "madvise": _Call(28, 233),
    "futex": _Call(202, 98),
    "sched_yield": _Call(24, 124),
    "rt_sigaction": _Call(13, 134),
    "rt_sigprocmask": _Call(14, 135),
    "rt_sigreturn": _Call(15, 139),
    "sigaltstack": _Call(131, 132),
    "restart_syscall": _Call(219, 128),
    "clock_gettime": _Call(228, 113),
    "gettimeofday": _Call(96, 169),
    "getrandom": _Call(318, 278),
    "exit": _Call(60, 93),
    "exit_group": _Call(231, 94),
}
"""Every call that Python and pytsk3 make after they are loaded."""

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# linux/landlock.h: the rights that each ABI version can restrict. All of them are restricted.
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446
_LANDLOCK_VERSION = 1  # flag: return the ABI version
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # since ABI version -> number of rights, from bit 0
_NET_FROM, _SCOPE_FROM = 4, 6


class ConfinementError(Exception):
    """The process cannot be confined on this host; the message names the layer."""


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction)))


def confine() -> None:
    """Confine this process to reading stdin, writing stdout and computing. This cannot be undone.

    Load all modules and codecs that are needed before: no file can be opened afterwards.

    Raises:
        ConfinementError: A layer cannot be set up. The process must exit.
    """
    machine = _machine()
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise ConfinementError("it has more than one thread, and a seccomp filter applies to one thread only")
    libc = ctypes.CDLL(None, use_errno=True)
    _drop_root()
    _prctl(libc, "no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    with suppress(ConfinementError):  # kernels before 4.3 have none
        _prctl(libc, "ambient capabilities", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _prctl(libc, "not dumpable", _PR_SET_DUMPABLE, 0)  # after the change of user, which resets the flag
    _restrict_by_landlock(libc)
    _set_limits()
    instructions = _build_filter(machine)
    array = (_Instruction * len(instructions))(*instructions)
    program = _Program(len(instructions), array)
    _prctl(libc, "seccomp", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def _machine() -> str:
    machine = platform.machine()
    if machine not in _AUDIT_ARCH or struct.calcsize("P") != 8 or not Path("/proc/self/task").exists():
        raise ConfinementError(f"there is no seccomp filter for {platform.system()} on {machine}")
    return machine


def _drop_root() -> None:
    """If started as root, become the user `nobody`. A container may forbid this; the other layers still apply then."""
    if os.geteuid() == 0:
        with suppress(PermissionError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _set_limits() -> None:
    for kind, limit in (
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, CPU_SECONDS),
    ):
        resource.setrlimit(kind, (limit, limit))


def _prctl(libc: ctypes.CDLL, layer: str, option: int, *arguments: int) -> None:
    values = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    if libc.prctl(ctypes.c_int(option), *values):
        raise ConfinementError(f"{layer}: {os.strerror(ctypes.get_errno())}")


def _restrict_by_landlock(libc: ctypes.CDLL) -> None:
    """Remove every right that Landlock can remove, if the kernel has Landlock."""
    version = _system_call(libc, _LANDLOCK_CREATE, 0, 0, _LANDLOCK_VERSION)
    if version < 1:
        return
    rights = max(count for since, count in _FILE_RIGHTS.items() if since <= version)
    fields = [(1 << rights) - 1]
    if version >= _NET_FROM:
        fields.append(0b11)
    if version >= _SCOPE_FROM:
        fields.append(0b11)
    attributes = ctypes.create_string_buffer(struct.pack(f"={len(fields)}Q", *fields), 8 * len(fields))
    ruleset = _system_call(libc, _LANDLOCK_CREATE, ctypes.addressof(attributes), 8 * len(fields), 0)
    if ruleset < 0:
        raise ConfinementError(f"Landlock: {os.strerror(ctypes.get_errno())}")
    try:
        if _system_call(libc, _LANDLOCK_RESTRICT, ruleset, 0):
            raise ConfinementError(f"Landlock: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(ruleset)


def _system_call(libc: ctypes.CDLL, number: int, *arguments: int) -> int:
    return int(libc.syscall(ctypes.c_long(number), *[ctypes.c_ulong(argument) for argument in arguments]))


def _build_filter(machine: str) -> list[_Instruction]:
    """Return the filter program: check of the machine, then each allowed call with its condition, then a refusal."""
    program = [
        _Instruction(_LOAD, 0, 0, _AT_MACHINE),
        _Instruction(_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        _Instruction(_RETURN, 0, 0, _KILL),
        _Instruction(_LOAD, 0, 0, _AT_NUMBER),
    ]
    for call in ALLOWED_CALLS.values():
        program += _build_rule(call, call.x86_64 if machine == "x86_64" else call.aarch64)
    return [*program, _Instruction(_RETURN, 0, 0, _REFUSE)]


def _build_rule(call: _Call, number: int) -> list[_Instruction]:
    allow, refuse = _Instruction(_RETURN, 0, 0, _ALLOW), _Instruction(_RETURN, 0, 0, _REFUSE)
    if call.argument is None:
        return [_Instruction(_JUMP_EQUAL, 0, 1, number), allow]
    # Only the low half of the argument: for the kernel, descriptors and protections are ints. The load replaces the
    # call's number, which is not needed again since every rule returns.
    load = _Instruction(_LOAD, 0, 0, 16 + 8 * call.argument)
    if call.equals is not None:
        return [
            _Instruction(_JUMP_EQUAL, 0, 4, number),
            load,
            _Instruction(_JUMP_EQUAL, 0, 1, call.equals),
            allow,
            refuse,
        ]
    assert call.without_bits is not None
    return [
        _Instruction(_JUMP_EQUAL, 0, 4, number),
        load,
        _Instruction(_JUMP_SET, 1, 0, call.without_bits),
        allow,
        refuse,
    ]
