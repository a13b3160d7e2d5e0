"""The Condition element of IAM policies (tables `KEYS` and `OPERATORS`), and strict reading of JSON documents.

A key, operator or value that is not supported is refused when the policy is stored, so evaluating a condition cannot
fail. JSON with a duplicate name is refused, since a reader that uses the last of two `Effect`s may decide wrongly.
Statements are in `policies.py`.

Source: AWS, IAM User Guide, "Condition operators" and "Conditions with multiple context keys or values".
"""

# Operators and keys are joined by AND, the values of one key by OR. A negated operator is met if none of its values
# matches. A key without a value in the request matches nothing, so `IpAddress` is not met and `NotIpAddress` is; with
# `IfExists` both are met.

import fnmatch
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal, NamedTuple, NoReturn, cast

from thrave.identity.errors import MalformedPolicyDocument

_MAX_SHOWN = 80  # characters of a value in a message


def load(text: str) -> object:
    """Parse JSON.

    Raises:
        MalformedPolicyDocument: The text is not JSON, or has a duplicate name.
    """
    try:
        text.encode()  # fails for half of a surrogate pair
        return json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except RecursionError:
        raise MalformedPolicyDocument("The document is nested too deeply.") from None
    except ValueError as error:  # of json and of Unicode both
        message = ascii(str(error))[1:-1][:_MAX_SHOWN]
        raise MalformedPolicyDocument(f"The document is not valid JSON: {message}.") from None


def members(value: object, name: str) -> Mapping[str, object]:
    """Return a value that must be an object.

    Raises:
        MalformedPolicyDocument: The value is not an object.
    """
    if not isinstance(value, dict):
        raise MalformedPolicyDocument(f"{name} must be a JSON object.")
    return value


def one_or_more(value: object, name: str) -> Sequence[object]:
    """Return a list that must not be empty. In IAM's grammar a single value stands for a list of one.

    Raises:
        MalformedPolicyDocument: The list is empty.
    """
    values = value if isinstance(value, list) else [value]
    if not values:
        raise MalformedPolicyDocument(f"{name} is an empty list.")
    return values


def texts(value: object, name: str) -> Sequence[str]:
    """Return a value that must be a text or a list of texts.

    Raises:
        MalformedPolicyDocument: The value is something else, or an empty list.
    """
    values = one_or_more(value, name)
    if not all(isinstance(text, str) for text in values):
        raise MalformedPolicyDocument(f"{name} must be a text, or a list of texts.")
    return [str(text) for text in values]


