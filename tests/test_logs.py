"""Repeated log lines are counted, and values cannot control a terminal."""

import io
import logging
import subprocess
import sys

import pytest

from support.eventually import eventually
from thrave.logs import MAX_KINDS, MAX_VALUE, Limiter, printable


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def limiter():
    written = []
    clock = Clock()
    limiter = Limiter(lambda event, fields: written.append((event, fields)), interval=60, clock=clock)
    limiter.written, limiter.clock = written, clock
    yield limiter
    limiter.report()


def test_limiter_accepts_the_first_line_and_counts_others(limiter):
    assert [limiter.passes("event", (), "text") for _ in range(1000)] == [True] + [False] * 999
    limiter.clock.now = 61
    assert limiter.passes("event", (), "text")
    assert limiter.written == [("log line repeated", {"line": "text", "times": 999})]


def test_limiter_accepts_a_limited_number_of_kinds(limiter):
    passed = [limiter.passes("event", (("host", str(number)),), "text") for number in range(10 * MAX_KINDS)]
    assert sum(passed) == MAX_KINDS
    limiter.report()
    assert limiter.written == [("log line repeated", {"line": "text", "times": 9 * MAX_KINDS})]


def test_limiter_reports_the_fields_of_a_repeated_line(limiter):
    for _ in range(3):
        limiter.passes("event", (("instance_id", "i-1"),), "text")
    limiter.report()
    assert limiter.written == [("log line repeated", {"line": "text", "times": 2, "instance_id": "i-1"})]


def test_limiter_reports_without_a_further_line():
    written = io.StringIO()
    limiter = Limiter(lambda event, fields: written.write(f"{event} {fields['times']}"), interval=0.01)
    for _ in range(3):
        limiter.passes("event", (), "text")
    eventually(lambda: "log line repeated" in written.getvalue(), "the count")


@pytest.mark.parametrize("character", ["\x1b", "\n", "\r", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028"])
def test_printable_escapes_control_characters(character):
    assert character not in printable(f"a{character}b")
    assert printable("日本 é") == "日本 é"


SCRIPT = """
import logging, structlog
from thrave.logs import configure_logs
configure_logs({log_format!r})
log, hostile = structlog.get_logger(), chr(27) + "[31m" + chr(0x202e)
for number in range(200):
    log.warning("request refused", host=hostile, remote=number, reason="x" * 100000)
    logging.getLogger("uvicorn.error").warning("bad %d", number)
    try:
        raise ValueError(number)
    except ValueError:
        logging.getLogger("asyncio").error("trouble", exc_info=True)
for number in range(3):
    logging.getLogger("thrave.compute").warning("instance %d", number)
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_configure_logs_limits_every_logger_and_escapes_and_cuts_values(log_format):
    script = SCRIPT.format(log_format=log_format)
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr
    assert output.count("Traceback") == 1
    assert "times=199" in output or '"times": 199' in output
    assert [f"instance {number}" in output for number in range(3)] == [True] * 3
    assert "\x1b" not in output
    assert "\u202e" not in output
    assert len(output) < 10 * MAX_VALUE


def test_logging_is_unchanged_before_configure_logs():
    assert not logging.getLogger("thrave").handlers
