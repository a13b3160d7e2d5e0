"""Asks a hypervisor again that is away for a while, as its daemon is while it is being started anew.

What it refuses it is not asked again: only a connection that is gone may come back.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from thrave.compute.errors import HypervisorGoneError

AGAIN = 1.0  # seconds between two attempts

log = structlog.get_logger()
_Answer = TypeVar("_Answer")


def patiently(ask: Callable[[], _Answer], seconds: float, *, pause: Callable[[float], object] = time.sleep) -> _Answer:
    """Ask, and again while the hypervisor is gone.

    Args:
        ask: Asks it; what it has done when it fails can be repeated.
        seconds: For how long the hypervisor may be gone. An attempt that took longer than that had found it.
        pause: Waits some seconds between two attempts; may raise, to end it all.

    Raises:
        HypervisorGoneError: It is gone for longer.
        Exception: Whatever else `ask` raises.
    """
    gone_since = float("inf")
    while True:
        began = time.monotonic()
        try:
            return ask()
        except HypervisorGoneError as error:
            now = time.monotonic()
            gone_since = now if now - began > seconds else min(gone_since, now)
            if now - gone_since >= seconds:
                raise
            log.warning("the hypervisor is gone; it is asked again", reason=str(error))
            pause(AGAIN)
