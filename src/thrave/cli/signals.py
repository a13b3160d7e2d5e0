"""Signals that end a command: it cleans up first, as after Ctrl-C, and then ends by that signal."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from thrave.cli.calls import give_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

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
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers only there
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
