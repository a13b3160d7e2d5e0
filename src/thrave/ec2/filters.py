r"""Filters and pagination of the Describe… actions: `Filter.N.Name`, `Filter.N.Value.M`, `MaxResults`, `NextToken`.

A record must match every filter, and one value of each. Comparison is case-sensitive; `*` matches any number of
characters, `?` exactly one, and a backslash escapes both (`\*amazon\?\\`). No match is an empty result, not an error.
Each action has its own table of filters. Sources: AWS, "Filtering your resources" and "Paginating results", EC2 API
Reference.
"""

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias, TypeVar

from thrave.ec2.errors import EC2Error
from thrave.ec2.protocol import Parameters, format_timestamp

Record = TypeVar("Record")

Filters: TypeAlias = Sequence[Mapping[str, Any]]
"""Filters in the form of the model: `[{"Name": "state", "Values": ["complete", "failed"]}, …]`."""

FilterTable: TypeAlias = Mapping[str, Callable[[Record], Iterable[str | None] | Mapping[str, str]]]
"""Filter name to a function that returns a record's values for it; None if the record has no such value.

A name that ends with a colon stands for all names that start with it, such as `tag:`. Its function returns a mapping
from the text after the colon to the value.
"""

MAX_VALUES = 200  # AWS's limit for one call
MAX_LENGTH = 1024  # characters of a value; the longest compared text is an S3 key
MAX_CHARACTERS = 32 * 1024  # of all values of a call together
MAX_PATTERN_CHARACTERS = 4096  # of all values with wildcards together
MAX_WILDCARDS = 400  # in all values together: two in each of 200, as in `*name*`

MIN_PAGE_SIZE, MAX_PAGE_SIZE = 5, 1000

_CHARACTERS_PER_UNIT = 4096  # compared characters that cost as much as a small request, about 0.4 ms


_TOKEN = re.compile(r"\\(.)|([*?])|(.)", re.DOTALL)


