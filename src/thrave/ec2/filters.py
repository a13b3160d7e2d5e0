r"""Filters of the Describe… actions: `Filter.N.Name`, `Filter.N.Value.M`.

Values of one filter are alternatives, filters are conditions that must all hold, comparison is case-sensitive, `*`
stands for any number of characters, `?` for exactly one, and a backslash takes their meaning away (`\*amazon\?\\`). A
filter that nothing matches gives an empty answer and no error. Source: AWS, "Filtering your resources", EC2 API
Reference.

Which filters a record has is a table of its action's: filter name to a function that gives the record's values for it.
A name in the table that ends with a colon stands for all that begin with it, as `tag:` does; its function gives the
value for each name that may come behind the colon.

Pages of a Describe… action: `MaxResults` and `NextToken`.

A token names the last record of the page before it, so that the service remembers nothing and a record that comes or
goes between two pages moves no other. Source: AWS, "Paginating results", EC2 API Reference; boto3 and the AWS CLI only
ever hand a token back.
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
"""As the model has them: `[{"Name": "state", "Values": ["complete", "failed"]}, …]`."""


FilterTable: TypeAlias = Mapping[str, Callable[[Record], Iterable[str | None] | Mapping[str, str]]]
"""Filter name to the values that a record has for it; None is a value that the record lacks."""


MAX_VALUES = 200  # AWS's limit for one call


MAX_LENGTH = 1024  # characters of a value; S3's longest key is the longest thing that is compared


MAX_CHARACTERS = 32 * 1024  # of all values of a call together


MAX_PATTERN_CHARACTERS = 4096  # of those values together that have wildcards


MAX_WILDCARDS = 400  # in all values together: two in each of 200, as in `*name*`


_CHARACTERS_PER_UNIT = 4096  # compared characters that cost as much as a small request, about 0.4 ms


_TOKEN = re.compile(r"\\(.)|([*?])|(.)", re.DOTALL)


def select(
    records: Iterable[Record],
    filters: Filters,
    table: FilterTable[Record],
    charge: Callable[[int], None] = lambda _units: None,
) -> list[Record]:
    """Return the records that every filter lets through.

    Args:
        records: What there is.
        filters: Of the request.
        table: Which filters there are.
        charge: Called with the cost of what has been compared, in small requests; may raise, to end it.

    Raises:
        EC2Error: MissingParameter (a filter without name or values), InvalidParameterValue (one that the table does
            not have, or a value too long to be anything's), FilterLimitExceeded.
    """
    _check(filters, table)
    conditions = [(each["Name"], Patterns(each["Values"])) for each in filters]
    chosen, compared = [], 0
    for record in records:
        for name, patterns in conditions:
            values = [value for value in _values(name, record, table) if value is not None]
            compared += sum(map(len, values))
            if not any(map(patterns.match, values)):
                break
        else:
            chosen.append(record)
        if compared >= _CHARACTERS_PER_UNIT:
            charge(compared // _CHARACTERS_PER_UNIT)
            compared %= _CHARACTERS_PER_UNIT
    return chosen


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
    patterns = [value for value in values if "*" in value or "?" in value]
    for what, found, limit in (
        ("characters", sum(map(len, values)), MAX_CHARACTERS),
        ("characters with wildcards", sum(map(len, patterns)), MAX_PATTERN_CHARACTERS),
        ("wildcards", sum(value.count("*") + value.count("?") for value in patterns), MAX_WILDCARDS),
    ):
        if found > limit:
            raise EC2Error("InvalidParameterValue", f"The filter values have {found} {what}; at most {limit} may be.")


def _row(name: str) -> str:
    """Give the name under which a filter stands in its table."""
    prefix, colon, _ = name.partition(":")
    return prefix + colon


def _values(name: str, record: Record, table: FilterTable[Record]) -> Iterable[str | None]:
    row = _row(name)
    found = table[row](record)
    return [found.get(name.removeprefix(row))] if isinstance(found, Mapping) else found


class Patterns:
    """The values of one filter, compared with a record's values all at once.

    Values without wildcards are looked up in a set. All others are one nondeterministic automaton, whose states are the
    bits of one integer: reading a character moves every state by one shift, whatever stands in the patterns. So the
    time is linear in the record's value, nothing is compiled, and nothing is kept.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._plain: set[str] = set()
        self._start = self._end = self._loops = self._any = 0
        self._enter: dict[str, int] = {}  # character to the states that it leads to
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
        """Say whether a value is matched by one of the patterns."""
        if value in self._plain:
            return True
        states, enter, any_character, loops = self._start, self._enter, self._any, self._loops
        for character in value:
            states = (states << 1) & enter.get(character, any_character) | states & loops
            if not states:
                return False
        return bool(states & self._end)


def instants(moment: datetime) -> tuple[str, ...]:
    """Give the texts by which a filter may name a moment: with milliseconds, and without if there are none."""
    text = format_timestamp(moment)
    short = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return (text, short) if text.endswith(".000Z") else (text,)


SMALLEST, LARGEST = 5, 1000


def page(
    records: Sequence[Record], parameters: Parameters, id_of: Callable[[Record], str]
) -> tuple[Sequence[Record], str | None]:
    """Cut the page out of the records that a request asks for.

    Args:
        records: In ascending order of their ids.
        parameters: With `MaxResults` and `NextToken`, or without.
        id_of: Gives a record's id, plain ASCII.

    Returns:
        The page, and the token of the next; None if this is the last.

    Raises:
        EC2Error: InvalidParameterValue (MaxResults out of 5 to 1000), InvalidPaginationToken.
    """
    size = parameters.get("MaxResults", LARGEST)
    if not SMALLEST <= size <= LARGEST:
        message = f"Value ({size}) for parameter MaxResults is invalid. It must be from {SMALLEST} to {LARGEST}."
        raise EC2Error("InvalidParameterValue", message)
    last_seen = _read_token(parameters.get("NextToken", ""))
    rest = [record for record in records if id_of(record) > last_seen]
    token = _write_token(id_of(rest[size - 1])) if len(rest) > size else None
    return rest[:size], token


def _write_token(last_id: str) -> str:
    return base64.urlsafe_b64encode(last_id.encode()).decode()


def _read_token(token: str) -> str:
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode("ascii")
    except ValueError:
        raise EC2Error("InvalidPaginationToken") from None
