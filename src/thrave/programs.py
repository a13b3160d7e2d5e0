"""Starts other programs. No other module does (ruff, TID251).

A program gets an argument vector and never a shell, a short list of environment variables without secrets, only the
named file descriptors, its own session, and a timeout, after which it is killed together with the programs that it has
started. Its output is kept in memory up to a limit, so that a full disk does not prevent a start.
"""

import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal, NamedTuple, Never, TypeAlias

from thrave.concurrency import monotonic, new_lock

INHERITED = ("HOME", "LOGNAME", "PATH", "TMPDIR", "TZ", "USER", "XDG_RUNTIME_DIR")
"""Environment variables of this process that a program gets, if they are set. It gets no others."""

MAX_OUTPUT = 1 << 20
"""Default limit of what a program may print, in bytes, on stdout and on stderr each."""

MAX_MEMORY = 4 << 30
"""Bytes of address space for a program that reads an untrusted image."""

ServerProcess: TypeAlias = subprocess.Popen[str]
"""A server started by `start_server`."""

_POLL_INTERVAL = 0.2  # seconds between two checks of a program that runs
_KILL_TIMEOUT = 30.0  # seconds; a process that hangs in the kernel (a dead NFS server) cannot be killed
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_FIRST_LISTENER = 3  # sd_listen_fds(3)