def select(
    records: Iterable[Record],
    filters: Filters,
    table: FilterTable[Record],
    charge: Callable[[int], None] = lambda _units: None,
) -> list[Record]:
    """Return the records that match every filter.

    Args:
        records: All records.
        filters: The filters of the request.
        table: The filters that these records have.
        charge: Called with the cost of the comparisons, in small requests; may raise, to stop them.

    Raises:
        EC2Error: MissingParameter (a filter without name or values), InvalidParameterValue (a filter that is not in the
            table, or values that are too long), FilterLimitExceeded.
    """
    _check_filters(filters, table)
    conditions = [(each["Name"], FilterPatterns(each["Values"])) for each in filters]
    selected, compared = [], 0
    for record in records:
        for name, patterns in conditions:
            values = [value for value in _find_values(name, record, table) if value is not None]
            compared += sum(map(len, values))
            if not any(map(patterns.match, values)):
                break
        else:
            selected.append(record)
        if compared >= _CHARACTERS_PER_UNIT:
            charge(compared // _CHARACTERS_PER_UNIT)
            compared %= _CHARACTERS_PER_UNIT
    return selected


def _check_filters(filters: Filters, table: FilterTable[Record]) -> None:
    for number, each in enumerate(filters, 1):
        for member, wire_name in (("Name", "Name"), ("Values", "Value")):
            if not each.get(member):
                raise EC2Error("MissingParameter", name=f"Filter.{number}.{wire_name}")
        if _table_name(each["Name"]) not in table:
            raise EC2Error("InvalidParameterValue", f"The filter '{each['Name']}' is invalid")
    values = [value for each in filters for value in each["Values"]]
    if len(values) > MAX_VALUES:
        raise EC2Error("FilterLimitExceeded", limit=MAX_VALUES)
    if any(len(value) > MAX_LENGTH for value in values):
        raise EC2Error("InvalidParameterValue", f"A filter value is longer than {MAX_LENGTH} characters.")
    patterns = [value for value in values if "*" in value or "?" in value]
    for unit, count, limit in (
        ("characters", sum(map(len, values)), MAX_CHARACTERS),
        ("characters with wildcards", sum(map(len, patterns)), MAX_PATTERN_CHARACTERS),
        ("wildcards", sum(value.count("*") + value.count("?") for value in patterns), MAX_WILDCARDS),
    ):
        if count > limit:
            raise EC2Error("InvalidParameterValue", f"The filter values have {count} {unit}. The maximum is {limit}.")


def _table_name(name: str) -> str:
    """Return a filter's name in its table: `tag:` for `tag:Name`."""
    prefix, colon, _ = name.partition(":")
    return prefix + colon


def _find_values(name: str, record: Record, table: FilterTable[Record]) -> Iterable[str | None]:
    table_name = _table_name(name)
    values = table[table_name](record)
    return [values.get(name.removeprefix(table_name))] if isinstance(values, Mapping) else values


class FilterPatterns:
    """The values of one filter, all compared at once with a value of a record.

    Values without wildcards are in a set. All others form one nondeterministic automaton, whose states are the bits of
    one integer: each character of the record's value moves all states with one shift. So the time is linear in the
    length of the record's value for any pattern, and no regular expression is compiled or cached.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._plain: set[str] = set()
        self._start = self._end = self._loops = self._any = 0
        self._enter: dict[str, int] = {}  # character to the states that follow it
        self._states = 0
        for pattern in patterns:
            tokens = [(wildcard, escaped or plain) for escaped, wildcard, plain in _TOKEN.findall(pattern)]
            if any(wildcard for wildcard, _ in tokens):
                self._add(tokens)
            else:
                self._plain.add("".join(character for _, character in tokens))
        self._enter = {character: states | self._any for character, states in self._enter.items()}

    def _add(self, tokens: Sequence[tuple[str, str]]) -> None:
        state = 1 << self._states
        self._start |= state
        for wildcard, character in tokens:
            if wildcard == "*":
                self._loops |= state
                continue
            state <<= 1
            if wildcard:
                self._any |= state
            else:
                self._enter[character] = self._enter.get(character, 0) | state
        self._end |= state
        self._states = state.bit_length()

    def match(self, value: str) -> bool:
        """Return whether one of the patterns matches a value."""
        if value in self._plain:
            return True
        states, enter, any_character, loops = self._start, self._enter, self._any, self._loops
        for character in value:
            states = (states << 1) & enter.get(character, any_character) | states & loops
            if not states:
                return False
        return bool(states & self._end)


def format_instant(time: datetime) -> tuple[str, ...]:
    """Return the texts of a time in filters: with milliseconds, and also without them if they are zero."""
    text = format_timestamp(time)
    short = time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return (text, short) if text.endswith(".000Z") else (text,)


def page(
    records: Sequence[Record], parameters: Parameters, id_of: Callable[[Record], str]
) -> tuple[Sequence[Record], str | None]:
    """Return the requested page of the records.

    A token contains the id of the previous page's last record. So the service stores nothing, and a record that is
    added or removed between two pages does not shift the others. boto3 and the AWS CLI only send a token back.

    Args:
        records: Records in ascending order of their ids.
        parameters: May have `MaxResults` and `NextToken`.
        id_of: Returns a record's id, plain ASCII.

    Returns:
        The page, and the token of the next page; None if this is the last.

    Raises:
        EC2Error: InvalidParameterValue (MaxResults is not from 5 to 1000), InvalidPaginationToken.
    """
    size = parameters.get("MaxResults", MAX_PAGE_SIZE)
    if not MIN_PAGE_SIZE <= size <= MAX_PAGE_SIZE:
        message = (
            f"Value ({size}) for parameter MaxResults is invalid. It must be from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}."
        )
        raise EC2Error("InvalidParameterValue", message)
    try:
        last_id = base64.b64decode(parameters.get("NextToken", "").encode(), altchars=b"-_", validate=True).decode(
            "ascii"
        )
    except ValueError:
        raise EC2Error("InvalidPaginationToken") from None
    remaining = [record for record in records if id_of(record) > last_id]
    if len(remaining) <= size:
        return remaining, None
    return remaining[:size], base64.urlsafe_b64encode(id_of(remaining[size - 1]).encode()).decode()
