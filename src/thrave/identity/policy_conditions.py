"""JSON documents that somebody else wrote, read so that nothing in them can be overlooked.

A name given twice, a number that is none, nesting without end: each is an error of ours, because a reader that is
content with the last of two `Effect`s decides something other than what stands there. What a document means is not
decided here.

The `PolicyCondition` element of IAM's policy language: which keys and operators are understood, and what they mean.

Two literal tables say it all, `KEYS` and `OPERATORS`; the docs' page of policies is made from them. Whatever is not in
them is refused when the policy is stored, and so is a value that its operator cannot compare. After that nothing can go
wrong: a condition holds or does not hold. Nothing here knows what a statement is.

The logic is that of AWS, IAM User Guide, "Condition operators" and "Conditions with multiple context keys or values":
operators and keys are joined by AND, the values of one key by OR, a negated operator holds if none of its values
matches. A key that the request has no value for matches nothing, so that `IpAddress` does not hold and `NotIpAddress`
does; with `IfExists` either holds.
"""

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

_SHOWN = 80  # characters of a value that a message repeats


def load(text: str) -> object:
    """Read JSON.

    Raises:
        MalformedPolicyDocument: It is none, or says something twice.
    """
    try:
        text.encode()
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise MalformedPolicyDocument("The document is nested too deeply.") from None
    except ValueError as error:  # of json and of Unicode both
        raise MalformedPolicyDocument(f"The document is not valid JSON: {ascii(str(error))[1:-1][:_SHOWN]}.") from None


def members(value: object, name: str) -> Mapping[str, object]:
    """Take a value for an object.

    Raises:
        MalformedPolicyDocument: It is something else.
    """
    if not isinstance(value, dict):
        raise MalformedPolicyDocument(f"{name} must be a JSON object.")
    return value


def one_or_more(value: object, name: str) -> Sequence[object]:
    """Take a value for a list of at least one; what is no list is a list of one, as everywhere in IAM's grammar.

    Raises:
        MalformedPolicyDocument: The list is empty.
    """
    values = value if isinstance(value, list) else [value]
    if not values:
        raise MalformedPolicyDocument(f"{name} is an empty list.")
    return values


def texts(value: object, name: str) -> Sequence[str]:
    """Take a value for a text or a list of them.

    Raises:
        MalformedPolicyDocument: It is something else, or an empty list.
    """
    values = one_or_more(value, name)
    if not all(isinstance(each, str) for each in values):
        raise MalformedPolicyDocument(f"{name} must be a text, or a list of texts.")
    return [str(each) for each in values]


