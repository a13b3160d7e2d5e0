from datetime import UTC, datetime, timedelta, timezone

import pytest

from thrave.ec2.errors import EC2Error
from thrave.ec2.filters import MAX_LENGTH, MAX_VALUES, instants, matches, select

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
def test_wildcards_stand_for_characters_unless_escaped(pattern, value, expected):
    assert matches(pattern, value) is expected


def test_a_hostile_pattern_costs_no_more_than_its_length():
    assert not matches("*a" * 500 + "b", "a" * 1000)


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
def test_values_are_alternatives_and_filters_are_conditions(filters, expected):
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
    ],
)
def test_a_filter_that_means_nothing_is_refused(asked, message):
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
def test_a_moment_is_named_as_answers_write_it(moment, texts):
    assert instants(moment) == texts
