"""Filter.N: wildcards, and a cost that is linear and charged."""

import re
import sys
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrave.ec2.errors import EC2Error
from thrave.ec2.filters import (
    MAX_CHARACTERS,
    MAX_LENGTH,
    MAX_VALUES,
    MAX_WILDCARDS,
    FilterPatterns,
    format_instant,
    select,
)

TABLE = {
    "name": lambda record: [record],
    "letters": lambda record: [*record, None],
    "first:": lambda record: {record[0]: record},
}


@pytest.mark.parametrize(
    ("pattern", "value", "expected"),
    [
        ("complete", "complete", True),
        ("complete", "Complete", False),
        ("complete", "completed", False),
        ("", "", True),
        ("", "x", False),
        ("*", "", True),
        ("*", "a\nb", True),
        ("?", "", False),
        ("?", "a", True),
        ("?", "\n", True),
        ("??", "a", False),
        ("a*", "abc", True),
        ("*c", "abc", True),
        ("a*c", "abcbc", True),
        ("a*b*c", "a__b__c", True),
        ("a*b*c", "a__c__b", False),
        ("*a*a*", "a", False),
        ("*a?b*", "xxacbxx", True),
        ("a**b", "ab", True),
        ("*ab", "aab", True),
        ("a*ab", "ab", False),
        (r"\*amazon\?\\", "*amazon?\\", True),
        (r"\*", "x", False),
        (r"\?", "x", False),
        (r"\a", "a", True),
        ("x\\", "x\\", True),
        ("[ab]", "a", False),
        ("a.c", "abc", False),
        ("(?i)A", "a", False),
        ("日*", "日本", True),
    ],
)
def test_filter_wildcards_match_unless_escaped(pattern, value, expected):
    assert FilterPatterns([pattern]).match(value) is expected
    assert FilterPatterns(["no such value", "*and no ?uch*", pattern, "or th?s"]).match(value) is expected


@given(st.lists(st.text("ab*?\\", max_size=8), max_size=4), st.text("ab*?\\", max_size=8))
def test_filter_patterns_match_like_regular_expressions(patterns, value):
    def regex(pattern):
        tokens = re.findall(r"\\(.)|([*?])|(.)", pattern, re.DOTALL)
        parts = [{"*": ".*", "?": "."}[wildcard] if wildcard else re.escape(escaped or plain)
                 for escaped, wildcard, plain in tokens]  # fmt: skip
        return "".join(parts)

    expected = any(re.fullmatch(regex(pattern), value, re.DOTALL) for pattern in patterns)
    assert FilterPatterns(patterns).match(value) is expected


def cost(patterns, value):
    """Lines of Python that comparing takes: a count, and no time."""
    lines, made = 0, FilterPatterns(patterns)

    def trace(_frame, event, _argument):
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        made.match(value)
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize(
    "patterns",
    [["*a" * 200 + "b"], ["*a?" * 130], ["?" * 400], [f"*{number}*" for number in range(200)], ["*" * 400]],
)
def test_filter_cost_is_linear_in_the_value(patterns):
    short, long = cost(patterns, "a" * 100), cost(patterns, "a" * 1000)
    assert long <= 11 * short
    assert long <= 4 * 1000


def test_filter_charges_for_comparisons():
    charged = []
    select(["a" * 1000] * 100, [{"Name": "name", "Values": ["*b"]}], TABLE, charged.append)
    assert sum(charged) == 100 * 1000 // 4096


def test_filter_stops_when_a_charge_is_refused():
    class RefusedError(Exception):
        pass

    def charge(_units):
        raise RefusedError

    compared = []
    table = {"name": lambda record: compared.append(record) or [record]}
    with pytest.raises(RefusedError):
        select(["a" * 1024] * 1000, [{"Name": "name", "Values": ["x"]}], table, charge)
    assert len(compared) == 4


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], ["one", "two", "three"]),
        ([("name", "one")], ["one"]),
        ([("name", "one", "t*")], ["one", "two", "three"]),
        ([("name", "t*"), ("letters", "w")], ["two"]),
        ([("letters", "e")], ["one", "three"]),
        ([("name", "four")], []),
        ([("letters", "None")], []),
        ([("name", "one"), ("name", "two")], []),
        ([("first:t", "*")], ["two", "three"]),
        ([("first:t", "two", "one")], ["two"]),
        ([("first:", "*")], []),
    ],
)
def test_filters_must_all_match_with_one_of_their_values(filters, expected):
    asked = [{"Name": name, "Values": values} for name, *values in filters]
    assert select(["one", "two", "three"], asked, TABLE) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"Name": "nome", "Values": ["x"]}, "InvalidParameterValue: The filter 'nome' is invalid"),
        ({"Name": "Name", "Values": ["x"]}, "InvalidParameterValue: The filter 'Name' is invalid"),
        ({"Name": "first", "Values": ["x"]}, "InvalidParameterValue: The filter 'first' is invalid"),
        ({"Name": "last:t", "Values": ["x"]}, "InvalidParameterValue: The filter 'last:t' is invalid"),
        ({"Values": ["x"]}, "MissingParameter: The request must contain the parameter Filter.2.Name"),
        ({"Name": "name"}, "MissingParameter: The request must contain the parameter Filter.2.Value"),
        ({"Name": "name", "Values": []}, "MissingParameter: The request must contain the parameter Filter.2.Value"),
        (
            {"Name": "name", "Values": ["x"] * MAX_VALUES},
            "FilterLimitExceeded: The maximum number of filter values specified on a single call is 200.",
        ),
        (
            {"Name": "name", "Values": ["x" * (MAX_LENGTH + 1)]},
            "InvalidParameterValue: A filter value is longer than 1024 characters.",
        ),
        (
            {"Name": "name", "Values": ["x" * MAX_LENGTH] * (MAX_CHARACTERS // MAX_LENGTH)},
            f"InvalidParameterValue: The filter values have 32769 characters. The maximum is {MAX_CHARACTERS}.",
        ),
        (
            {"Name": "name", "Values": ["*" + "x" * 1000] * 5},
            "InvalidParameterValue: The filter values have 5005 characters with wildcards. The maximum is 4096.",
        ),
        (
            {"Name": "name", "Values": ["*?" * 201]},
            f"InvalidParameterValue: The filter values have 402 wildcards. The maximum is {MAX_WILDCARDS}.",
        ),
    ],
)
def test_select_rejects_invalid_filters(asked, message):
    with pytest.raises(EC2Error) as refusal:
        select([], [{"Name": "name", "Values": ["x"]}, asked], TABLE)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("moment", "texts"),
    [
        (datetime(2013, 9, 15, 17, 15, 20, tzinfo=UTC), ("2013-09-15T17:15:20.000Z", "2013-09-15T17:15:20Z")),
        (datetime(2013, 9, 15, 17, 15, 20, 123456, tzinfo=UTC), ("2013-09-15T17:15:20.123Z",)),
        (
            datetime(2013, 9, 15, 17, 15, tzinfo=timezone(timedelta(hours=2))),
            ("2013-09-15T15:15:00.000Z", "2013-09-15T15:15:00Z"),
        ),
    ],
)
def test_format_instant_matches_responses(moment, texts):
    assert format_instant(moment) == texts
