"""Translates simple IAM policies to Cedar policies and lets Cedar's engine decide: an independent oracle.

Written from Cedar's own documentation, apart from the code under test. Only what Cedar can say: no `?` but in actions
(which are written out), a source address that is known, `*` in strings, dates in UTC.
"""

from fnmatch import fnmatchcase

import cedarpy

from thrave.identity.policy_conditions import source_address

ACTIONS = ["ec2:BundleInstance", "ec2:DescribeBundleTasks", "ec2:CancelBundleTask"]
TERMS = {
    "StringEquals": 'context.region == "{}"',
    "StringLike": 'context.region like "{}"',
    "IpAddress": 'context.ip.isInRange(ip("{}"))',
    "DateLessThan": 'context.now < datetime("{}")',
    "DateLessThanEquals": 'context.now <= datetime("{}")',
    "DateGreaterThan": 'context.now > datetime("{}")',
    "DateGreaterThanEquals": 'context.now >= datetime("{}")',
    "Bool": "context.secure == {}",
}


def cedar_permits(statements, *, action, region, source_ip, secure, now):
    """Say whether Cedar permits the request."""
    context = {
        "region": region,
        "secure": secure,
        "ip": {"__extn": {"fn": "ip", "arg": str(source_address(source_ip))}},
        "now": {"__extn": {"fn": "datetime", "arg": now.strftime("%Y-%m-%dT%H:%M:%SZ")}},
    }
    request = {
        "principal": 'User::"alice"',
        "action": f'Action::"{action}"',
        "resource": 'Any::"any"',
        "context": context,
    }
    result = cedarpy.is_authorized(request, "\n".join(map(_policy, statements)), "[]")
    assert result.diagnostics.errors == []
    return result.allowed


def _policy(statement):
    word = {"Allow": "permit", "Deny": "forbid"}[statement["Effect"]]
    patterns = _list(statement.get("Action", statement.get("NotAction")))
    covered = [name for name in ACTIONS if any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)]
    listed = ", ".join(f'Action::"{name}"' for name in covered)
    head = f"action in [{listed}]" if "Action" in statement else "action"
    terms = [] if "Action" in statement else [f"!(action in [{listed}])"]
    for name, keys in statement.get("Condition", {}).items():
        terms += [_condition(name, _list(values)) for values in keys.values()]
    return f"{word}(principal, {head}, resource) when {{ {' && '.join(terms) or 'true'} }};"


def _condition(name, values):
    plain = name.replace("Not", "")
    any_of = " || ".join(TERMS[plain].format(value) for value in values)
    return f"!({any_of})" if "Not" in name else f"({any_of})"


def _list(value):
    return value if isinstance(value, list) else [value]
