"""QEMU's guest agent: checks that it responds, shuts the guest down, and runs a command in the guest.

The agent is a program inside the guest, so its responses are untrusted: hostile, late or missing. Every call has a
timeout, and of a response only its presence is used. Source: "QEMU Guest Agent Protocol Reference" (guest-ping,
guest-exec).
"""

import json
import logging
from collections.abc import Sequence

from thrave.compute.errors import InstanceCommandFailed
from thrave.compute.libvirt import binding
from thrave.compute.libvirt.binding import Domain, ShutdownFlag
from thrave.concurrency import new_lock, start_thread

PING_TIMEOUT = 2  # seconds
EXEC_TIMEOUT = 10  # seconds

log = logging.getLogger(__name__)


class GuestAgents:
    """The guest agents of a host."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._in_progress: set[str] = set()
        self._unresponsive: dict[str, int] = {}  # number of starts by UUID of the domain

    def request_stop(self, domain: Domain, starts: int) -> bool:
        """Request a shutdown by the guest's agent, and return whether the agent responds.

        libvirt waits up to a minute until the guest is off; another thread waits for that. Further calls in this time
        do nothing. An agent that does not respond, or refuses, is not used until the next start of the domain.

        Args:
            domain: A running domain whose agent has opened its channel.
            starts: Number of starts of the domain so far.
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
        start_thread(
            f"agent {uuid}",
            lambda: self._power_off(domain, uuid, starts),
            on_failure=lambda error: log.error("agent shutdown failed, domain %s", uuid, exc_info=error),
        )
        return True

    def _power_off(self, domain: Domain, uuid: str, starts: int) -> None:
        try:
            domain.shutdownFlags(ShutdownFlag.GUEST_AGENT)
        except binding.load().libvirtError as error:  # also if the guest was off before the agent could respond
            log.info("agent shutdown failed, domain %s: %s", uuid, error)
            self._mark_unresponsive(uuid, starts)
        finally:
            with self._lock:
                self._in_progress.discard(uuid)

    def _mark_unresponsive(self, uuid: str, starts: int) -> None:
        with self._lock:
            self._unresponsive[uuid] = starts


def run_command(domain: Domain, instance_id: str, command: Sequence[str]) -> None:
    """Start a command in a guest through its agent.

    Args:
        domain: A running domain.
        instance_id: For the errors.
        command: The program, with its path in the guest, and its arguments.

    Raises:
        InstanceCommandFailed: The agent does not respond, or cannot run the command.
    """
    arguments = {"path": command[0], "arg": list(command[1:]), "capture-output": False}
    try:
        response = _call(domain, EXEC_TIMEOUT, "guest-exec", arguments)
    except binding.load().libvirtError as error:
        raise InstanceCommandFailed(instance_id, command[0], f"cannot be run by the guest's agent: {error}") from error
    if not isinstance(response, dict) or not isinstance(response.get("pid"), int):
        raise InstanceCommandFailed(
            instance_id, command[0], "was not started: the guest's agent returned no process id"
        )


def _responds(domain: Domain) -> bool:
    try:
        return _call(domain, PING_TIMEOUT, "guest-ping") is not None
    except binding.load().libvirtError:
        return False


def _call(domain: Domain, timeout: int, command: str, arguments: object = None) -> object:
    """Call the agent; return None if the response is not valid. Raises libvirtError."""
    request = {"execute": command, **({} if arguments is None else {"arguments": arguments})}
    text = binding.load_qemu().qemuAgentCommand(domain, json.dumps(request), timeout, 0)
    try:
        response = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return response.get("return") if isinstance(response, dict) else None
