"""IAM's JSON policies: read when they are stored, and refused then if anything in them is not fully understood.

What comes out is a tuple of statements that can be asked whether they apply, with nothing left that could fail or be
skipped later. A statement that is dropped because one word in it is not known is how evaluators come to permit what
was denied; here the whole policy is refused, with the reason. Who may do what is decided in `decisions.py`.

Sources: AWS, IAM User Guide, "Grammar of the IAM JSON policy language", "IAM JSON policy elements" (Sid, Action,
NotAction, Resource, NotResource), "IAM and AWS STS quotas"; the words for bad actions are AWS's as moto records them.

The decision: may this request be made, by the policies of who makes it?

Default deny, and an explicit Deny wins: the two rules of AWS, IAM User Guide, "Policy evaluation logic", for policies
of users. It is pure; statements come from `policies.py`, which has refused every policy that it did not fully
understand, so there is no third answer and no error here.

Why no engine of somebody else's: Cedar (by cedarpy 4.12) was tried. Its part would be the two lines below, while all of
IAM's meaning would still have to be ours, written out as Cedar's text. Where the two differ it errs to the wrong side:
a `forbid` that reads a value that the request lacks is skipped, and the request permitted. It has no `?` and no
comparison without case, takes no `::ffff:` address and no `+01:00` in a date, and needs 16 MiB and 170 us for a
decision. It serves as the tests' oracle instead: on what both can say, both must say the same.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from thrave.identity.errors import MalformedPolicyDocument
from thrave.identity.policy_conditions import (
    IamCondition,
    RequestContext,
    glob,
    load,
    members,
    one_or_more,
    parse_conditions,
    shown,
    texts,
)

VERSIONS = ("2012-10-17", "2008-10-17")


CHARACTERS = 2048  # of all policies of a user, white space not counted: IAM's quota of inline policies


Effect = Literal["Allow", "Deny"]


# element -> what it means here. The docs' page is made from these.
ELEMENTS: Mapping[str, str] = {
    "Version": "`2012-10-17`, or `2008-10-17`, which is also what no version means. Neither has policy variables here.",
    "Id": "Any text; means nothing.",
    "Statement": "One statement, or a list of them. Their order does not matter.",
}


STATEMENT_ELEMENTS: Mapping[str, str] = {
    "Sid": "A name of letters and digits, given to one statement only.",
    "Effect": "`Allow` or `Deny`, spelt so.",
    "Action": "`service:Name`, or `*`. `*` and `?` are wildcards in the name, upper and lower case are the same.",
    "NotAction": "Every action but these.",
    "Resource": "`*`, or ARNs with `*` and `?`. EC2's actions here act on no single resource: only `*` goes with them.",
    "NotResource": "Every resource but these. An EC2 action's resource is `*`, which no ARN covers.",
    "Condition": "All of it must hold; see below.",
}


_ACTION_FLAGS = re.IGNORECASE | re.ASCII


_SID = re.compile(r"[A-Za-z0-9]*")


_SERVICE = re.compile(r"[A-Za-z0-9.-]+|\*")


_NAME = re.compile(r"[A-Za-z0-9*?]+")


_ARN = re.compile(r"arn:([a-z-]+|\*):([a-z0-9-]+|\*):([a-z0-9-]*|\*):([0-9]*|\*):.+", re.DOTALL)


_WITHOUT_RESOURCES = frozenset({"ec2", "*"})


def unmatched_actions(text: str, service: str, names: Iterable[str]) -> list[str]:
    """Find what a policy says of a service's actions and no action of it is called.

    IAM takes such a policy, and so do we; but a Deny of `ec2:TerminateInstance` denies nothing, for want of an `s`.

    Args:
        text: A policy that was understood.
        service: Such as `ec2`.
        names: Of all its actions.
    """
    full_names = [f"{service}:{name}" for name in names]
    statements = one_or_more(members(load(text), "The document")["Statement"], "Statement")
    said = [action for each in statements for action in _one_of(members(each, "A statement"), "Action", "NotAction")[1]]
    own = [action for action in said if action.lower().startswith(f"{service}:")]
    return [action for action in own if not any(map(re.compile(_action(action), _ACTION_FLAGS).match, full_names))]


def length(text: str) -> int:
    """Count a policy's characters as the quota does, without white space."""
    return len("".join(text.split()))