def shown(value: object) -> str:
    """Write a value as JSON for a message: in ASCII, and cut short."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise MalformedPolicyDocument(f"{shown(twice)} is given twice.")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedPolicyDocument(f"{name} is not valid JSON.")


Type = Literal["String", "Date", "Boolean", "IP address", "any"]


Test = Callable[[object], bool]


_IF_EXISTS = "IfExists"


_BOOLEANS = {"true": True, "false": False, True: True, False: False}


_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?(Z|[+-]\d{2}:\d{2}))?", re.ASCII)


_EPOCH_SECONDS = re.compile(r"\d{9,11}", re.ASCII)


_CIDR = re.compile(r"[0-9A-Fa-f.:]+(/\d{1,3})?", re.ASCII)


_MAPPED = IPv6Network("::ffff:0:0/96")


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """What a request is judged by, beside who makes it and what for.

    Attributes:
        region: The service's own; never the one that a client writes into its signature.
        source_ip: Where the request came from (see `source_address`); None if that is not known.
        secure_transport: Whether it came over TLS.
        current_time: Aware.
    """

    region: str
    source_ip: IPv4Address | IPv6Address | None
    secure_transport: bool
    current_time: datetime


def source_address(text: str | None) -> IPv4Address | IPv6Address | None:
    """Read the address of a peer; None if it is none.

    An IPv4 address that a socket of both families shows as IPv6 (`::ffff:203.0.113.9`) is IPv4, or a Deny for its
    network would not meet it.
    """
    try:
        address = ip_address((text or "").partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


@dataclass(frozen=True, slots=True)
class IamCondition:
    """One key under one operator, ready to be asked."""

    value: Callable[[RequestContext], object]
    tests: tuple[Test, ...]
    negated: bool
    when_absent: bool

    def holds(self, context: RequestContext) -> bool:
        """Say whether the condition is met."""
        value = self.value(context)
        if value is None:
            return self.when_absent
        return any(test(value) for test in self.tests) != self.negated


def parse_conditions(block: object) -> tuple[IamCondition, ...]:
    """Read a `PolicyCondition` element; all that it gives must hold.

    Raises:
        MalformedPolicyDocument: Something in it is not understood; the message says what, and what is.
    """
    return tuple(
        _condition(name, key, values)
        for name, keys in members(block, "Condition").items()
        for key, values in _some(members(keys, f"Condition {shown(name)}"), name).items()
    )


def _some(keys: Mapping[str, object], name: str) -> Mapping[str, object]:
    if not keys:
        raise MalformedPolicyDocument(f"Condition {shown(name)} names no key.")
    return keys


def _condition(name: str, key_name: str, values: object) -> IamCondition:
    kind, if_exists = _operator(name)
    key = _KEYS_BY_LOWER_NAME.get(key_name.lower())
    if key is None:
        raise MalformedPolicyDocument(f"The condition key {shown(key_name)} is not known here; use {', '.join(KEYS)}.")
    if kind.type not in {key.type, "any"}:
        fitting = ", ".join(each for each, one in OPERATORS.items() if one.type == key.type)
        raise MalformedPolicyDocument(f"{shown(name)} cannot compare {shown(key_name)}; use {fitting} or Null.")
    tests = tuple(_test(kind, value, f"{name} {key_name}") for value in one_or_more(values, f"{name} {key_name}"))
    if kind.type == "any":
        return IamCondition(lambda context: key.value(context) is None, tests, negated=False, when_absent=False)
    return IamCondition(key.value, tests, negated=kind.negated, when_absent=if_exists or kind.negated)


def _operator(name: str) -> tuple["Operator", bool]:
    plain = name.removesuffix(_IF_EXISTS)
    if name in REFUSED:
        raise MalformedPolicyDocument(f"The condition operator {shown(name)} is refused: {REFUSED[name]}")
    if plain not in OPERATORS or name == f"Null{_IF_EXISTS}":
        raise MalformedPolicyDocument(
            f"The condition operator {shown(name)} is not known here; use {', '.join(OPERATORS)}."
        )
    return OPERATORS[plain], plain != name


def _test(kind: "Operator", value: object, where: str) -> Test:
    try:
        return kind.read(value)
    except ValueError as error:
        raise MalformedPolicyDocument(f"{where}: {shown(value)} {error}") from None


# What an operator makes of a value of the policy. Each raises ValueError with the rest of a sentence about the value.


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("is not a text.")  # noqa: TRY004 (one error for all that a value can be)
    if "${" in value:
        raise ValueError("has a policy variable; none is known here.")
    return value


def _equals(value: object) -> Test:
    return partial(operator.eq, _text(value))


def _equals_ignoring_case(value: object) -> Test:
    wanted = _text(value).lower()
    return lambda given: str(given).lower() == wanted


def _like(value: object) -> Test:
    pattern = re.compile(glob(_text(value)))
    return lambda given: pattern.match(str(given)) is not None


def _boolean(value: object) -> Test:
    if not isinstance(value, str | bool) or value not in _BOOLEANS:
        raise ValueError('is neither "true" nor "false".')
    return partial(operator.is_, _BOOLEANS[value])


def _moment(value: object) -> datetime:
    text = str(value) if isinstance(value, int) else _text(value)
    if _EPOCH_SECONDS.fullmatch(text):
        return datetime.fromtimestamp(int(text), UTC)
    if not _DATE.fullmatch(text):
        raise ValueError("is not a date such as 2026-11-23T08:26:46Z, 2026-11-23 (its first second) or epoch seconds.")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("is not a date that the calendar has.") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _compared(compare: Callable[[datetime, datetime], bool]) -> Callable[[object], Test]:
    def read(value: object) -> Test:
        moment = _moment(value)
        return lambda now: compare(cast("datetime", now), moment)

    return read


def _network(value: object) -> Test:
    text = _text(value)
    if not _CIDR.fullmatch(text):
        raise ValueError("is not an address or a network such as 203.0.113.0/24 or 2001:db8::/32.")
    try:
        network = ip_network(text)
    except ValueError as error:
        raise ValueError(f"is not a network: {error}.") from None
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        raise ValueError("is IPv4 written as IPv6; write it as IPv4.")
    return network.__contains__


class Key(NamedTuple):
    """A row of the table of keys."""

    type: Type
    value: Callable[[RequestContext], object]
    meaning: str


class Operator(NamedTuple):
    """A row of the table of operators: `read` makes a test of each value that a policy gives."""

    type: Type
    read: Callable[[object], Test]
    meaning: str
    negated: bool = False


KEYS: Mapping[str, Key] = {
    "ec2:Region": Key("String", lambda context: context.region, "The service's region, by its setting `region`."),
    "aws:CurrentTime": Key("Date", lambda context: context.current_time, "When the request is judged."),
    "aws:SecureTransport": Key(
        "Boolean", lambda context: context.secure_transport, "Whether the service itself was spoken to over TLS."
    ),
    "aws:SourceIp": Key(
        "IP address",
        lambda context: context.source_ip,
        "Who opened the connection (behind a proxy, the proxy); IPv4 in IPv6 is IPv4.",
    ),
}


_KEYS_BY_LOWER_NAME = {name.lower(): key for name, key in KEYS.items()}  # IAM's keys know no case


OPERATORS: Mapping[str, Operator] = {
    "StringEquals": Operator("String", _equals, "The same text."),
    "StringNotEquals": Operator("String", _equals, "Another text than each of these.", negated=True),
    "StringEqualsIgnoreCase": Operator("String", _equals_ignoring_case, "The same but for upper and lower case."),
    "StringNotEqualsIgnoreCase": Operator("String", _equals_ignoring_case, "Another, whatever its case.", negated=True),
    "StringLike": Operator("String", _like, "Matches, `*` being any characters and `?` any one."),
    "StringNotLike": Operator("String", _like, "Matches none of these.", negated=True),
    "DateLessThan": Operator("Date", _compared(operator.lt), "Before this moment."),
    "DateLessThanEquals": Operator("Date", _compared(operator.le), "Not after this moment."),
    "DateGreaterThan": Operator("Date", _compared(operator.gt), "After this moment."),
    "DateGreaterThanEquals": Operator("Date", _compared(operator.ge), "Not before this moment."),
    "Bool": Operator("Boolean", _boolean, "`true` or `false`."),
    "IpAddress": Operator("IP address", _network, "In this network, or this very address."),
    "NotIpAddress": Operator("IP address", _network, "In none of these networks.", negated=True),
    "Null": Operator("any", _boolean, "`true`: the request has no value for the key; `false`: it has one."),
}


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
    """Translate a pattern of IAM's, where `*` is any characters and `?` is any one, to a regular expression.

    It looks for what stands between two stars once (`fnmatch` makes atomic groups), so no pattern is slow to fail.
    """
    return fnmatch.translate(pattern.replace("[", "[[]"))
