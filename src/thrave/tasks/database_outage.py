"""Repeats work while the database is unavailable, or the lease is in doubt: nothing could be recorded then.

What must not wait so long, an instance that the task has switched off, is put right meanwhile.
"""

import time
from collections.abc import Callable
from itertools import chain, repeat
from typing import Protocol, TypeVar

import structlog

from thrave.tasks.errors import ErrorKind, TaskFailure, kind_of

PAUSES = (0.5, 1.0, 2.0, 5.0)  # seconds between two attempts; the last is repeated

log = structlog.get_logger()
_Result = TypeVar("_Result")


class OutageAction(Protocol):
    """What is done if the database stays unavailable: what must not wait for it."""

    @property
    def timeout(self) -> float:
        """Seconds from the first failure of the database."""

    def act(self) -> bool:
        """Do it, without the database. Called again and again; says whether the work must not be repeated now."""

    def record(self) -> TaskFailure:
        """Record that it was done, and give the failure that the work ends with. Raises if that cannot be recorded."""


class _NothingUrgent:
    """Nothing has to be done without the database."""

    timeout = float("inf")

    def act(self) -> bool:
        """Do nothing."""
        return False

    def record(self) -> TaskFailure:
        """Never called."""
        raise NotImplementedError


_NOTHING_URGENT = _NothingUrgent()


def retry_database(work: Callable[[], _Result], without_database: OutageAction = _NOTHING_URGENT) -> _Result:
    """Do something that can be repeated, again while the database is unavailable, for as long as that takes.

    Raises:
        TaskFailure: What `without_database` did means that the work must not be repeated.
        Exception: Whatever else `work` raises.
    """
    pauses = chain(PAUSES, repeat(PAUSES[-1]))
    first_failure, acted = float("inf"), False
    while True:
        started = time.monotonic()
        try:
            if not acted:
                return work()
            failure = without_database.record()
        except Exception as error:
            if kind_of(error) is not ErrorKind.UNRECORDABLE:
                raise
            now = time.monotonic()
            # An attempt longer than the timeout had reached the database: count from here again.
            first_failure = now if now - started > without_database.timeout else min(first_failure, now)
            log.warning("database unavailable, retrying", error=type(error).__name__)
            if now - first_failure >= without_database.timeout:
                acted = without_database.act() or acted
            time.sleep(next(pauses))
        else:
            raise failure
