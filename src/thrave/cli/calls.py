"""Calls that may hang, in threads of their own: given up when their time is over, or at once on Ctrl-C.

A thread that waits for a network cannot be ended, so it is left behind; it is a daemon, and goes with the process.
"""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING, TypeVar

from thrave.concurrency import Call

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_Answer = TypeVar("_Answer")

_GLANCE = 0.1  # seconds between two looks at whether Ctrl-C was pressed
_interrupted = threading.Event()


class CallGivenUpError(Exception):
    """A call took too long, or nobody waits for it any more."""


def give_up_on_interrupt() -> None:
    """From now on have Ctrl-C end every call that is waited for, besides what else it does."""

    def handle(number: int, frame: FrameType | None) -> None:
        _interrupted.set()
        signal.default_int_handler(number, frame)

    _interrupted.clear()
    if threading.current_thread() is threading.main_thread():  # only there Python lets a handler be set
        signal.signal(signal.SIGINT, handle)


def give_up() -> None:
    """End every call that is waited for, as Ctrl-C does."""
    _interrupted.set()


def check_interrupted() -> None:
    """Raise CallGivenUpError if Ctrl-C was pressed, or another signal ends the command."""
    if _interrupted.is_set():
        raise CallGivenUpError("interrupted")


def awaited(call: Callable[[], _Answer], seconds: float) -> _Answer:
    """Make a call, and wait for its answer no longer than that; whatever it raises comes out here.

    Raises:
        CallGivenUpError: It did not come in time, or Ctrl-C was pressed.
    """
    under_way = Call("folder-call", call)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        check_interrupted()
        if under_way.wait(_GLANCE):
            return under_way.result(0)
    raise CallGivenUpError(f"it took more than {seconds:g} seconds")
