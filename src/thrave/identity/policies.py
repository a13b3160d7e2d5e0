"""IAM's JSON policies: `is_allowed` decides, `parse_policy` reads a policy when it is stored.

A policy with any part that is not supported is refused as a whole, with the reason. (An evaluator that skips an unknown
statement may permit what the statement denies.) So a decision cannot fail. Conditions are in `policy_conditions.py`.

Sources: AWS, IAM User Guide, "Policy evaluation logic", "Grammar of the IAM JSON policy language", "IAM JSON policy
elements", "IAM and AWS STS quotas"; the messages for invalid actions are AWS's as moto records them.
"""

# Why no existing engine: Cedar (cedarpy 4.12) was tried. It would replace the two lines of `is_allowed`, while all of
# IAM's meaning would have to be translated to Cedar's language. Where the two differ, Cedar permits: a `forbid` that
# reads a value that the request lacks is skipped. It has no `?` and no comparison without case, accepts no `::ffff:`
# address and no `+01:00` in a date, and needs 16 MiB and 170 us for a decision. The tests use it as an oracle: where
# both can express a policy, both must decide the same.

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

NO_RESOURCE = "*"
"""Resource of an action that does not act on a single resource."""

VERSIONS = ("2012-10-17", "2008-10-17")
MAX_CHARACTERS = 2048  # of all policies of a user, without white space: IAM's quota of inline policies

Effect = Literal["Allow", "Deny"]

# Element to its meaning here. The reference page of policies is generated from these tables.
ELEMENTS: Mapping[str, str] = {
    "Version": "`2012-10-17`, or `2008-10-17`, which is also the default. Neither has policy variables here.",
    "Id": "Any text; ignored.",
    "Statement": "One statement, or a list of them. Their order does not matter.",
}
STATEMENT_ELEMENTS: Mapping[str, str] = {
    "Sid": "A name of letters and digits, unique in the policy.",
    "Effect": "`Allow` or `Deny`, in this case.",
    "Action": "`service:Name`, or `*`. `*` and `?` are wildcards in the name, upper and lower case are the same.",
    "NotAction": "Every action except these.",
    "Resource": "`*`, or ARNs with `*` and `?`. EC2 actions here have no single resource, so they need `*`.",
    "NotResource": "Every resource except these. An EC2 action's resource is `*`, which no ARN matches.",
    "Condition": "All conditions must be met; see below.",
}

_ACTION_FLAGS = re.IGNORECASE | re.ASCII
_SID = re.compile(r"[A-Za-z0-9]*")
_SERVICE = re.compile(r"[A-Za-z0-9.-]+|\*")
_NAME = re.compile(r"[A-Za-z0-9*?]+")
_ARN = re.compile(r"arn:([a-z-]+|\*):([a-z0-9-]+|\*):([a-z0-9-]*|\*):([0-9]*|\*):.+", re.DOTALL)
_SERVICES_WITHOUT_RESOURCES = frozenset({"ec2", "*"})


@dataclass(frozen=True, slots=True)
class PolicyPatterns:
    """Patterns of actions or resources as one regular expression; negated for NotAction and NotResource."""

    pattern: re.Pattern[str]
    negated: bool

    def match(self, text: str) -> bool:
        """Return whether the element includes an action or a resource."""
        return (self.pattern.match(text) is None) == self.negated


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of a policy."""

    effect: Effect
    actions: PolicyPatterns
    resources: PolicyPatterns
    conditions: tuple[IamCondition, ...]

    def matches(self, action: str, resource: str, context: RequestContext) -> bool:
        """Return whether the statement applies to a request."""
        return (
            self.actions.match(action)
            and self.resources.match(resource)
            and all(condition.is_met(context) for condition in self.conditions)
        )


def is_allowed(statements: Iterable[Statement], action: str, resource: str, context: RequestContext) -> bool:
    """Decide whether a request is allowed: it needs an Allow, and any Deny overrules.

    Args:
        statements: Statements of all policies of the user.
        action: An action such as `ec2:BundleInstance`.
        resource: An ARN, or `NO_RESOURCE`.
        context: Values for conditions.
    """
    effects = {statement.effect for statement in statements if statement.matches(action, resource, context)}
    return "Allow" in effects and "Deny" not in effects


def count_characters(text: str) -> int:
    """Count a policy's characters as the quota does, without white space."""
    return len("".join(text.split()))


