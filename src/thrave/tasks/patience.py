"""Asks again for what cannot be had just now, but will be in a while.

A hypervisor's daemon is away while it is being started anew. An instance is held by an agent that has lost its host,
until that has noticed, or by whoever is just starting it. Whatever else is refused is not asked for again.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from thrave.buckets.errors import TransientError
from thrave.compute.errors import HoldLostError, HypervisorUnavailable, InstanceError
from thrave.concurrency import NoThreadError
from thrave.tasks.errors import ErrorKind, kind_of

AGAIN = 1.0  # seconds between two attempts
_SHORT = 10.0  # seconds; an attempt that took longer, less what it waited, and then lost the hypervisor had got through

log = structlog.get_logger()
_Answer = TypeVar("_Answer")


def retry_hypervisor(
    ask: Callable[[], _Answer],
    seconds: float,
    *,
    pause: Callable[[float], object] = time.sleep,
    whole_step: bool = False,
) -> _Answer:
    """Ask, and again while the hypervisor is gone, somebody else holds the instance, or the machine lacks resources.

    Args:
        ask: Asks; what it has done when it fails can be repeated.
        seconds: For how long one absence may last. An attempt that got through ends it.
        pause: Waits some seconds between two attempts; may raise, to end it all.
        whole_step: Whether a volume is read anew by asking again: then a hold that was lost is no reason to fail.

    Raises:
        Exception: What `ask` raises, at once or, if it may pass (`failures.kind_of`), after so many seconds.
    """
    gone_since, waited_before = None, 0.0
    while True:
        began = time.monotonic()
        try:
            return ask()
        except Exception as error:
            # Calls of the store have been repeated for `s3_retry_timeout` already.
            if kind_of(error) is not ErrorKind.TRANSIENT or isinstance(error, TransientError):
                raise
            if isinstance(error, HoldLostError) and not whole_step:
                raise
            now = time.monotonic()
            waited = error.waited if isinstance(error, (InstanceError, NoThreadError)) else 0.0
            if gone_since is None or now - began - waited > _least_progress(error, seconds):
                gone_since, waited_before = now, waited
            if now - gone_since >= seconds:
                if isinstance(error, (InstanceError, NoThreadError)):  # for whoever repeats this in turn
                    error.waited = now - gone_since + waited_before
                raise
            log.warning("it is tried again", reason=str(error))
            pause(AGAIN)


def _least_progress(error: Exception, seconds: float) -> float:
    """Seconds that an attempt must have taken, less what it waited, to end the absence.

    Who loses the hypervisor had it before. Any other error, such as a lock that somebody holds, may come after a wait
    that nobody measured: then the attempt must have taken longer than any such wait.
    """
    lost = isinstance(error, (HypervisorUnavailable, HoldLostError))
    return min(_SHORT, seconds / 2) if lost else seconds / 2
