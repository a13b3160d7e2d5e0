"""Access keys that have just signed a request, so that a client's next one need not ask the database again.

A key is kept for less than a second, whatever it signs meanwhile: one that is deleted or made inactive in the database
stops working within a second, in every process. Only keys that have proved a signature are kept, and only so many:
a million unknown ones cost nothing here, and nobody learns from our haste whether a key exists.
"""

import threading
import time
from collections.abc import Callable

from thrave.identity.keys import AccessKey

LIFE = 0.9  # seconds; what is missing to one is for the thread that has read a key and is slow to remember it
LIMIT = 4096  # keys


class RecentKeys:
    """The keys of the last moment, in memory. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, limit: int = LIMIT) -> None:
        """Keep at most `limit` keys, by a clock of seconds."""
        self._clock = clock
        self._limit = limit
        self._kept: dict[str, tuple[float, AccessKey]] = {}  # with the time until which it is good; the oldest first
        self._lock = threading.Lock()

    def find(self, access_key_id: str) -> AccessKey | None:
        """The key, if it was first remembered within the last moment."""
        kept = self._kept.get(access_key_id)
        return kept[1] if kept and self._clock() < kept[0] else None

    def remember(self, key: AccessKey) -> None:
        """Keep a key that has signed a request, as the database has just given it."""
        if self.find(key.access_key_id):
            return
        with self._lock:
            self._kept.pop(key.access_key_id, None)
            if len(self._kept) >= self._limit:
                del self._kept[next(iter(self._kept))]
            self._kept[key.access_key_id] = (self._clock() + LIFE, key)
