"""The commands that connect an instance to a hypervisor of any kind: started, waited for, understood.

`programs` starts them. Beside what every program gets, a command has the variables in `INHERITED`, and the instance's
id in THRAVE_INSTANCE_ID. It has no setting of the service and no secret. What a start command leaves running (the
guest itself, perhaps) is not ended; its output is dropped once the command has ended.

Stop commands that run in the background, so that a request to stop returns at once.

One a machine at most: a request that is said again while the command of the last one still runs changes nothing. A
command that ends while nobody looks is seen at the next look. Those of a process that has died are not known any more:
the instance stays `stopping` until somebody asks it to stop again.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from thrave.compute.description_files import InstanceDescription
from thrave.compute.errors import InstanceCommandFailed
from thrave.compute.instance import InstanceState, OffReason
from thrave.concurrency import monotonic, new_lock
from thrave.programs import FinishedProgram, Program, ProgramError, ProgramNotStartedError, environment

INHERITED = ("LIBVIRT_DEFAULT_URI", "SSH_AUTH_SOCK")
"""What virsh and ssh need to find their way, beside `programs.INHERITED`."""


MAX_PRINTED = 16 << 20
"""Bytes that a command may print. More than anybody reads, so that a talkative command is no failure."""


_POLL_TIMEOUT = 3600.0  # seconds; the command's own limit ends the wait


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


# What may stand in parentheses behind a word for `stopped`: our words, and what `virsh domstate --reason` says.
OFF_WORDS: dict[str, OffReason] = {
    **{reason.value: reason for reason in OffReason},
    "shutdown": OffReason.SHUT_DOWN,
    "destroyed": OffReason.POWER_CUT,
    "failed": OffReason.UNKNOWN,
    "from snapshot": OffReason.SHUT_DOWN,
    "daemon": OffReason.LOST_POWER,
}


_WITH_REASON = re.compile(r"([a-z -]+?) \(([a-z -]+)\)")


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
        given = {each: os.environ[each] for each in INHERITED if each in os.environ}
        variables = environment({**given, "THRAVE_INSTANCE_ID": instance_id})
        try:
            self._program = Program(argv, timeout=seconds, variables=variables, max_output=MAX_PRINTED)
        except ProgramNotStartedError as error:
            # The whole path: two programs of the same name may be meant.
            raise self._failure(f"{error.reason.replace('run:', f'run: {argv[0]}:')}") from error

    def finish(self) -> str:
        """Wait for its end and return the end of its output.

        Raises:
            InstanceCommandFailed: It failed or took too long; in that case it and its children were killed.
        """
        while (finished := self._poll(_POLL_TIMEOUT)) is None:
            pass
        return finished.out[-_TAIL:].decode(errors="replace")

    def is_done(self, patience: float = 0.0) -> bool:
        """Whether it has ended without an error, after waiting at most `patience` seconds.

        Raises:
            InstanceCommandFailed: As `finish`.
        """
        return self._poll(patience) is not None

    def kill(self) -> None:
        """End it and whatever it has started, if it has not ended by itself."""
        self._program.kill()

    def _poll(self, timeout: float) -> FinishedProgram | None:
        try:
            finished = self._program.poll(timeout)
        except ProgramError as error:
            raise self._failure(error.reason) from error
        if finished is not None and finished.status:
            raise self._failure(f"ended with {finished.status}: {_last_line(finished.err)}", status=finished.status)
        return finished

    def _failure(self, reason: str, *, status: int | None = None) -> InstanceCommandFailed:
        return InstanceCommandFailed(self._instance_id, self._name, reason, status=status)


def read_state(instance_id: str, argv: Sequence[str], *, seconds: float) -> tuple[InstanceState, OffReason | None]:
    """The state that an instance's stateCommand prints, and, if it is off, why, if the command says so.

    A reason for another state is dropped, as virsh gives one for each: `running (booted)`.

    Raises:
        InstanceCommandFailed: It failed, or printed a word that is not in STATE_WORDS, or one for `stopped` with a
            reason that is not in OFF_WORDS.
    """
    began = monotonic()
    try:
        printed = Command(instance_id, "stateCommand", argv, seconds=seconds).finish().strip().lower()
    except InstanceCommandFailed as error:
        error.waited = monotonic() - began
        raise
    parts = _WITH_REASON.fullmatch(printed)
    words, reason = parts.groups() if parts else (printed, None)
    off = STATE_WORDS.get(words) is InstanceState.STOPPED
    if off and reason is not None and reason not in OFF_WORDS:
        raise InstanceCommandFailed(
            instance_id,
            "stateCommand",
            f"printed the reason {reason[:80]!r}, none of: {', '.join(OFF_WORDS)}",
            status=0,
        )
    if words not in STATE_WORDS:
        raise InstanceCommandFailed(
            instance_id, "stateCommand", f"printed {printed[:80]!r}, none of: {', '.join(STATE_WORDS)}", status=0
        )
    return STATE_WORDS[words], OFF_WORDS[reason] if off and reason is not None else None


def _last_line(err: bytes) -> str:
    lines = err[-_TAIL:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing on stderr"


PATIENCE = 0.5  # seconds to wait for a quick command, so that its failure is heard where it was asked for


@dataclass
class StopCommand:
    """A stopCommand that was started.

    Attributes:
        command: The command.
        asked: The instance as it was recorded when the command was asked for last. Its end changes that record only.
    """

    command: Command
    asked: InstanceDescription


class BackgroundStops:
    """The stop commands that this process has started.

    Args:
        seconds: How long one may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: dict[str, StopCommand] = {}
        self._lock = new_lock()

    def ask(self, description: InstanceDescription) -> None:
        """Start the instance's stopCommand, unless it is running already.

        Raises:
            InstanceCommandFailed: It cannot be run.
        """
        assert description.stop_command is not None
        instance_id = description.instance_id
        with self._lock:
            if (running := self._running.get(instance_id)) is not None:
                running.asked = description
                return
            command = Command(instance_id, "stopCommand", description.stop_command, seconds=self._seconds)
            self._running[instance_id] = StopCommand(command, description)

    def of(self, instance_id: str) -> StopCommand | None:
        """The instance's stopCommand whose end nobody has seen yet, if there is one."""
        with self._lock:
            return self._running.get(instance_id)

    def has_ended(self, stop: StopCommand, patience: float = 0.0) -> bool:
        """Whether a stopCommand has ended well since the last look; waits at most `patience` seconds for it.

        Raises:
            InstanceCommandFailed: It has failed or was killed because it took too long. Raised once.
        """
        try:
            return stop.command.is_done(patience) and self._forget(stop)
        except InstanceCommandFailed:
            if self._forget(stop):
                raise
            return False  # another thread has seen it fail, or has killed it

    def abandon(self, instance_id: str) -> None:
        """Kill the instance's stopCommand if it is still running."""
        with self._lock:
            stop = self._running.pop(instance_id, None)
        if stop is not None:
            stop.command.kill()

    def _forget(self, stop: StopCommand) -> bool:
        """Whether it was this call that took it out: of several threads that look at once, one reports the end."""
        instance_id = stop.asked.instance_id
        with self._lock:
            mine = self._running.get(instance_id) is stop
            if mine:
                del self._running[instance_id]
            return mine
