"""The commands that connect an instance to a hypervisor of any kind: started, waited for, understood.

`programs` starts them. Beside what every program gets, a command has the variables in `INHERITED`, and the instance's
id in THRAVE_INSTANCE_ID. It has no setting of the service and no secret. What a start command leaves running (the
guest itself, perhaps) is not ended; its output is dropped once the command has ended.
"""

import os
import re
import time
from collections.abc import Sequence

from thrave.compute.errors import InstanceCommandFailed
from thrave.compute.instance import InstanceState, OffReason
from thrave.programs import Finished, Program, ProgramError, ProgramNotStartedError, environment

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

    def _poll(self, timeout: float) -> Finished | None:
        try:
            finished = self._program.poll(timeout)
        except ProgramError as error:
            raise self._failure(error.reason) from error
        if finished is not None and finished.status:
            raise self._failure(f"ended with {finished.status}: {_last_line(finished.err)}", status=finished.status)
        return finished

    def _failure(self, reason: str, *, status: int | None = None) -> InstanceCommandFailed:
        return InstanceCommandFailed(self._instance_id, self._name, reason, status=status)


def asked_state(instance_id: str, argv: Sequence[str], *, seconds: float) -> tuple[InstanceState, OffReason | None]:
    """The state that an instance's stateCommand prints, and, if it is off, why, if the command says so.

    A reason for another state is dropped, as virsh gives one for each: `running (booted)`.

    Raises:
        InstanceCommandFailed: It failed, or printed a word that is not in STATE_WORDS, or one for `stopped` with a
            reason that is not in OFF_WORDS.
    """
    began = time.monotonic()
    try:
        printed = Command(instance_id, "stateCommand", argv, seconds=seconds).finish().strip().lower()
    except InstanceCommandFailed as error:
        error.waited = time.monotonic() - began
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
