"""What a command prints: text for people, or one JSON document for programs.

JSON goes to stdout with EC2's own words in camelCase (`accountId`, `instanceId`); keys are only ever added, so a reader
must ignore the ones it does not know. Nothing else is written to stdout: progress and errors go to stderr.

Names, tags, manifests and messages of libraries come from strangers. So every character that is not printable (control
characters, bidirectional overrides, lone surrogates) is escaped here, in text and in JSON.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

import click

Json = dict[str, object] | list[object]
_Command = TypeVar("_Command", bound=Callable[..., object])


def output_option(command: _Command) -> _Command:
    """Give a command `--output json|text`; its function receives `output`, handed on to `emit`."""
    return click.option(
        "--output", type=click.Choice(["text", "json"]), default="text", show_default=True,
        help="Text for people, or JSON for programs.",
    )(command)  # fmt: skip


def emit(output: str, document: Json, text: str, *, err: bool = False) -> None:
    """Print the answer of a command on stdout.

    Args:
        output: `json` or `text`, as given by `output_option`.
        document: The answer as JSON; datetimes are written as ISO 8601, paths as text.
        text: The same for people, without a final newline.
        err: On stderr instead, because stdout has what the command makes.
    """
    if output == "json":
        document_text = json.dumps(document, indent=2, default=_plain, ensure_ascii=False)
        click.echo(_escaped(document_text, _json_escape), err=err)
    else:
        click.echo(printable_lines(text), err=err)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Lay rows of words out in columns, as wide as their widest word."""
    header, *rows = (tuple(map(printable, row)) for row in [header, *rows])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def printable(text: str) -> str:
    """Text on one line, without what could make a terminal do something."""
    return printable_lines(text).replace("\n", "\\u000a")


def printable_lines(text: str) -> str:
    """The same for text of several lines."""
    return _escaped(text, lambda letter: f"\\u{ord(letter):04x}" if letter < "\U00010000" else f"\\U{ord(letter):08x}")


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    return "".join(letter if letter.isprintable() or letter == "\n" else escape(letter) for letter in text)


def _json_escape(letter: str) -> str:
    return json.dumps(letter)[1:-1] if letter != "\x7f" else "\\u007f"


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return str(value)