# A launcher for socket activation: LISTEN_PID must be the id of the process itself, which is known only after the fork.
_ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = "1"
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ProgramError(Exception):
    """A program did not run to its end."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}")
        self.name = name
        self.reason = reason


class ProgramNotStartedError(ProgramError):
    """The program could not be started: not found, no permission, not executable, or no process or memory left."""


class ProgramTimeoutError(ProgramError):
    """The program exceeded its timeout and was killed."""


class ProgramOutputError(ProgramError):
    """The program exceeded its output limit and was killed."""


class FinishedProgram(NamedTuple):
    """Exit status and output of a program that has ended."""

    status: int
    """Exit status; negative: the number of the signal that ended it."""
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        """Its stdout, decoded."""
        return self.out.decode(errors="replace")

    @property
    def error_text(self) -> str:
        """Its stderr, decoded."""
        return self.err.decode(errors="replace")


def environment(additions: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables of a program: `INHERITED`, `LC_ALL=C` (the drivers parse messages), and `additions`."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {**inherited, "LC_ALL": "C", **(additions or {})}


class Program:
    """A running program.

    Args:
        argv: The argument vector. The program is searched for in the PATH of `variables`.
        timeout: Seconds that it may run.
        variables: Its whole environment; by default `environment()`.
        output: "kept": stdout and stderr are kept in memory. "piped": stdin and stdout are pipes to this process
            (`stdin`, `stdout`) and stderr is dropped. "none": all three are dropped.
        max_output: Bytes of stdout and of stderr that are kept. A program that prints more is killed.
        pass_fds: File descriptors that it gets, with the same numbers.
        listener: File descriptor of a listening socket, passed as sd_listen_fds(3) describes. `pass_fds` must not
            contain 3.
        max_memory: Bytes of address space, and no core dump; None: the limits of this process. Programs that it starts
            have the same limits.

    Raises:
        ProgramNotStartedError: The program cannot be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        timeout: float,
        variables: Mapping[str, str] | None = None,
        output: Literal["kept", "piped", "none"] = "kept",
        max_output: int = MAX_OUTPUT,
        pass_fds: Sequence[int] = (),
        listener: int | None = None,
        max_memory: int | None = None,
    ) -> None:
        self.name = os.path.basename(argv[0])  # noqa: PTH119 (argv[0] is a word, not always a path)
        self._timeout = timeout
        self._deadline = monotonic() + timeout
        self._max_output = max_output
        self._finished: FinishedProgram | None = None
        self._lock = new_lock()  # for the output and `_finished`
        self._kept: list[int] = []
        fds = list(pass_fds)
        if listener is not None:
            assert _FIRST_LISTENER not in fds
            fds.append(listener)
            argv = [sys.executable, "-I", "-S", "-c", _ACTIVATE, str(listener), *argv]
        try:
            if output == "kept":
                self._kept = [os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for name in ("out", "err")]
            pipe = subprocess.PIPE if output == "piped" else subprocess.DEVNULL
            self._process = subprocess.Popen(
                argv,
                stdin=pipe,
                stdout=self._kept[0] if self._kept else pipe,
                stderr=self._kept[1] if self._kept else subprocess.DEVNULL,
                env=environment() if variables is None else dict(variables),
                start_new_session=True,
                pass_fds=fds,
            )
        except OSError as error:
            self._close()
            raise ProgramNotStartedError(self.name, f"cannot be run: {os.strerror(error.errno or 0)}") from error
        except ValueError as error:  # a NUL byte in the argument vector
            self._close()
            raise ProgramNotStartedError(self.name, f"cannot be run: {error}") from error
        if max_memory is not None:
            self._limit(max_memory)

    @property
    def stdin(self) -> IO[bytes]:
        """Pipe to the program, if its output is "piped"."""
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """Pipe from the program, if its output is "piped"."""
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its session and process group."""
        return self._process.pid

    @property
    def io_counter(self) -> int | None:
        """A number that grows while the program reads and writes; None if it is not available. Source: proc(5)."""
        try:
            fields = Path(f"/proc/{self.pid}/io").read_text("ascii").split()
        except OSError:
            return None
        return sum(int(number) for number in fields[1:12:2])

    def signal(self, number: int) -> None:
        """Send a signal to the process, not to its children. Does nothing if it has ended."""
        self._process.send_signal(number)

    def poll(self, timeout: float = 0.0) -> FinishedProgram | None:
        """Wait at most `timeout` seconds for the end of the program. None: it is still running.

        Raises:
            ProgramTimeoutError: It exceeded its timeout; it and its children were killed.
            ProgramOutputError: It exceeded its output limit; it and its children were killed.
        """
        end = min(monotonic() + timeout, self._deadline)
        while True:
            status = self._wait(max(min(end - monotonic(), _POLL_INTERVAL), 0.0))
            # Checked also after the end of the program: a cut output must not be used as if it were complete.
            if self._has_too_much_output():
                self.kill()
                raise ProgramOutputError(self.name, f"printed more than {self._max_output} bytes")
            if status is not None:
                return self._collect(status)
            now = monotonic()
            if now >= self._deadline:
                self.kill()
                raise ProgramTimeoutError(self.name, f"took more than {self._timeout:.0f} seconds and was killed")
            if now >= end:
                return None

    def drop_output(self) -> None:
        """Keep no more output. From now on the program gets EPERM when it writes."""
        with self._lock:
            for fd in self._kept:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)

    def kill(self) -> None:
        """Kill the program and its children, if it has not ended, and release its output. May be repeated."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):  # it has ended since
                os.killpg(self._process.pid, signal.SIGKILL)
        status = self._wait(_KILL_TIMEOUT)
        self._collect(-signal.SIGKILL if status is None else status)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # unsent bytes
                    pipe.close()

    def _wait(self, timeout: float) -> int | None:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def _has_too_much_output(self) -> bool:
        with self._lock:
            return any(os.fstat(fd).st_size > self._max_output for fd in self._kept)

    def _collect(self, status: int) -> FinishedProgram:
        """Return the result. If several threads call this, the first one reads and closes the output."""
        with self._lock:
            if self._finished is None:
                out, err = [self._read(fd) for fd in self._kept] or (b"", b"")
                self._close()
                self._finished = FinishedProgram(status, out, err)
            return self._finished

    def _read(self, fd: int) -> bytes:
        # Children that continue to run may keep this file open for ever: seal it, so that it does not grow.
        with suppress(PermissionError):  # sealed already
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return os.pread(fd, self._max_output, 0)

    def _close(self) -> None:
        while self._kept:
            os.close(self._kept.pop())

    def _limit(self, max_memory: int) -> None:
        # Set by this process, since code between fork and exec is not safe in a process with threads. The limit is in
        # force before the program has read any input that could need so much memory.
        for kind, limit in ((resource.RLIMIT_AS, max_memory), (resource.RLIMIT_CORE, 0)):
            with suppress(ProcessLookupError, PermissionError):  # it has ended
                resource.prlimit(self._process.pid, kind, (limit, limit))


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    variables: Mapping[str, str] | None = None,
    max_output: int = MAX_OUTPUT,
    pass_fds: Sequence[int] = (),
    max_memory: int | None = None,
    pause: Callable[[float], object] = lambda _seconds: None,
) -> FinishedProgram:
    """Run a program to its end.

    Args:
        argv: This and the next five as for `Program`.
        timeout: Seconds.
        variables: Its whole environment; by default `environment()`.
        max_output: Bytes.
        pass_fds: File descriptors that it gets.
        max_memory: Bytes.
        pause: Called repeatedly with 0 while the program runs; may raise, which kills the program.

    Raises:
        ProgramError: The program could not be started, or was killed because of a limit.
    """
    program = Program(
        argv, timeout=timeout, variables=variables, max_output=max_output, pass_fds=pass_fds, max_memory=max_memory
    )
    try:
        while (finished := program.poll(_POLL_INTERVAL)) is None:
            pause(0.0)
        return finished
    finally:
        program.kill()


def start_server(
    argv: Sequence[str], variables: Mapping[str, str], *, stderr: int, has_input: bool = False
) -> ServerProcess:
    """Start a server of this package for a test, as a user would: in this session, and without limits.

    Args:
        argv: The argument vector. Its stdout is a pipe to this process, as text.
        variables: Its whole environment.
        stderr: File descriptor for its log.
        has_input: Whether its stdin is a pipe from this process, instead of that of this process.
    """
    stdin = subprocess.PIPE if has_input else None
    return subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, text=True, env=dict(variables))


def restart(variables: Mapping[str, str]) -> Never:
    """Replace this process by the same Python program, with `variables` added to its environment."""
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **variables})  # noqa: S606
