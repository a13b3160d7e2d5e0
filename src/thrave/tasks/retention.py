"""Forgets tasks that ended long ago: their records, events and parts, and what the engine keeps of them.

A task stays as long as there is something to do about it: an instance to look after, an object to remove. The bundles
themselves are their owners' and never touched.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

from thrave.tasks.crash_points import durable
from thrave.tasks.records import Records

INTERVAL = 3600.0  # seconds between two looks
AT_ONCE = 500  # tasks in one transaction, so that nobody waits for long


class Retention:
    """How long what has ended is remembered."""

    def __init__(self, records: Records, forget: Callable[[datetime], int], keep: timedelta) -> None:
        """Remember for `keep` after the end; `forget` is the engine's, and says how many it has forgotten."""
        self._records = records
        self._forget = forget
        self._keep = keep

    def look(self) -> None:
        """Forget what is old enough."""
        while self._purge():
            pass
        before = self._records.now() - self._keep
        while self._forget(before):
            pass

    def _purge(self) -> int:
        with durable("task purged"):
            return self._records.purge(self._keep, most=AT_ONCE)