@dataclass(frozen=True, slots=True)
class Patterns:
    """Some patterns, as one regular expression, or all but them."""

    pattern: re.Pattern[str]
    negated: bool

    def cover(self, text: str) -> bool:
        """Say whether a text is meant."""
        return (self.pattern.match(text) is None) == self.negated


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of a policy."""

    effect: Effect
    actions: Patterns
    resources: Patterns
    conditions: tuple[IamCondition, ...]

    def applies(self, action: str, resource: str, context: RequestContext) -> bool:
        """Say whether the statement speaks of this request."""
        return (
            self.actions.cover(action)
            and self.resources.cover(resource)
            and all(condition.holds(context) for condition in self.conditions)
        )


def parse_policy(text: str) -> tuple[Statement, ...]:
    """Read a policy of IAM's language.

    Args:
        text: The JSON document.

    Raises:
        MalformedPolicyDocument: It is not one, or uses what cannot be evaluated here; the message says what.
    """
    policy = members(load(text), "The document")
    _check_names(policy, ELEMENTS, required=("Statement",))
    if policy.get("Version", VERSIONS[-1]) not in VERSIONS:
        raise MalformedPolicyDocument(f"Version must be {' or '.join(VERSIONS)}.")
    _check_text(policy, "Id")
    elements = one_or_more(policy["Statement"], "Statement")
    statements = tuple(_statement_at(number, element) for number, element in enumerate(elements, 1))
    _check_sids(element["Sid"] for element in elements if isinstance(element, dict) and element.get("Sid"))
    return statements


def _statement_at(number: int, element: object) -> Statement:
    try:
        return _statement(members(element, "A statement"))
    except MalformedPolicyDocument as error:
        raise MalformedPolicyDocument(f"Statement {number}: {error}") from None


def _statement(element: Mapping[str, object]) -> Statement:
    _check_names(element, STATEMENT_ELEMENTS, required=("Effect",))
    if not isinstance(element.get("Sid", ""), str) or not _SID.fullmatch(str(element.get("Sid", ""))):
        raise MalformedPolicyDocument("Sid must be letters and digits.")
    return Statement(
        effect=_effect(element["Effect"]),
        actions=_actions(element),
        resources=_resources(element),
        conditions=parse_conditions(element.get("Condition", {})),
    )


def _effect(value: object) -> Effect:
    match value:
        case "Allow":
            return "Allow"
        case "Deny":
            return "Deny"
    raise MalformedPolicyDocument(f"Effect must be Allow or Deny, not {shown(value)}.")


def _actions(element: Mapping[str, object]) -> Patterns:
    name, values = _one_of(element, "Action", "NotAction")
    pattern = re.compile("|".join(map(_action, values)), _ACTION_FLAGS)
    return Patterns(pattern, negated=name == "NotAction")


def _action(text: str) -> str:
    service, colon, name = text.partition(":")
    if text == "*":
        return glob("*")
    if not colon:
        raise MalformedPolicyDocument(
            f"{shown(text)}: Actions/Conditions must be prefaced by a vendor, e.g., iam, sdb, ec2, etc."
        )
    if not _SERVICE.fullmatch(service):
        raise MalformedPolicyDocument(f"{shown(text)}: Vendor {shown(service)} is not valid")
    if not _NAME.fullmatch(name):
        raise MalformedPolicyDocument(f"{shown(text)} is no action: a name is letters, digits, * and ?")
    return glob(text)


def _resources(element: Mapping[str, object]) -> Patterns:
    name, values = _one_of(element, "Resource", "NotResource")
    pattern = re.compile("|".join(map(_resource, values)))
    if name == "Resource" and "*" not in values and _reaches_ec2(element):
        raise MalformedPolicyDocument(
            'EC2\'s actions here have no resource-level permissions: where Action reaches them, Resource must be "*".'
        )
    return Patterns(pattern, negated=name == "NotResource")


def _reaches_ec2(element: Mapping[str, object]) -> bool:
    actions = texts(element.get("Action", "*"), "Action")
    return any(action.partition(":")[0].lower() in _WITHOUT_RESOURCES for action in actions)


def _resource(text: str) -> str:
    if text == "*":
        return glob("*")
    if "${" in text:
        raise MalformedPolicyDocument(f"{shown(text)} has a policy variable; none is known here.")
    if not _ARN.fullmatch(text):
        raise MalformedPolicyDocument(f'{shown(text)} is neither "*" nor an ARN whose first parts are whole or "*".')
    *parts, resource = text.split(":", 5)
    head = ":".join("[^:]*" if part == "*" else re.escape(part) for part in parts)
    return f"{head}:{glob(resource)}"


def _one_of(element: Mapping[str, object], name: str, negated: str) -> tuple[str, list[str]]:
    given = [each for each in (name, negated) if each in element]
    if len(given) != 1:
        raise MalformedPolicyDocument(f"A statement has either {name} or {negated}.")
    return given[0], [*texts(element[given[0]], given[0])]


def _check_names(element: Mapping[str, object], known: Mapping[str, str], required: Iterable[str]) -> None:
    missing = [name for name in required if name not in element]
    if missing:
        raise MalformedPolicyDocument(f"{missing[0]} is missing.")
    unknown = [name for name in element if name not in known]
    if unknown:
        raise MalformedPolicyDocument(f"The element {shown(unknown[0])} is not known here; use {', '.join(known)}.")


def _check_text(element: Mapping[str, object], name: str) -> None:
    if not isinstance(element.get(name, ""), str):
        raise MalformedPolicyDocument(f"{name} must be a text.")


def _check_sids(sids: Iterable[object]) -> None:
    given = [*sids]
    if len(set(given)) < len(given):
        raise MalformedPolicyDocument("Statement IDs (SID) in a single policy must be unique.")


NO_RESOURCE = "*"  # what an action acts on that acts on no single resource


def is_allowed(statements: Iterable[Statement], action: str, resource: str, context: RequestContext) -> bool:
    """Decide.

    Args:
        statements: Of every policy of the user together.
        action: Such as `ec2:BundleInstance`.
        resource: An ARN, or `NO_RESOURCE`.
        context: What else is known of the request.
    """
    effects = {each.effect for each in statements if each.applies(action, resource, context)}
    return "Allow" in effects and "Deny" not in effects
