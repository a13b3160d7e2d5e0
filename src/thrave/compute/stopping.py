"""Stop commands that run in the background, so that a request to stop returns at once.

One a machine at most: a request that is said again while the command of the last one still runs changes nothing. A
command that ends while nobody looks is seen at the next look. Those of a process that has died are not known any more:
the instance stays `stopping` until somebody asks it to stop again.
"""

import threading
from dataclasses import dataclass

from thrave.compute.commands import Command
from thrave.compute.descriptions import Description
from thrave.compute.errors import InstanceCommandFailed

PATIENCE = 0.5  # seconds to wait for a quick command, so that its failure is heard where it was asked for


@dataclass
class StopCommand:
    """A stopCommand that was started.

    Attributes:
        command: The command.
        asked: The instance as it was recorded when the command was asked for last. Its end changes that record only.
    """

    command: Command
    asked: Description


class StopCommands:
    """The stop commands that this process has started.

    Args:
        seconds: How long one may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: dict[str, StopCommand] = {}
        self._lock = threading.Lock()

    def ask(self, description: Description) -> None:
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
