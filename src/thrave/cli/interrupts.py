"""Timeouts and signals of the commands that work on bundles.

`call_with_timeout` makes a call that its caller can abandon. `clean_up_on_signals` lets a command clean up on SIGTERM
and SIGHUP; the process then ends by that signal, as a shell expects. Ctrl-C and these signals abandon every running
call.
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

_Result = TypeVar("_Result")
_Parameters = ParamSpec("_Parameters")

_POLL_INTERVAL = 0.1  # seconds between two checks for Ctrl-C
_END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

_interrupted = new_event()


class CallAbandonedError(Exception):
    """A call did not end within its timeout, or the command was interrupted."""


class EndedBySignal(BaseException):
    """Raised in the main thread when a signal arrives, so that each `with` and `finally` block cleans up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def abandon_calls_on_interrupt() -> None:
    """Let Ctrl-C abandon every running call, in addition to what Ctrl-C does by default."""

    def handle(number: int, frame: FrameType | None) -> None:
        _interrupted.set()
        signal.default_int_handler(number, frame)

    _interrupted.clear()
    if in_main_thread():  # Python sets handlers in this thread only
        signal.signal(signal.SIGINT, handle)


def check_interrupted() -> None:
    """Raise CallAbandonedError if Ctrl-C or another signal ends the command."""
    if _interrupted.is_set():
        raise CallAbandonedError("interrupted")


def call_with_timeout(call: Callable[[], _Result], timeout: float) -> _Result:
    """Make a call in its own thread and return its result; raise what the call raises.

    A thread that waits for the network cannot be stopped. After the timeout it runs on as a daemon, and ends with the
    process.

    Args:
        call: May hang.
        timeout: Seconds.

    Raises:
        CallAbandonedError: The timeout has passed, or the command was interrupted.
    """
    running = Call("folder-call", call)
    deadline = monotonic() + timeout
    while monotonic() < deadline:
        check_interrupted()
        if running.wait(_POLL_INTERVAL):
            return running.result(0)
    raise CallAbandonedError(f"no complete response within {timeout:g} seconds")


def clean_up_on_signals(command: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Let a command clean up on SIGTERM and SIGHUP. A signal that the parent process ignores stays ignored (nohup)."""

    @wraps(command)
    def with_clean_up(*arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        with _handle_signals():
            return command(*arguments, **options)

    return with_clean_up


@contextmanager
def _handle_signals() -> Iterator[None]:
    if not in_main_thread():  # Python sets handlers in this thread only
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        for each in handled:  # a second signal must not interrupt the clean-up
            signal.signal(each, signal.SIG_IGN)
        _interrupted.set()
        raise EndedBySignal(number)

    handled = [number for number in _END_SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
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