def unmatched_actions(text: str, service: str, names: Iterable[str]) -> list[str]:
    """Find actions in a policy that match no action of a service.

    IAM accepts such a policy, and so do we. But a Deny of `ec2:TerminateInstance`, without the `s`, denies nothing.

    Args:
        text: A policy that `parse_policy` accepts.
        service: A service such as `ec2`.
        names: Names of all actions of the service.
    """
    full_names = [f"{service}:{name}" for name in names]
    statements = one_or_more(members(load(text), "The document")["Statement"], "Statement")
    unmatched = []
    for statement in statements:
        for action in _one_of(members(statement, "A statement"), "Action", "NotAction")[1]:
            pattern = re.compile(_parse_action(action), _ACTION_FLAGS)
            if action.lower().startswith(f"{service}:") and not any(map(pattern.match, full_names)):
                unmatched.append(action)
    return unmatched


def parse_policy(text: str) -> tuple[Statement, ...]:
    """Parse a policy of IAM's language.

    Args:
        text: The JSON document.

    Raises:
        MalformedPolicyDocument: The document is not a policy, or has a part that is not supported; the message says
            which.
    """
    policy = members(load(text), "The document")
    _check_names(policy, ELEMENTS, required=("Statement",))
    if policy.get("Version", VERSIONS[-1]) not in VERSIONS:
        raise MalformedPolicyDocument(f"Version must be {' or '.join(VERSIONS)}.")
    if not isinstance(policy.get("Id", ""), str):
        raise MalformedPolicyDocument("Id must be a text.")
    elements = one_or_more(policy["Statement"], "Statement")
    statements = []
    for number, element in enumerate(elements, 1):
        try:
            statements.append(_parse_statement(members(element, "A statement")))
        except MalformedPolicyDocument as error:
            raise MalformedPolicyDocument(f"Statement {number}: {error}") from None
    sids = [element["Sid"] for element in elements if isinstance(element, dict) and element.get("Sid")]
    if len(set(sids)) < len(sids):
        raise MalformedPolicyDocument("Statement IDs (SID) in a single policy must be unique.")
    return tuple(statements)


def _parse_statement(element: Mapping[str, object]) -> Statement:
    _check_names(element, STATEMENT_ELEMENTS, required=("Effect",))
    if not isinstance(element.get("Sid", ""), str) or not _SID.fullmatch(str(element.get("Sid", ""))):
        raise MalformedPolicyDocument("Sid must be letters and digits.")
    return Statement(
        effect=_parse_effect(element["Effect"]),
        actions=_parse_actions(element),
        resources=_parse_resources(element),
        conditions=parse_conditions(element.get("Condition", {})),
    )


def _parse_effect(value: object) -> Effect:
    match value:
        case "Allow":
            return "Allow"
        case "Deny":
            return "Deny"
    raise MalformedPolicyDocument(f"Effect must be Allow or Deny, not {shown(value)}.")


def _parse_actions(element: Mapping[str, object]) -> PolicyPatterns:
    name, values = _one_of(element, "Action", "NotAction")
    pattern = re.compile("|".join(map(_parse_action, values)), _ACTION_FLAGS)
    return PolicyPatterns(pattern, negated=name == "NotAction")


def _parse_action(text: str) -> str:
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


def _parse_resources(element: Mapping[str, object]) -> PolicyPatterns:
    name, values = _one_of(element, "Resource", "NotResource")
    pattern = re.compile("|".join(map(_parse_resource, values)))
    if name == "Resource" and "*" not in values and _includes_ec2(element):
        raise MalformedPolicyDocument(
            'EC2\'s actions here have no resource-level permissions: where Action reaches them, Resource must be "*".'
        )
    return PolicyPatterns(pattern, negated=name == "NotResource")


def _includes_ec2(element: Mapping[str, object]) -> bool:
    actions = texts(element.get("Action", "*"), "Action")
    return any(action.partition(":")[0].lower() in _SERVICES_WITHOUT_RESOURCES for action in actions)


def _parse_resource(text: str) -> str:
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
    names = [option for option in (name, negated) if option in element]
    if len(names) != 1:
        raise MalformedPolicyDocument(f"A statement has either {name} or {negated}.")
    return names[0], [*texts(element[names[0]], names[0])]


def _check_names(element: Mapping[str, object], known: Mapping[str, str], required: Iterable[str]) -> None:
    missing = [name for name in required if name not in element]
    if missing:
        raise MalformedPolicyDocument(f"{missing[0]} is missing.")
    unknown = [name for name in element if name not in known]
    if unknown:
        raise MalformedPolicyDocument(f"The element {shown(unknown[0])} is not known here; use {', '.join(known)}.")
