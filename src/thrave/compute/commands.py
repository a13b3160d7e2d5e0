"""The commands by which an operator ties an instance to any hypervisor: run, waited for, understood.

A command is an argument vector; no shell ever sees it. It runs in a session of its own with the environment of this
process, LC_ALL=C so that its words are the ones we know, and the instance's id in THRAVE_INSTANCE_ID. Output goes to
unnamed files, of which only the end is read: a guest that a start command leaves behind may keep them open for ever.
"""

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, NamedTuple

from thrave.compute.errors import InstanceCommandFailed
from thrave.compute.instance import InstanceState

_TAIL = 4096  # bytes read of what a command printed

# What a stateCommand may print: EC2's states, and what `virsh domstate` says, libvirt's virsh-domain.c.
# Paused and suspended machines still have their disks open and count as running. A crashed one may have.
STATE_WORDS: dict[str, InstanceState] = {
    **{state.value: state for state in InstanceState},
    "idle": InstanceState.RUNNING,
    "paused": InstanceState.RUNNING,
    "pmsuspended": InstanceState.RUNNING,
    "in shutdown": InstanceState.STOPPING,
    "shut off": InstanceState.STOPPED,
}


class _Printed(NamedTuple):
    out: str
    last_error: str


class Command:
    """A command of an instance that has been started.

    Args:
        instance_id: The instance it is for.
        name: What the command is called in the instance's description: `stopCommand`, …
        argv: The argument vector.
        seconds: How long it may take.

    Raises:
        InstanceCommandFailed: It cannot be started.
    """

    def __init__(self, instance_id: str, name: str, argv: Sequence[str], *, seconds: float) -> None:
        self._instance_id = instance_id
        self._name = name
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._out: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the command has ended)
        self._err: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (as above)
        self._printed: _Printed | None = None
        self._lock = threading.Lock()
        environment = {**os.environ, "LC_ALL": "C", "THRAVE_INSTANCE_ID": instance_id}
        try:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._collect()
            raise self._failure(f"cannot be run: {argv[0]}: {os.strerror(error.errno or 0)}") from error

    def finish(self) -> str:
        """Wait for it, and give the end of what it printed.

        Raises:
            InstanceCommandFailed: It failed or took too long; in that case it and its children were killed.
        """
        while not self.is_done(self._seconds):
            pass
        return self._collect().out

    def is_done(self, patience: float = 0.0) -> bool:
        """Whether it has done its work, waiting at most `patience` seconds for it.

        Raises:
            InstanceCommandFailed: As `finish`.
        """
        left = max(self._deadline - time.monotonic(), 0.0)
        try:
            status = self._process.wait(min(patience, left))
        except subprocess.TimeoutExpired:
            if patience < left:
                return False
            self.kill()
            raise self._failure(f"took more than {self._seconds:.0f} seconds and was killed") from None
        if status:
            raise self._failure(f"ended with {status}: {self._collect().last_error}", status=status)
        self._collect()
        return True

    def kill(self) -> None:
        """End it and whatever it has started, if it has not ended by itself."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):  # another thread was quicker
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._collect()

    def _collect(self) -> _Printed:
        """What it printed, once it has ended; of several threads that ask, one reads and lets go of the files."""
        with self._lock:
            if self._printed is None:
                with self._out, self._err:
                    self._printed = _Printed(_tail(self._out), _last_line(self._err))
            return self._printed

    def _failure(self, reason: str, *, status: int | None = None) -> InstanceCommandFailed:
        return InstanceCommandFailed(self._instance_id, self._name, reason, status=status)


def asked_state(instance_id: str, argv: Sequence[str], *, seconds: float) -> InstanceState:
    """The state that an instance's stateCommand prints.

    Raises:
        InstanceCommandFailed: It failed, or printed a word that is not in STATE_WORDS.
    """
    words = Command(instance_id, "stateCommand", argv, seconds=seconds).finish().strip().lower()
    if words not in STATE_WORDS:
        raise InstanceCommandFailed(
            instance_id, "stateCommand", f"printed {words[:80]!r}, none of: {', '.join(STATE_WORDS)}", status=0
        )
    return STATE_WORDS[words]


def _tail(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(size - _TAIL, 0))
    return output.read(_TAIL).decode(errors="replace")


def _last_line(output: IO[bytes]) -> str:
    lines = _tail(output).strip().splitlines()
    return lines[-1] if lines else "it said nothing on stderr"