def shown(value: object) -> str:
    """Format a value as JSON for a message: in ASCII, at most 80 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise MalformedPolicyDocument(f"{shown(duplicate)} is given twice.")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedPolicyDocument(f"{name} is not valid JSON.")


Type = Literal["String", "Date", "Boolean", "IP address", "any"]
Test = Callable[[object], bool]

_IF_EXISTS = "IfExists"
_BOOLEANS = {"true": True, "false": False, True: True, False: False}
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?(Z|[+-]\d{2}:\d{2}))?", re.ASCII)
_EPOCH_SECONDS = re.compile(r"\d{9,11}", re.ASCII)
_CIDR = re.compile(r"[0-9A-Fa-f.:]+(/\d{1,3})?", re.ASCII)
_IPV4_MAPPED = IPv6Network("::ffff:0:0/96")


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """Values of the condition keys for one request.

    Attributes:
        region: The service's region; never the region in the client's signature.
        source_ip: Address of the client (see `source_address`); None if unknown.
        secure_transport: Whether the request came over TLS.
        current_time: Time with a time zone.
    """

    region: str
    source_ip: IPv4Address | IPv6Address | None
    secure_transport: bool
    current_time: datetime


def source_address(text: str | None) -> IPv4Address | IPv6Address | None:
    """Parse the address of a client; None if it is not an IP address.

    A dual-stack socket reports IPv4 addresses as IPv6 (`::ffff:203.0.113.9`). They are converted to IPv4; otherwise a
    Deny for an IPv4 network would not match.
    """
    try:
        address = ip_address((text or "").partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


@dataclass(frozen=True, slots=True)
class IamCondition:
    """One key of one operator, with the values of the policy."""

    value: Callable[[RequestContext], object]
    tests: tuple[Test, ...]
    negated: bool
    is_met_without_value: bool

    def is_met(self, context: RequestContext) -> bool:
        """Return whether the condition is met."""
        value = self.value(context)
        if value is None:
            return self.is_met_without_value
        return any(test(value) for test in self.tests) != self.negated


def parse_conditions(block: object) -> tuple[IamCondition, ...]:
    """Parse a Condition element; all returned conditions must be met.

    Raises:
        MalformedPolicyDocument: A part is not supported; the message says which, and what is supported.
    """
    conditions = []
    for name, value in members(block, "Condition").items():
        keys = members(value, f"Condition {shown(name)}")
        if not keys:
            raise MalformedPolicyDocument(f"Condition {shown(name)} names no key.")
        conditions += [_parse_condition(name, key, values) for key, values in keys.items()]
    return tuple(conditions)


def _parse_condition(name: str, key_name: str, values: object) -> IamCondition:
    kind, if_exists = _find_operator(name)
    key = _KEYS_BY_LOWER_NAME.get(key_name.lower())
    if key is None:
        raise MalformedPolicyDocument(f"The condition key {shown(key_name)} is not known here; use {', '.join(KEYS)}.")
    if kind.type not in {key.type, "any"}:
        names = ", ".join(name for name, operator in OPERATORS.items() if operator.type == key.type)
        raise MalformedPolicyDocument(f"{shown(name)} cannot compare {shown(key_name)}; use {names} or Null.")
    tests = []
    for value in one_or_more(values, f"{name} {key_name}"):
        try:
            tests.append(kind.read(value))
        except ValueError as error:
            raise MalformedPolicyDocument(f"{name} {key_name}: {shown(value)} {error}") from None
    if kind.type == "any":  # the operator Null
        return IamCondition(
            lambda context: key.value(context) is None, tuple(tests), negated=False, is_met_without_value=False
        )
    return IamCondition(key.value, tuple(tests), negated=kind.negated, is_met_without_value=if_exists or kind.negated)


def _find_operator(name: str) -> tuple["Operator", bool]:
    """Return an operator, and whether its name ends with IfExists."""
    plain = name.removesuffix(_IF_EXISTS)
    if name in REFUSED:
        raise MalformedPolicyDocument(f"The condition operator {shown(name)} is refused: {REFUSED[name]}")
    if plain not in OPERATORS or name == f"Null{_IF_EXISTS}":
        raise MalformedPolicyDocument(
            f"The condition operator {shown(name)} is not known here; use {', '.join(OPERATORS)}."
        )
    return OPERATORS[plain], plain != name


# Functions that make a test of a policy's value. Each raises ValueError with the end of a sentence about the value.


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("is not a text.")  # noqa: TRY004 (one error for all that a value can be)
    if "${" in value:
        raise ValueError("has a policy variable; none is known here.")
    return value


def _equals(value: object) -> Test:
    return partial(operator.eq, _text(value))


def _equals_ignoring_case(value: object) -> Test:
    text = _text(value).lower()
    return lambda actual: str(actual).lower() == text


def _like(value: object) -> Test:
    pattern = re.compile(glob(_text(value)))
    return lambda actual: pattern.match(str(actual)) is not None


def _boolean(value: object) -> Test:
    if not isinstance(value, str | bool) or value not in _BOOLEANS:
        raise ValueError('is neither "true" nor "false".')
    return partial(operator.is_, _BOOLEANS[value])


def _date(value: object) -> datetime:
    text = str(value) if isinstance(value, int) else _text(value)
    if _EPOCH_SECONDS.fullmatch(text):
        return datetime.fromtimestamp(int(text), UTC)
    if not _DATE.fullmatch(text):
        raise ValueError("is not a date such as 2026-11-23T08:26:46Z, 2026-11-23 (its first second) or epoch seconds.")
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("is not a date that the calendar has.") from None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _date_test(compare: Callable[[datetime, datetime], bool]) -> Callable[[object], Test]:
    def read(value: object) -> Test:
        date = _date(value)
        return lambda now: compare(cast("datetime", now), date)

    return read


def _network(value: object) -> Test:
    text = _text(value)
    if not _CIDR.fullmatch(text):
        raise ValueError("is not an address or a network such as 203.0.113.0/24 or 2001:db8::/32.")
    try:
        network = ip_network(text)
    except ValueError as error:
        raise ValueError(f"is not a network: {error}.") from None
    if isinstance(network, IPv6Network) and network.subnet_of(_IPV4_MAPPED):
        raise ValueError("is IPv4 written as IPv6; write it as IPv4.")
    return network.__contains__


class Key(NamedTuple):
    """A row of the table of keys."""

    type: Type
    value: Callable[[RequestContext], object]
    meaning: str


class Operator(NamedTuple):
    """A row of the table of operators. `read` makes a test of each value in a policy."""

    type: Type
    read: Callable[[object], Test]
    meaning: str
    negated: bool = False


KEYS: Mapping[str, Key] = {
    "ec2:Region": Key("String", lambda context: context.region, "The service's region, by its setting `region`."),
    "aws:CurrentTime": Key("Date", lambda context: context.current_time, "Time of the decision."),
    "aws:SecureTransport": Key(
        "Boolean", lambda context: context.secure_transport, "Whether the connection to the service itself uses TLS."
    ),
    "aws:SourceIp": Key(
        "IP address",
        lambda context: context.source_ip,
        "Address that opened the connection (behind a proxy, the proxy's); IPv4 in IPv6 is IPv4.",
    ),
}

_KEYS_BY_LOWER_NAME = {name.lower(): key for name, key in KEYS.items()}  # IAM's keys ignore case

OPERATORS: Mapping[str, Operator] = {
    "StringEquals": Operator("String", _equals, "The same text."),
    "StringNotEquals": Operator("String", _equals, "None of these texts.", negated=True),
    "StringEqualsIgnoreCase": Operator("String", _equals_ignoring_case, "The same text; case is ignored."),
    "StringNotEqualsIgnoreCase": Operator(
        "String", _equals_ignoring_case, "None of these texts; case is ignored.", negated=True
    ),
    "StringLike": Operator("String", _like, "Matches; `*` is any number of characters, `?` any single one."),
    "StringNotLike": Operator("String", _like, "Matches none of these.", negated=True),
    "DateLessThan": Operator("Date", _date_test(operator.lt), "Before this time."),
    "DateLessThanEquals": Operator("Date", _date_test(operator.le), "At this time or before."),
    "DateGreaterThan": Operator("Date", _date_test(operator.gt), "After this time."),
    "DateGreaterThanEquals": Operator("Date", _date_test(operator.ge), "At this time or after."),
    "Bool": Operator("Boolean", _boolean, "`true` or `false`."),
    "IpAddress": Operator("IP address", _network, "In this network, or exactly this address."),
    "NotIpAddress": Operator("IP address", _network, "In none of these networks.", negated=True),
    "Null": Operator("any", _boolean, "`true`: the request has no value for the key; `false`: it has one."),
}


# Operators that IAM has and that would be misleading here, with the reason.
_AN_INSTANT = "no request comes at exactly one instant; bound a time with DateGreaterThanEquals and DateLessThan."
_ONE_VALUE = "every key here has one value, and ForAllValues holds without any; leave the prefix out."

REFUSED: Mapping[str, str] = {
    **{f"{name}{end}": _AN_INSTANT for name in ("DateEquals", "DateNotEquals") for end in ("", _IF_EXISTS)},
    **{
        f"{prefix}:{name}{end}": _ONE_VALUE
        for prefix in ("ForAllValues", "ForAnyValue")
        for name in OPERATORS
        for end in ("", _IF_EXISTS)
    },
}


def glob(pattern: str) -> str:
    """Translate a pattern with `*` (any number of characters) and `?` (any single one) to a regular expression.

    `fnmatch` makes atomic groups: the text between two stars is searched once, so no pattern causes slow backtracking.
    """
    return fnmatch.translate(pattern.replace("[", "[[]"))
