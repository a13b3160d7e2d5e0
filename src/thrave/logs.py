"""Format and limit of log lines, of Thrave and of its libraries.

Tracebacks have no values of variables, which may be secrets. Characters that cannot be printed are escaped, since
clients choose some of the values. Of repeated lines the first is written, and then their number once a minute, so that
no client can fill the disk with log lines.
"""

import atexit
import logging
import sys
from collections.abc import Callable, Hashable, MutableMapping
from typing import Any

import structlog

from thrave.concurrency import monotonic, new_lock, start_later
from thrave.log_events import EVENTS

INTERVAL = 60.0  # seconds for which repeated lines are counted
MAX_KINDS = 50  # kinds of one event in an interval; further kinds are counted together
MAX_VALUE = 500  # characters of a value

# Two lines of one event are different if one of these fields is. Clients choose other fields, or these differ always.
_DISTINCT = (
    "where", "code", "host", "bundle_id", "instance_id", "bucket", "check", "job", "task", "what", "name", "pid",
)  # fmt: skip
_LONG = frozenset({"traceback", "exception"})


class Limiter:
    """Accepts the first line of a kind in each interval and counts further ones. Thread-safe.

    Args:
        write: Writes a line with the number of repetitions; receives event and fields.
        interval: Seconds for which lines are counted.
        clock: Monotonic time in seconds.
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
        self._seen: dict[Hashable, set[Hashable]] = {}  # event to its kinds in this interval
        self._repeated: dict[tuple[Hashable, Hashable], tuple[int, str]] = {}  # event and kind to number and text
        self._cancel_report: Callable[[], None] | None = None

    def passes(self, event: Hashable, kind: Hashable, text: str) -> bool:
        """Whether to write a line; if not, the line is counted.

        Args:
            event: The statement of the program that writes the line.
            kind: Distinguishes lines of this statement.
            text: Describes the line when the number of repetitions is written.
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
                self._cancel_report = start_later("repeated log lines", self._interval, self.report)
            return False

    def report(self) -> None:
        """Write how often each line was repeated, and start a new interval."""
        with self._lock:
            repeated, self._repeated = self._repeated, {}
            self._seen = {}
            self._since = self._clock()
            if self._cancel_report is not None:
                self._cancel_report()
                self._cancel_report = None
        for (_, kind), (count, text) in repeated.items():
            fields = dict(kind) if isinstance(kind, tuple) else {}
            self._write("log line repeated", {"line": text, "times": count, **fields})


def configure_logs(log_format: str) -> None:
    """Write log lines of Thrave and its libraries to stderr, as `text` or `json`, with the limit."""
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
        if event in EVENTS:  # no repetition; the rate limit of requests bounds their number
            return line
        kind = tuple((name, str(line[name])[:MAX_VALUE]) for name in _DISTINCT if name in line)
        if limiter.passes((method, event), kind, event):
            return line
        raise structlog.DropEvent

    return process


def _record_passes(limiter: Limiter, record: logging.LogRecord) -> bool:
    """Limit a line of the standard library's logging: by its statement, and by its message if Thrave logs it."""
    text = record.getMessage()[:MAX_VALUE]
    kind = (("message", text),) if record.name.startswith("thrave") else ()
    return limiter.passes((record.pathname, record.lineno), kind, f"{record.name}: {text}")


def _printable(_logger: object, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Escape characters that could control a terminal, and shorten long values."""
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
