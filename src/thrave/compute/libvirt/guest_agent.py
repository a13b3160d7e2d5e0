"""QEMU's guest agent: asked whether it is there, to power the guest off, and to run a command in the guest.

It is a program inside the guest, so its answers are the guest's: hostile, late, or none. Every question has an end, and
nothing of an answer is kept but that there was one.

Source: "QEMU Guest Agent Protocol Reference" (guest-ping, guest-exec).
"""

import json
import logging
from collections.abc import Sequence

from thrave.compute.errors import InstanceCommandFailed
from thrave.compute.libvirt import binding
from thrave.compute.libvirt.binding import Domain, ShutdownFlag
from thrave.concurrency import new_lock, supervised

PING_SECONDS = 2
EXEC_SECONDS = 10

log = logging.getLogger(__name__)


class GuestAgents:
    """The agents of a host's guests."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._in_progress: set[str] = set()
        self._unresponsive: dict[str, int] = {}

    def request_stop(self, domain: Domain, starts: int) -> bool:
        """Have a guest's agent power it off, if it answers; whether it did.

        libvirt waits for the guest to go down, a minute at most, which is done in a thread. Asked again meanwhile it
        does nothing. An agent that does not answer, or refuses, is not asked again until the domain is started again.

        Args:
            domain: A running domain whose agent has opened its channel.
            starts: How often it was started, as far as is known.
        """
        uuid = domain.UUIDString()
        with self._lock:
            if uuid in self._in_progress:
                return True
            if self._unresponsive.get(uuid) == starts:
                return False
        if not _responds(domain):
            self._mark_unresponsive(uuid, starts)
            return False
        with self._lock:
            self._in_progress.add(uuid)
        supervised(
            f"agent {uuid}",
            lambda: self._power_off(domain, uuid, starts),
            on_failure=lambda error: log.error("the agent of the domain %s could not be asked", uuid, exc_info=error),
        )
        return True

    def _power_off(self, domain: Domain, uuid: str, starts: int) -> None:
        try:
            domain.shutdownFlags(ShutdownFlag.GUEST_AGENT)
        except binding.load().libvirtError as error:  # also if the guest was gone before the agent could answer
            log.info("the agent of the domain %s: %s", uuid, error)
            self._mark_unresponsive(uuid, starts)
        finally:
            with self._lock:
                self._in_progress.discard(uuid)

    def _mark_unresponsive(self, uuid: str, starts: int) -> None:
        with self._lock:
            self._unresponsive[uuid] = starts


def run_command(domain: Domain, instance_id: str, command: Sequence[str]) -> None:
    """Begin a command in a guest, by its agent.

    Args:
        domain: A running domain.
        instance_id: Its instance.
        command: The program, with its path in the guest, and its arguments.

    Raises:
        InstanceCommandFailed: The agent does not answer, or does not run it.
    """
    arguments = {"path": command[0], "arg": list(command[1:]), "capture-output": False}
    try:
        answer = _call(domain, EXEC_SECONDS, "guest-exec", arguments)
    except binding.load().libvirtError as error:
        raise InstanceCommandFailed(instance_id, command[0], f"cannot be run by the guest's agent: {error}") from error
    if not isinstance(answer, dict) or not isinstance(answer.get("pid"), int):
        raise InstanceCommandFailed(instance_id, command[0], "was answered by the guest's agent with no process")


def _responds(domain: Domain) -> bool:
    try:
        return _call(domain, PING_SECONDS, "guest-ping") is not None
    except binding.load().libvirtError:
        return False


def _call(domain: Domain, seconds: int, command: str, arguments: object = None) -> object:
    """What the agent returns; None if that cannot be understood. Raises libvirtError."""
    question = {"execute": command, **({} if arguments is None else {"arguments": arguments})}
    answer = binding.load_qemu().qemuAgentCommand(domain, json.dumps(question), seconds, 0)
    try:
        said = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return said.get("return") if isinstance(said, dict) else None
