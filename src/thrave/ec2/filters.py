r"""Filters of the Describe… actions: `Filter.N.Name`, `Filter.N.Value.M`.

Values of one filter are alternatives, filters are conditions that must all hold, comparison is case-sensitive, `*`
stands for any number of characters, `?` for exactly one, and a backslash takes their meaning away (`\*amazon\?\\`). A
filter that nothing matches gives an empty answer and no error. Source: AWS, "Filtering your resources", EC2 API
Reference.

Which filters a record has is a table of its action's: filter name to a function that gives the record's values for it.
A name in the table that ends with a colon stands for all that begin with it, as `tag:` does; its function gives the
value for each name that may come behind the colon.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

from thrave.ec2.errors import EC2Error
from thrave.ec2.protocol import format_timestamp

Record = TypeVar("Record")

Filters: TypeAlias = Sequence[Mapping[str, Any]]
"""As the model has them: `[{"Name": "state", "Values": ["complete", "failed"]}, …]`."""

FilterTable: TypeAlias = Mapping[str, Callable[[Record], Iterable[str | None] | Mapping[str, str]]]
"""Filter name to the values that a record has for it; None is a value that the record lacks."""

MAX_VALUES = 200  # AWS's limit for one call
MAX_LENGTH = 1024  # characters of a value; S3's longest key is the longest thing that is compared

_TOKEN = re.compile(r"\\(.)|([*?])|(.)", re.DOTALL)


def select(records: Iterable[Record], filters: Filters, table: FilterTable[Record]) -> list[Record]:
    """Give the records that every filter lets through.

    Raises:
        EC2Error: MissingParameter (a filter without name or values), InvalidParameterValue (one that the table does
            not have, or a value too long to be anything's), FilterLimitExceeded.
    """
    _check(filters, table)
    return [record for record in records if all(_lets_through(each, record, table) for each in filters)]


def _check(filters: Filters, table: FilterTable[Record]) -> None:
    for number, each in enumerate(filters, 1):
        for member, wire_name in (("Name", "Name"), ("Values", "Value")):
            if not each.get(member):
                raise EC2Error("MissingParameter", name=f"Filter.{number}.{wire_name}")
        if _row(each["Name"]) not in table:
            raise EC2Error("InvalidParameterValue", f"The filter '{each['Name']}' is invalid")
    values = [value for each in filters for value in each["Values"]]
    if len(values) > MAX_VALUES:
        raise EC2Error("FilterLimitExceeded", limit=MAX_VALUES)
    if any(len(value) > MAX_LENGTH for value in values):
        raise EC2Error("InvalidParameterValue", f"A filter value is longer than {MAX_LENGTH} characters.")


def _row(name: str) -> str:
    """Give the name under which a filter stands in its table."""
    prefix, colon, _ = name.partition(":")
    return prefix + colon


def _lets_through(each: Mapping[str, Any], record: Record, table: FilterTable[Record]) -> bool:
    values = [value for value in _values(each["Name"], record, table) if value is not None]
    return any(matches(pattern, value) for pattern in each["Values"] for value in values)


def _values(name: str, record: Record, table: FilterTable[Record]) -> Iterable[str | None]:
    row = _row(name)
    found = table[row](record)
    return [found.get(name.removeprefix(row))] if isinstance(found, Mapping) else found


def matches(pattern: str, value: str) -> bool:
    """Say whether a value matches a pattern with wildcards."""
    return _compile(pattern).fullmatch(value) is not None


@lru_cache(maxsize=512)
def _compile(pattern: str) -> re.Pattern[str]:
    """Translate a pattern to a regular expression that never backtracks further than to its last `*`.

    What stands between two stars is found at its first place and never looked for again (an atomic group), so that a
    hostile `*a*a*a*…` costs no more than its length times the value's.
    """
    runs = [""]
    for escaped, wildcard, plain in _TOKEN.findall(pattern):
        if wildcard == "*":
            runs.append("")
        else:
            runs[-1] += "." if wildcard else re.escape(escaped or plain)
    first, *between = runs
    if not between:
        return re.compile(first, re.DOTALL)
    *between, last = between
    middle = "".join(f"(?>.*?{run})" for run in between)
    return re.compile(f"{first}{middle}.*{last}", re.DOTALL)


def instants(moment: datetime) -> tuple[str, ...]:
    """Give the texts by which a filter may name a moment: with milliseconds, and without if there are none."""
    text = format_timestamp(moment)
    short = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return (text, short) if text.endswith(".000Z") else (text,)
