"""Retries of a task's steps while the hypervisor, a resource of the machine, or the database is unavailable.

`retry_database` retries without a timeout, since no failure could be recorded. An instance that the task has switched
off must not wait so long: an `OutageAction` starts it in the meantime. Calls of the object store are retried by
`buckets/retrying_store.py`.
"""

from collections.abc import Callable
from itertools import chain, repeat
from typing import Protocol, TypeVar

import structlog

from thrave.buckets.errors import TransientError
from thrave.compute.errors import HoldLostError, HypervisorUnavailable, InstanceError
from thrave.concurrency import NoThreadError, monotonic, sleep
from thrave.retry import FailedAttempt, retry
from thrave.tasks.errors import ErrorKind, TaskFailure, kind_of

DATABASE_INTERVALS = (0.5, 1.0, 2.0, 5.0)  # seconds between two attempts; the last one is repeated
HYPERVISOR_INTERVAL = 1.0  # seconds
_MIN_PROGRESS = 10.0  # seconds; see `_is_progress`

log = structlog.get_logger()
_Result = TypeVar("_Result")


def retry_hypervisor(
    operation: Callable[[], _Result],
    timeout: float,
    *,
    sleep: Callable[[float], object] = sleep,
    clock: Callable[[], float] = monotonic,
    is_whole_step: bool = False,
) -> _Result:
    """Retry an operation while the hypervisor is unavailable, the instance is locked, or the machine lacks resources.

    Args:
        operation: Must be safe to repeat.
        timeout: Seconds that one outage may last. An attempt that reached the hypervisor ends the outage.
        sleep: Waits between two attempts; may raise, to cancel.
        clock: Seconds of a monotonic clock.
        is_whole_step: Whether a repetition reads the volume from its beginning: then a lost hold is retried as well.

    Raises:
        Exception: An error that does not pass (`errors.kind_of`), or the last one when the timeout has ended.
    """
    waited_before = 0.0

    def is_retryable(error: Exception) -> bool:
        # The store's calls have been retried for `s3_retry_timeout` already.
        if kind_of(error) is not ErrorKind.TRANSIENT or isinstance(error, TransientError):
            return False
        return is_whole_step or not isinstance(error, HoldLostError)

    def on_failure(failed: FailedAttempt) -> None:
        nonlocal waited_before
        if failed.restarts_timeout:
            waited_before = _waited(failed.error)
        if failed.wait is not None:
            log.warning("operation failed, retrying", error=str(failed.error))
        elif isinstance(failed.error, (InstanceError, NoThreadError)):
            # A retry around this one must not take this wait for progress.
            failed.error.waited = failed.elapsed + waited_before

    return retry(
        operation,
        on=is_retryable,
        timeout=timeout,
        interval=HYPERVISOR_INTERVAL,
        is_progress=lambda error, seconds: _is_progress(error, seconds, timeout),
        on_failure=on_failure,
        sleep=sleep,
        clock=clock,
    )


def _is_progress(error: Exception, seconds: float, timeout: float) -> bool:
    """Whether an attempt of so many seconds had reached the hypervisor before it failed.

    An operation that loses the hypervisor had a connection before. Any other error, such as a lock that another process
    holds, may follow a wait that was not measured. Then the attempt must have taken longer than any such wait.
    """
    is_connection_lost = isinstance(error, (HypervisorUnavailable, HoldLostError))
    least = min(_MIN_PROGRESS, timeout / 2) if is_connection_lost else timeout / 2
    return seconds - _waited(error) > least


def _waited(error: Exception) -> float:
    """Return the seconds of an attempt that were only a wait, by its error."""
    return error.waited if isinstance(error, (InstanceError, NoThreadError)) else 0.0


class OutageAction(Protocol):
    """What must be done without the database if it stays unavailable."""

    @property
    def timeout(self) -> float:
        """Seconds from the first failure of the database to the first call of `act`."""

    def act(self) -> bool:
        """Do what is urgent. Called again after each further failure.

        Returns:
            Whether the operation must not be repeated any more.
        """

    def record(self) -> TaskFailure:
        """Record what was done, and return the failure that the operation ends with. Raises if recording fails."""


class _NoAction:
    """Nothing is urgent."""

    timeout = float("inf")

    def act(self) -> bool:
        """Do nothing."""
        return False

    def record(self) -> TaskFailure:
        """Never called."""
        raise NotImplementedError


_NO_ACTION = _NoAction()


def retry_database(operation: Callable[[], _Result], outage_action: OutageAction = _NO_ACTION) -> _Result:
    """Retry an operation while the database is unavailable or the lease is in doubt, without a timeout.

    Args:
        operation: Must be safe to repeat.
        outage_action: What is done when the outage lasts longer than its timeout.

    Raises:
        TaskFailure: Because of what `outage_action` did, the operation must not be repeated.
        Exception: Any other error of `operation`.
    """
    must_not_repeat = False

    def attempt() -> _Result:
        if must_not_repeat:
            raise outage_action.record()
        return operation()

    def on_failure(failed: FailedAttempt) -> None:
        nonlocal must_not_repeat
        log.warning("database unavailable, retrying", error=type(failed.error).__name__)
        if failed.elapsed >= outage_action.timeout:
            must_not_repeat = outage_action.act() or must_not_repeat

    return retry(
        attempt,
        on=lambda error: kind_of(error) is ErrorKind.UNRECORDABLE,
        timeout=float("inf"),
        interval=chain(DATABASE_INTERVALS, repeat(DATABASE_INTERVALS[-1])),
        # A longer attempt had reached the database before it failed.
        is_progress=lambda _error, seconds: seconds > outage_action.timeout,
        on_failure=on_failure,
    )
