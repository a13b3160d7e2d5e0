"""Records which functions of Thrave a service calls; see `measure_code.py --run`, which has the service import this.

Writes a line for each call of a function below MEASURE_SOURCE to the file MEASURE_OUTPUT: time in ns, thread, purpose,
file of the nearest caller in Thrave (`-` if there is none), file of the function. The purpose is `request` or `task`.
It is found in the stack, below which asyncio's event loop or a workflow of DBOS calls, else it is that of the thread:
a thread that is started, and a call that is submitted to a pool, have the purpose of the caller.
"""

import inspect
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import CodeType, FrameType
from typing import Any

OPTIMIZED = 1  # the flag CO_OPTIMIZED: set for functions, not for modules and classes, whose code runs at import

source = os.environ["MEASURE_SOURCE"] + "/"
output = os.open(os.environ["MEASURE_OUTPUT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
thread = threading.local()  # .purpose: of what runs in the thread now
start_thread, submit_call = threading.Thread.start, ThreadPoolExecutor.submit


def purpose_of_root(code: CodeType) -> str | None:
    """Purpose of all that this function calls; None if it has none of its own."""
    if code.co_name == "_run_once" and code.co_filename.endswith("asyncio/base_events.py"):
        return "request"
    if code.co_name.startswith("_execute_workflow") and code.co_filename.endswith("dbos/_core.py"):
        return "task"
    return None


def search_stack(frame: FrameType | None) -> tuple[str | None, str]:
    """Return the purpose of a frame, and the file of its nearest caller in Thrave.

    While a module of Thrave is imported, the purpose is None.
    """
    caller = "-"
    while frame is not None:
        code = frame.f_code
        purpose = purpose_of_root(code)
        if purpose is not None:
            return purpose, caller
        if code.co_filename.startswith(source):
            if not code.co_flags & OPTIMIZED:
                return None, caller
            if caller == "-":
                caller = code.co_filename.removeprefix(source)
        frame = frame.f_back
    return getattr(thread, "purpose", None), caller


def record(frame: FrameType, event: str, _argument: object) -> None:
    """Record a call; a profiling function."""
    code = frame.f_code
    if event != "call" or not code.co_filename.startswith(source) or not code.co_flags & OPTIMIZED:
        return
    purpose, caller = search_stack(frame.f_back)
    if purpose is not None:
        file = code.co_filename.removeprefix(source)
        fields = (time.monotonic_ns(), threading.get_ident(), purpose, caller, file)
        os.write(output, ("\t".join(map(str, fields)) + "\n").encode())


def with_purpose(function: Callable[..., Any], purpose: str | None) -> Callable[..., Any]:
    """Return the function so that it has this purpose in another thread."""

    def call(*arguments: object, **keywords: object) -> object:
        before = getattr(thread, "purpose", None)
        thread.purpose = purpose
        try:
            return function(*arguments, **keywords)
        finally:
            thread.purpose = before

    return call


def start(self: threading.Thread) -> None:
    """Replaces `Thread.start`."""
    purpose, _ = search_stack(inspect.currentframe())
    self.run = with_purpose(self.run, purpose)  # type: ignore[method-assign]
    start_thread(self)


def submit(
    pool: ThreadPoolExecutor, function: Callable[..., Any], /, *arguments: object, **keywords: object
) -> Future[Any]:
    """Replaces `ThreadPoolExecutor.submit`; the pool's thread may have been started for another purpose."""
    purpose, _ = search_stack(inspect.currentframe())
    return submit_call(pool, with_purpose(function, purpose), *arguments, **keywords)


threading.Thread.start = start  # type: ignore[method-assign]
ThreadPoolExecutor.submit = submit  # type: ignore[assignment,method-assign]
threading.setprofile(record)
sys.setprofile(record)
