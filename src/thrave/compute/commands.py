"""Runs the commands that connect an instance to a hypervisor, in the foreground (`Command`) or in the background.

`programs` starts them. A command gets the usual variables of a program, those in `INHERITED`, and the instance's id in
THRAVE_INSTANCE_ID; no setting of the service and no secret. Programs that a start command leaves running (the guest,
perhaps) are not killed; their output is dropped once the command has ended. Stop commands run in the background: a stop
request returns at once. If this process ends, the instance stays `stopping` until there is another stop request.
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
"""Variables that virsh and ssh need, in addition to `programs.INHERITED`."""

MAX_OUTPUT = 16 << 20
"""Bytes that a command may print. Only the end is used, so the limit is high: much output is not a failure."""

FIRST_WAIT = 0.5
"""Seconds to wait for a stop command, so that a failure of a quick one is raised at its caller."""

_POLL_TIMEOUT = 3600.0  # seconds; the command's own timeout ends the wait
_TAIL = 4096  # bytes used of a command's output

# What a stateCommand may print: EC2's states, and those of `virsh domstate` (libvirt's virsh-domain.c).
# Paused and suspended machines have their disks open and count as running. A crashed one may have: it is not accepted.
STATE_NAMES: dict[str, InstanceState] = {
    **{state.value: state for state in InstanceState},
    "idle": InstanceState.RUNNING,
    "paused": InstanceState.RUNNING,
    "pmsuspended": InstanceState.RUNNING,
    "in shutdown": InstanceState.STOPPING,
    "shut off": InstanceState.STOPPED,
}


# What may follow a name for `stopped`, in parentheses: our reasons, and those of `virsh domstate --reason`.
OFF_REASON_NAMES: dict[str, OffReason] = {
    **{reason.value: reason for reason in OffReason},
    "shutdown": OffReason.SHUT_DOWN,
    "destroyed": OffReason.POWER_CUT,
    "failed": OffReason.UNKNOWN,
    "from snapshot": OffReason.SHUT_DOWN,
    "daemon": OffReason.LOST_POWER,
}


_WITH_REASON = re.compile(r"([a-z -]+?) \(([a-z -]+)\)")


class Command:
    """A running command of an instance.

    Args:
        instance_id: The instance.
        name: The command's name in the instance's description: `stopCommand`, …
        argv: The argument vector.
        timeout: Seconds.

    Raises:
        InstanceCommandFailed: The command cannot be started.
    """

    def __init__(self, instance_id: str, name: str, argv: Sequence[str], *, timeout: float) -> None:
        self._instance_id = instance_id
        self._name = name
        inherited = {variable: os.environ[variable] for variable in INHERITED if variable in os.environ}
        variables = environment({**inherited, "THRAVE_INSTANCE_ID": instance_id})
        try:
            self._program = Program(argv, timeout=timeout, variables=variables, max_output=MAX_OUTPUT)
        except ProgramNotStartedError as error:
            # With the path as given: there may be two programs of the same name.
            raise self._failure(f"{error.reason.replace('run:', f'run: {argv[0]}:')}") from error

    def finish(self) -> str:
        """Wait for the end of the command and return the end of its output.

        Raises:
            InstanceCommandFailed: It failed, or exceeded its timeout and was killed with its children.
        """
        while (finished := self._poll(_POLL_TIMEOUT)) is None:
            pass
        return finished.out[-_TAIL:].decode(errors="replace")

    def has_succeeded(self, timeout: float = 0.0) -> bool:
        """Wait at most `timeout` seconds; return whether the command has ended without an error.

        Raises:
            InstanceCommandFailed: As `finish`.
        """
        return self._poll(timeout) is not None

    def kill(self) -> None:
        """Kill the command and its children if it has not ended."""
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


def read_state(instance_id: str, argv: Sequence[str], *, timeout: float) -> tuple[InstanceState, OffReason | None]:
    """Run an instance's stateCommand; return the state that it prints, and why the instance is off, if it prints that.

    The reason of another state is ignored; virsh has one for each state: `running (booted)`.

    Raises:
        InstanceCommandFailed: It failed, or printed a state that is not in `STATE_NAMES`, or `stopped` with a reason
            that is not in `OFF_REASON_NAMES`.
    """
    started = monotonic()
    try:
        printed = Command(instance_id, "stateCommand", argv, timeout=timeout).finish().strip().lower()
    except InstanceCommandFailed as error:
        error.waited = monotonic() - started
        raise
    parts = _WITH_REASON.fullmatch(printed)
    name, reason = parts.groups() if parts else (printed, None)
    is_off = STATE_NAMES.get(name) is InstanceState.STOPPED
    if is_off and reason is not None and reason not in OFF_REASON_NAMES:
        raise InstanceCommandFailed(
            instance_id,
            "stateCommand",
            f"printed the reason {reason[:80]!r}, none of: {', '.join(OFF_REASON_NAMES)}",
            status=0,
        )
    if name not in STATE_NAMES:
        raise InstanceCommandFailed(
            instance_id, "stateCommand", f"printed {printed[:80]!r}, none of: {', '.join(STATE_NAMES)}", status=0
        )
    return STATE_NAMES[name], OFF_REASON_NAMES[reason] if is_off and reason is not None else None


def _last_line(err: bytes) -> str:
    lines = err[-_TAIL:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing on stderr"


@dataclass
class StopCommand:
    """A stopCommand that was started.

    Attributes:
        command: The command.
        recorded: The instance as recorded in its file at the last stop request. The end of the command changes the file
            only if it still has this content.
    """

    command: Command
    recorded: InstanceDescription


class BackgroundStops:
    """The stopCommands that this process has started, at most one for each instance.

    Args:
        timeout: Seconds for one command.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._running: dict[str, StopCommand] = {}
        self._lock = new_lock()

    def start(self, description: InstanceDescription) -> None:
        """Start the instance's stopCommand, unless it is running already.

        Raises:
            InstanceCommandFailed: It cannot be started.
        """
        assert description.stop_command is not None
        instance_id = description.instance_id
        with self._lock:
            if (running := self._running.get(instance_id)) is not None:
                running.recorded = description
                return
            command = Command(instance_id, "stopCommand", description.stop_command, timeout=self._timeout)
            self._running[instance_id] = StopCommand(command, description)

    def find(self, instance_id: str) -> StopCommand | None:
        """Return the instance's stopCommand, if it is running or `has_ended` has not returned its end yet."""
        with self._lock:
            return self._running.get(instance_id)

    def has_ended(self, stop: StopCommand, timeout: float = 0.0) -> bool:
        """Wait at most `timeout` seconds; return whether the command has ended without an error. True only once.

        Raises:
            InstanceCommandFailed: It has failed, or exceeded its timeout and was killed. Raised only once.
        """
        try:
            return stop.command.has_succeeded(timeout) and self._forget(stop)
        except InstanceCommandFailed:
            if self._forget(stop):
                raise
            return False  # another thread has received the failure, or has killed the command

    def abandon(self, instance_id: str) -> None:
        """Kill the instance's stopCommand if it is still running."""
        with self._lock:
            stop = self._running.pop(instance_id, None)
        if stop is not None:
            stop.command.kill()

    def _forget(self, stop: StopCommand) -> bool:
        """Remove a stopCommand; return False if another thread has done so. Thus only one thread handles the end."""
        instance_id = stop.recorded.instance_id
        with self._lock:
            is_present = self._running.get(instance_id) is stop
            if is_present:
                del self._running[instance_id]
            return is_present
