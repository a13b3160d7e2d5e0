"""Commands from a test to the process of `ThraveService`, over its stdin and stdout. See `service_process`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from thrave.concurrency import Lock, new_lock
from thrave.programs import ServerProcess
from thrave.testing.server import ServerError

_ERRORS: Mapping[str, type[Exception]] = {"ValueError": ValueError, "TimeoutError": TimeoutError}


@dataclass
class CommandPipe:
    """Sends commands one after the other. Safe to use from several threads.

    Attributes:
        process: The process, with pipes as stdin and stdout.
        read_log: Returns the end of the log of the process.
    """

    process: ServerProcess
    read_log: Callable[[], str]
    _lock: Lock = field(default_factory=new_lock, repr=False)

    def send(self, command: str, *arguments: object) -> Any:  # noqa: ANN401 (as the command)
        """Send a command and return its result.

        Raises:
            ServerError: The process has ended, or the command failed unexpectedly.
            TimeoutError, ValueError: As the command.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self._lock:
            try:
                self.process.stdin.write(json.dumps([command, arguments]) + "\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except OSError:
                line = ""
        if not line:
            raise ServerError(f"The test service has ended: {self.read_log()}")
        answer = json.loads(line)
        if "error" in answer:
            kind, message = answer["error"]
            raise _ERRORS.get(kind, ServerError)(message)
        return answer["result"]
