"""Ends, from another thread, what reading a volume has started or locked while a read of it hangs.

A read that a disk does not answer cannot be interrupted. What would keep the machine from being started meanwhile can
be: the locks on the image, and the programs that have it open. Descriptors stay open until the read returns, since
their numbers must not be given to other files before.
"""

import threading
from collections.abc import Callable


class Interruption:
    """What an open volume would be in the way with; nothing at first. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._actions: list[Callable[[], object]] = []
        self.is_requested = False
        """Whether nobody waits for the volume any more."""

    def add(self, action: Callable[[], object]) -> None:
        """Have something done when the interruption is requested; at once if it was."""
        with self._lock:
            if not self.is_requested:
                self._actions.append(action)
                return
        action()

    def request(self) -> None:
        """Do what was added, the last first. May be called again."""
        with self._lock:
            self.is_requested = True
            actions, self._actions = self._actions, []
        while actions:
            actions.pop()()
