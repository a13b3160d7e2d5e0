"""How an error is printed: one line on stderr for people, or one line of JSON with `--output json`.

The text begins with `thrave: ` and ends with what to do. Progress and log lines can come before it, so a program reads
the last line of stderr. docs/reference/json-output.md describes the document.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, NamedTuple

import click

from thrave.cli.exit_codes import Exit, exit_code, remedy_of, remedy_of_os_error
from thrave.cli.output import escape_json, printable_lines

if TYPE_CHECKING:
    from collections.abc import Sequence


class ErrorReport(NamedTuple):
    """An error as the user sees it."""

    exit_code: int
    message: str
    """What happened. Often also what to do."""
    remedy: str | None = None
    """What to do, if the message does not say it."""

    @property
    def text(self) -> str:
        """Message and remedy as sentences."""
        if self.remedy is None:
            return self.message
        end = "" if self.message.endswith((".", "?", "!", ":")) else "."
        return f"{self.message}{end} {self.remedy}"

    @property
    def document(self) -> dict[str, object]:
        """The error as JSON."""
        error = {
            "code": Exit(self.exit_code).name,
            "exitCode": int(self.exit_code),
            "message": self.message,
            "remedy": self.remedy,
        }
        return {"error": error}


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line has `--output json`. The command line may be wrong, so click cannot say it."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return any(pair == ("--output", "json") or pair[0] == "--output=json" for pair in pairs)


def print_error(report: ErrorReport, *, as_json: bool) -> None:
    """Print an error on stderr."""
    if as_json:
        click.echo(escape_json(json.dumps(report.document, ensure_ascii=False)), err=True)
    else:
        click.echo(f"thrave: {printable_lines(report.text)}", err=True)


def print_warning(text: str) -> None:
    """Print a warning on stderr, for a command that continues."""
    click.echo(f"thrave: warning: {printable_lines(text)}", err=True)


def describe(error: Exception) -> ErrorReport | None:
    """Describe an expected error; None for an unexpected one."""
    if isinstance(error, click.ClickException):
        return _describe_click_error(error)
    code = exit_code(error)
    if code is not None:
        return ErrorReport(code, str(error), remedy_of(error))
    return _describe_os_error(error) if isinstance(error, OSError) else None


def _describe_click_error(error: click.ClickException) -> ErrorReport:
    """A wrong command line: click's message and the command with the help. Other errors contain what to do."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    remedy = f"See `{context.command_path} --help`." if context else None
    return ErrorReport(error.exit_code, error.format_message(), remedy)


def _describe_os_error(error: OSError) -> ErrorReport | None:
    """Describe an error of the system; None if it does not name a file."""
    if error.errno is None:
        return None
    reason = os.strerror(error.errno)
    remedy = remedy_of_os_error(error)
    if error.filename is None:
        return ErrorReport(Exit.FAILED, reason, remedy) if remedy else None
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
    if isinstance(error, FileNotFoundError):
        return ErrorReport(Exit.NOT_FOUND, f"{name} does not exist", remedy)
    if isinstance(error, PermissionError):
        from thrave.files import user_name

        return ErrorReport(Exit.REFUSED, f"{name}: {reason.lower()} for user {user_name()}", remedy)
    return ErrorReport(Exit.FAILED, f"{name}: {reason.lower()}", remedy)
