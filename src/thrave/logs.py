"""How log lines look, and how many of them there may be.

Tracebacks are written without the values of variables, since those may be secrets. What cannot be printed is escaped,
since strangers choose some of the values. Of lines that repeat, ours and the libraries' alike, the first is written,
and then a count each minute: no client, however fast, fills the disk with log lines.
"""

import atexit
import logging
import sys
from collections.abc import Callable, Hashable, MutableMapping
from typing import Any

import structlog

from thrave.concurrency import later, monotonic, new_lock

INTERVAL = 60.0  # seconds for which lines that repeat are counted
MAX_KINDS = 50  # kinds of one event in that time; then they are counted together
MAX_VALUE = 500  # characters of a value

# What tells two lines of one event apart. Other fields are chosen by strangers, or differ with every line.
_DISTINCT = (
    "where", "code", "host", "bundle_id", "instance_id", "bucket", "check", "job", "task", "what", "name", "pid",
)  # fmt: skip
_LONG = frozenset({"traceback", "exception"})


class Limiter:
    """Lets the first line of a kind pass, and counts those that follow. Safe to use from several threads.

    Args:
        write: Writes the line that says how often another one was repeated: its event, and fields.
        interval: Seconds for which lines are counted.
        clock: Seconds, from anywhere.
    """

    def __init__(
        self,
        write: Callable[[str, dict[str, object]], None],
        interval: float = INTERVAL,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._write = write
        self._interval = interval
        self._clock = clock
        self._lock = new_lock()
        self._since = clock()
        self._seen: dict[Hashable, set[Hashable]] = {}  # event to the kinds of it in this interval
        self._repeated: dict[tuple[Hashable, Hashable], tuple[int, str]] = {}  # kind to its count and its event's text
        self._cancel_report: Callable[[], None] | None = None

    def passes(self, event: Hashable, kind: Hashable, text: str) -> bool:
        """Say whether a line is to be written; if not, it is counted.

        Args:
            event: Which statement of the program writes it.
            kind: What tells it from other lines of that statement.
            text: What to call it in the line that says how often it was repeated.
        """
        if self._clock() - self._since >= self._interval:
            self.report()
        with self._lock:
            kinds = self._seen.setdefault(event, set())
            if kind not in kinds and len(kinds) < MAX_KINDS:
                kinds.add(kind)
                return True
            key = (event, kind if kind in kinds else None)
            self._repeated[key] = (self._repeated.get(key, (0, ""))[0] + 1, text)
            if self._cancel_report is None:
                self._cancel_report = later("repeated log lines", self._interval, self.report)
            return False

    def report(self) -> None:
        """Write how often each line was repeated, and begin to count anew."""
        with self._lock:
            repeated, self._repeated = self._repeated, {}
            self._seen = {}
            self._since = self._clock()
            if self._cancel_report is not None:
                self._cancel_report()
                self._cancel_report = None
        for (_, kind), (count, text) in repeated.items():
            about = dict(kind) if isinstance(kind, tuple) else {}
            self._write("log line repeated", {"line": text, "times": count, **about})


def configure_logs(log_format: str) -> None:
    """Write log lines to stderr as `text` or `json`, ours and the libraries' alike, each limited."""
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([structlog.processors.format_exc_info] if log_format == "json" else []),
        _printable,
    ]
    unlimited = structlog.wrap_logger(structlog.PrintLogger(sys.stderr), processors=[*shared, renderer])
    limiter = Limiter(lambda event, fields: unlimited.warning(event, **fields))
    atexit.register(limiter.report)
    structlog.configure(
        processors=[_limited_by(limiter), *shared, renderer],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    handler.addFilter(lambda record: _record_passes(limiter, record))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def _limited_by(limiter: Limiter) -> structlog.types.Processor:
    def process(_logger: object, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event = str(line.get("event"))
        kind = tuple((name, str(line[name])[:MAX_VALUE]) for name in _DISTINCT if name in line)
        if limiter.passes((method, event), kind, event):
            return line
        raise structlog.DropEvent

    return process


def _record_passes(limiter: Limiter, record: logging.LogRecord) -> bool:
    """Limit a line of the standard library's: by its statement, and if it is one of ours by what it says."""
    text = record.getMessage()[:MAX_VALUE]
    kind = (("message", text),) if record.name.startswith("thrave") else ()
    return limiter.passes((record.pathname, record.lineno), kind, f"{record.name}: {text}")


def _printable(_logger: object, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Escape what a terminal might obey, and shorten what a stranger has made long."""
    for name, value in line.items():
        if isinstance(value, str) and name not in _LONG:
            line[name] = printable(value if len(value) <= MAX_VALUE else f"{value[:MAX_VALUE]}…")
        elif isinstance(value, str):
            line[name] = "\n".join(map(printable, value.split("\n")))
    return line


def printable(text: str) -> str:
    """Escape control, bidirectional and other characters that cannot be printed."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
