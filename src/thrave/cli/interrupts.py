"""Calls that may hang, in threads of their own: given up when their time is over, or at once on Ctrl-C.

A thread that waits for a network cannot be ended, so it is left behind; it is a daemon, and goes with the process.

Signals that end a command: it cleans up first, as after Ctrl-C, and then ends by that signal.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from thrave.concurrency import Call, in_main_thread, monotonic, new_event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


_Answer = TypeVar("_Answer")


_GLANCE = 0.1  # seconds between two looks at whether Ctrl-C was pressed


_interrupted = new_event()


class CallGivenUpError(Exception):
    """A call took too long, or nobody waits for it any more."""


def give_up_on_interrupt() -> None:
    """From now on have Ctrl-C end every call that is waited for, besides what else it does."""

    def handle(number: int, frame: FrameType | None) -> None:
        _interrupted.set()
        signal.default_int_handler(number, frame)

    _interrupted.clear()
    if in_main_thread():  # only there Python lets a handler be set
        signal.signal(signal.SIGINT, handle)


def give_up() -> None:
    """End every call that is waited for, as Ctrl-C does."""
    _interrupted.set()


def check_interrupted() -> None:
    """Raise CallGivenUpError if Ctrl-C was pressed, or another signal ends the command."""
    if _interrupted.is_set():
        raise CallGivenUpError("interrupted")


def call_with_timeout(call: Callable[[], _Answer], seconds: float) -> _Answer:
    """Make a call, and wait for its answer no longer than that; whatever it raises comes out here.

    Raises:
        CallGivenUpError: It did not come in time, or Ctrl-C was pressed.
    """
    under_way = Call("folder-call", call)
    until = monotonic() + seconds
    while monotonic() < until:
        check_interrupted()
        if under_way.wait(_GLANCE):
            return under_way.result(0)
    raise CallGivenUpError(f"it took more than {seconds:g} seconds")


_ENDING = (signal.SIGTERM, signal.SIGHUP)


_Parameters = ParamSpec("_Parameters")


_Returned = TypeVar("_Returned")


class EndedBySignal(BaseException):
    """Raised in the main thread when the signal arrives, so that every `with` and `finally` on the way is run."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def cleans_up_on_signals(command: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
    """Have a command clean up on SIGTERM and SIGHUP, unless whoever started it ignores or handles them (nohup)."""

    @wraps(command)
    def wrapped(*arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Returned:
        with _handled():
            return command(*arguments, **options)

    return wrapped


@contextmanager
def _handled() -> Iterator[None]:
    if not in_main_thread():  # Python sets handlers only there
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        for each in handled:  # nothing interrupts the cleaning up
            signal.signal(each, signal.SIG_IGN)
        give_up()
        raise EndedBySignal(number)

    handled = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, handle)
    try:
        yield
    except EndedBySignal as ended:
        signal.signal(ended.number, signal.SIG_DFL)
        os.kill(os.getpid(), ended.number)
        raise
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
