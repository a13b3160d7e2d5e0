"""Starts other programs: the only module that does (ruff's rule TID251 holds this).

A program gets an argument vector, never a shell; a short list of environment variables, none of which is a secret; no
descriptor but the ones that are named; a session of its own; and a time limit, after which it is killed with everything
that it has started. What it prints goes to memory, up to a limit: a full disk does not stop a program from starting.
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
"""The variables of this process that a program gets, if they are set. Everything else is withheld."""

MAX_OUTPUT = 1 << 20
"""Bytes that a program may print, on stdout and on stderr each, unless it is given another limit."""

MAX_MEMORY = 4 << 30
"""Bytes of address space for a program that reads an image which somebody else made."""

ServerProcess: TypeAlias = subprocess.Popen[str]
"""A server that `start_server` has started."""

_POLL_INTERVAL = 0.2  # seconds between two checks of a program that runs
_KILL_TIMEOUT = 30.0  # seconds; a process that hangs in the kernel (a dead NFS server) cannot be killed
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_FIRST_LISTENER = 3  # sd_listen_fds(3)

# A launcher for socket activation: LISTEN_PID must be the id of the process itself, which only that process can state.
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
    """It could not be started: not found, no right to, no program, no process or memory to spare."""


class ProgramTimeoutError(ProgramError):
    """It ran for longer than it may, and was killed."""


class ProgramOutputError(ProgramError):
    """It printed more than it may, and was killed."""


class Finished(NamedTuple):
    """What a program has printed, and how it ended."""

    status: int
    """The exit status; negative: the signal that ended it."""
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        """Its stdout as text."""
        return self.out.decode(errors="replace")

    @property
    def error_text(self) -> str:
        """Its stderr as text."""
        return self.err.decode(errors="replace")


def environment(additions: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that a program gets: `INHERITED`, `LC_ALL=C` so that its messages can be read, and `additions`."""
    given = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {**given, "LC_ALL": "C", **(additions or {})}


class Program:
    """A program that has been started.

    Args:
        argv: The argument vector. The program is searched for in the PATH of `variables`.
        timeout: Seconds that it may run.
        variables: Its whole environment; `environment()` if not given.
        output: "kept": stdout and stderr are kept in memory. "piped": stdin and stdout are pipes to this process
            (`stdin`, `stdout`) and stderr is dropped. "none": all three are dropped.
        max_output: Bytes of stdout and of stderr that are kept. A program that prints more is killed.
        pass_fds: Descriptors that it gets, under the same numbers.
        listener: Descriptor of a listening socket, handed over as sd_listen_fds(3) describes. `pass_fds` must not
            contain 3.
        max_memory: Bytes of address space, with no core dump; None: no limits of its own. What it leaves running
            keeps the limits.

    Raises:
        ProgramNotStartedError: It cannot be started.
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
        self._finished: Finished | None = None
        self._lock = new_lock()  # of collecting
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
        """The pipe to a program whose output is "piped"."""
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """The pipe from a program whose output is "piped"."""
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def pid(self) -> int:
        """The id of its process, which is that of its session and group as well."""
        return self._process.pid

    @property
    def transferred(self) -> int | None:
        """A number that grows as it reads and writes; None if that cannot be told."""
        try:
            fields = Path(f"/proc/{self.pid}/io").read_text("ascii").split()
        except OSError:
            return None
        return sum(int(number) for number in fields[1:12:2])

    def signal(self, number: int) -> None:
        """Send a signal to its process alone, if that has not ended."""
        self._process.send_signal(number)

    def poll(self, timeout: float = 0.0) -> Finished | None:
        """Wait at most `timeout` seconds for its end. None: it still runs.

        Raises:
            ProgramTimeoutError: It has run for longer than it may; it and its children were killed.
            ProgramOutputError: It has printed more than it may; it and its children were killed.
        """
        end = min(monotonic() + timeout, self._deadline)
        while True:
            status = self._wait(max(min(end - monotonic(), _POLL_INTERVAL), 0.0))
            # Also after its end: the rest of an output that is too long must not be taken for the whole.
            if self._is_too_long():
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
        """Keep nothing of what it prints from now on: writing that fails for it, with EPERM."""
        with self._lock:
            for fd in self._kept:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)

    def kill(self) -> None:
        """End it and whatever it has started, if it has not ended by itself, and let go of what it printed."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):  # another thread was quicker
                os.killpg(self._process.pid, signal.SIGKILL)
        status = self._wait(_KILL_TIMEOUT)
        self._collect(-signal.SIGKILL if status is None else status)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # bytes that it did not wait for
                    pipe.close()

    def _wait(self, timeout: float) -> int | None:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def _is_too_long(self) -> bool:
        with self._lock:
            return any(os.fstat(fd).st_size > self._max_output for fd in self._kept)

    def _collect(self, status: int) -> Finished:
        """What it has printed; of several threads that ask, one reads and closes."""
        with self._lock:
            if self._finished is None:
                out, err = [self._read(fd) for fd in self._kept] or (b"", b"")
                self._close()
                self._finished = Finished(status, out, err)
            return self._finished

    def _read(self, fd: int) -> bytes:
        # What it leaves running may hold this file for ever: from now on it does not grow.
        with suppress(PermissionError):  # sealed before
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return os.pread(fd, self._max_output, 0)

    def _close(self) -> None:
        while self._kept:
            os.close(self._kept.pop())

    def _limit(self, max_memory: int) -> None:
        # Set from here, since code between fork and exec is not safe in a process with threads. It takes hold before
        # the program has read anything that it could need so much memory for.
        for what, limit in ((resource.RLIMIT_AS, max_memory), (resource.RLIMIT_CORE, 0)):
            with suppress(ProcessLookupError, PermissionError):  # it has ended already
                resource.prlimit(self._process.pid, what, (limit, limit))


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    variables: Mapping[str, str] | None = None,
    max_output: int = MAX_OUTPUT,
    pass_fds: Sequence[int] = (),
    max_memory: int | None = None,
    pause: Callable[[float], object] = lambda _seconds: None,
) -> Finished:
    """Run a program to its end.

    Args:
        argv: As for `Program`, like the others.
        timeout: Seconds.
        variables: Its whole environment; `environment()` if not given.
        max_output: Bytes.
        pass_fds: Descriptors that it gets.
        max_memory: Bytes.
        pause: Called again and again while it runs, with 0; may raise, which kills the program.

    Raises:
        ProgramError: It could not be started, or was killed because of a limit.
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


def start_server(argv: Sequence[str], variables: Mapping[str, str], *, stderr: int) -> ServerProcess:
    """Start a server of this package for a test, as its user would: it shares the session, and has no limits.

    Args:
        argv: The argument vector; what it prints on stdout is piped, as text.
        variables: Its whole environment.
        stderr: A descriptor for what it logs.
    """
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, text=True, env=dict(variables))


def restart(variables: Mapping[str, str]) -> Never:
    """Run this Python program again in the place of this process, with `variables` besides its environment."""
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **variables})  # noqa: S606
