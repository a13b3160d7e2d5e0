"""Decisions of IAM policies: a table of cases with mistakes of other evaluators, and properties of all policies.

The mistakes come from issue threads and measurements. Conditions and NotAction were skipped, so that an Allow held for
all callers or a Deny for none (cloudemu #841, moto.iam.access_control 5.2). A Deny was missed because of letter case
(fakecloud #2382, scality Arsenal #219). `?` was ignored (expand-aws-iam-wildcards #199).
"""

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.cedar_oracle import cedar_permits
from thrave.identity.errors import MalformedPolicyDocument
from thrave.identity.policies import is_allowed, parse_policy
from thrave.identity.policy_conditions import KEYS, OPERATORS, RequestContext, source_address

NOW = datetime(2026, 11, 23, 8, 26, 46, tzinfo=UTC)
IPV4, IPV6, MAPPED = "203.0.113.9", "2001:db8::9", "::ffff:203.0.113.9"


def statement(effect="Allow", **elements):
    """Everything allowed, but for what is given."""
    given = {"Action": "*", "Resource": "*", **elements}
    if "NotAction" in elements:
        del given["Action"]
    if "NotResource" in elements:
        del given["Resource"]
    return {"Effect": effect, **given}


def allow(action="*", **elements):
    return statement("Allow", Action=action, **elements)


def deny(action="*", **elements):
    return statement("Deny", Action=action, **elements)


def when(effect="Allow", /, **conditions):
    """A statement on everything under a condition: `when(IpAddress={"aws:SourceIp": …})`."""
    return statement(effect, Condition=conditions)


def context_of(region="us-east-1", source_ip=IPV4, secure=False, now=NOW):  # noqa: FBT002 (read by name)
    address = source_address(source_ip)
    return RequestContext(region=region, source_ip=address, secure_transport=secure, current_time=now)


def decide(statements, action="ec2:BundleInstance", resource="*", **changes):
    text = json.dumps({"Version": "2012-10-17", "Statement": statements})
    return is_allowed(parse_policy(text), action, resource, context_of(**changes))


REGION, SOURCE, SECURE, TIME = "ec2:Region", "aws:SourceIp", "aws:SecureTransport", "aws:CurrentTime"
UNKNOWN = {"source_ip": None}
IN_NET, NOT_IN_NET = {"IpAddress": {SOURCE: "203.0.113.0/24"}}, {"NotIpAddress": {SOURCE: "203.0.113.0/24"}}
IMAGES = "arn:aws:ec2:*:*:image/*"
IN_NET_IF_EXISTS = {"IpAddressIfExists": {SOURCE: "203.0.113.0/24"}}
OBJECTS = "arn:aws:s3:::my-bundles/win*"
PUT = {"action": "s3:PutObject", "resource": "arn:aws:s3:::my-bundles/winami.manifest.xml"}

CASES = [
    # Allow, Deny, and neither
    ("an action without a statement is denied", [allow("ec2:DescribeBundleTasks")], {}, False),
    ("what is allowed is permitted", [allow("ec2:BundleInstance")], {}, True),
    ("a single statement need be no list", allow("ec2:BundleInstance"), {}, True),
    ("Deny wins", [allow(), deny("ec2:BundleInstance")], {}, False),
    ("Deny wins whatever the order", [deny("ec2:BundleInstance"), allow()], {}, False),
    ("Deny of another action does not matter", [allow(), deny("ec2:CancelBundleTask")], {}, True),
    ("a Deny alone permits nothing", [deny("ec2:CancelBundleTask")], {}, False),
    # Action
    ("* is every action", [allow("*")], {}, True),
    ("*:* is every action", [allow("*:*")], {}, True),
    ("any service may be meant", [allow("*:Bundle*")], {}, True),
    ("any service may be meant, but not any action", [allow("*:Cancel*")], {}, False),
    ("one of a list", [allow(["ec2:CancelBundleTask", "ec2:BundleInstance"])], {}, True),
    ("* within a name", [allow("ec2:B*e")], {}, True),
    ("* is also nothing", [allow("ec2:BundleInstance*")], {}, True),
    ("? is one character", [allow("ec2:Bundle?nstance")], {}, True),
    ("? is not nothing", [allow("ec2:BundleInstance?")], {}, False),
    ("? is not two", [allow("ec2:B?ndleInst?ce")], {}, False),
    ("? in a Deny", [allow(), deny("ec2:?undleInstance")], {}, False),
    ("upper and lower case are the same", [allow("EC2:bundleinstance")], {}, True),
    ("so too in a Deny", [allow(), deny("Ec2:BUNDLEINSTANCE")], {}, False),
    ("so too with wildcards", [allow("ec2:bUnDlE*")], {}, True),
    ("a prefix is not the action", [allow("ec2:Bundle")], {}, False),
    ("a longer name is not the action", [allow("ec2:BundleInstances")], {}, False),
    ("another service's action of that name is another", [allow("s3:BundleInstance")], {}, False),
    ("NotAction allows the others", [statement(NotAction="ec2:Cancel*")], {}, True),
    ("NotAction does not allow itself", [statement(NotAction="ec2:Bundle*")], {}, False),
    ("Deny with NotAction denies the others", [allow(), statement("Deny", NotAction="ec2:Describe*")], {}, False),
    ("Deny with NotAction spares itself", [allow(), statement("Deny", NotAction="EC2:bundle*")], {}, True),
    ("NotAction of a list spares each", [allow(), statement("Deny", NotAction=["s3:*", "ec2:B*"])], {}, True),
    ("NotAction * is no action at all", [allow(), statement("Deny", NotAction="*")], {}, True),
    # Resource
    ("Deny with NotResource denies what has no ARN", [allow(), statement("Deny", NotResource=IMAGES)], {}, False),
    ("Allow with NotResource allows what has no ARN", [statement(NotResource=IMAGES)], {}, True),
    ("NotResource * is no resource at all", [allow(), statement("Deny", NotResource="*")], {}, True),
    ("* next to an ARN is still everything", [allow(Resource=[IMAGES, "*"])], {}, True),
    ("an object by its ARN", [allow("s3:PutObject", Resource=OBJECTS)], PUT, True),
    ("another object", [allow("s3:PutObject", Resource="arn:aws:s3:::my-bundles/lin*")], PUT, False),
    ("a bucket's ARN is not its objects'", [allow("s3:*", Resource="arn:aws:s3:::my-bundles")], PUT, False),
    ("ARNs have upper and lower case", [allow("s3:*", Resource="arn:aws:s3:::my-bundles/WIN*")], PUT, False),
    ("a Deny of an object", [allow(), deny("s3:*", Resource=OBJECTS)], PUT, False),
    ("NotResource spares its object", [allow(), statement("Deny", NotResource=OBJECTS)], PUT, True),
    ("* in an ARN's part stays in that part", [allow("s3:*", Resource="arn:*:s3:*:*:my-bundles/*")], PUT, True),
    (
        "* in an ARN's part does not reach into an object's name",
        [allow("s3:*", Resource="arn:aws:s3:*:*:secret")],
        {"action": "s3:PutObject", "resource": "arn:aws:s3:::my-bundles/a:b:secret"},
        False,
    ),
    ("brackets are no wildcards", [allow("s3:*", Resource="arn:aws:s3:::my-bundles/[w]inami*")], PUT, False),
    # Condition
    ("an empty condition holds", [allow(Condition={})], {}, True),
    ("a network", [when(**IN_NET)], {}, True),
    ("another network", [when(**IN_NET)], {"source_ip": "198.51.100.1"}, False),
    ("Allow under a condition without a value to compare permits nothing", [when(**IN_NET)], UNKNOWN, False),
    ("a Deny under a negated condition holds without a value", [allow(), when("Deny", **NOT_IN_NET)], UNKNOWN, False),
    ("a Deny under a condition does not", [allow(), when("Deny", **IN_NET)], UNKNOWN, True),
    ("IfExists holds without a value", [when(**IN_NET_IF_EXISTS)], UNKNOWN, True),
    ("IfExists compares a value that is there", [when(IpAddressIfExists={SOURCE: "10.0.0.0/8"})], {}, False),
    ("Deny with IfExists denies without a value", [allow(), when("Deny", **IN_NET_IF_EXISTS)], UNKNOWN, False),
    ("Null true: there is no value", [when(Null={SOURCE: "true"})], UNKNOWN, True),
    ("Null true: there is one", [when(Null={SOURCE: "true"})], {}, False),
    ("Null false: there is one", [when(Null={SOURCE: False})], {}, True),
    ("Null of what every request has", [when(Null={REGION: "true"})], {}, False),
    ("a value out of many", [when(IpAddress={SOURCE: ["10.0.0.0/8", "203.0.113.0/24"]})], {}, True),
    ("none of many", [when(NotIpAddress={SOURCE: ["10.0.0.0/8", "203.0.113.0/24"]})], {}, False),
    ("operators are joined by AND", [when(**IN_NET, Bool={SECURE: "true"})], {}, False),
    ("operators are joined by AND, all met", [when(**IN_NET, Bool={SECURE: "true"})], {"secure": True}, True),
    ("keys know no case", [when(IpAddress={"AWS:sourceip": "203.0.113.0/24"})], {}, True),
    ("one key in two spellings must hold twice", [when(StringLike={REGION: "us-*", "EC2:region": "eu-*"})], {}, False),
    ("a single address", [when(IpAddress={SOURCE: IPV4})], {}, True),
    ("IPv6", [when(IpAddress={SOURCE: "2001:db8::/32"})], {"source_ip": IPV6}, True),
    ("IPv6 is in no network of IPv4", [when(IpAddress={SOURCE: "0.0.0.0/0"})], {"source_ip": IPV6}, False),
    ("IPv4 is in no network of IPv6", [when(IpAddress={SOURCE: "::/0"})], {}, False),
    ("IPv4 in IPv6 is IPv4", [when(**IN_NET)], {"source_ip": MAPPED}, True),
    ("IPv4 in IPv6 does not escape a Deny", [allow(), when("Deny", **IN_NET)], {"source_ip": MAPPED}, False),
    ("an address with a zone", [when(IpAddress={SOURCE: "fe80::/10"})], {"source_ip": "fe80::1%eth0"}, True),
    ("what is no address is no value", [allow(), when("Deny", **NOT_IN_NET)], {"source_ip": "unknown"}, False),
    ("the region", [when(StringEquals={REGION: "us-east-1"})], {}, True),
    ("another region", [when(StringEquals={REGION: "us-east-1"})], {"region": "eu-west-1"}, False),
    ("StringEquals has upper and lower case", [when(StringEquals={REGION: "US-EAST-1"})], {}, False),
    ("StringEqualsIgnoreCase has not", [when(StringEqualsIgnoreCase={REGION: "US-EAST-1"})], {}, True),
    ("StringNotEqualsIgnoreCase", [when(StringNotEqualsIgnoreCase={REGION: "US-EAST-1"})], {}, False),
    ("StringEquals has no wildcards", [when(StringEquals={REGION: "us-*"})], {}, False),
    ("StringLike has", [when(StringLike={REGION: "us-?ast-*"})], {}, True),
    ("StringLike matches the whole", [when(StringLike={REGION: "us-east"})], {}, False),
    ("StringLike knows no brackets", [when(StringLike={REGION: "[u]s-east-1"})], {}, False),
    ("StringLike has upper and lower case", [when(StringLike={REGION: "US-*"})], {}, False),
    ("Deny with StringNotLike: elsewhere", [allow(), when("Deny", StringNotLike={REGION: "eu-*"})], {}, False),
    ("Deny with StringNotLike: there", [allow(), when("Deny", StringNotLike={REGION: ["eu-*", "us-*"]})], {}, True),
    ("StringNotEquals to each of two", [when(StringNotEquals={REGION: ["us-east-1", "eu-west-1"]})], {}, False),
    ("Deny without TLS", [allow(), when("Deny", Bool={SECURE: "false"})], {}, False),
    ("Deny without TLS, over TLS", [allow(), when("Deny", Bool={SECURE: "false"})], {"secure": True}, True),
    ("a JSON boolean", [when(Bool={SECURE: True})], {"secure": True}, True),
    ("before", [when(DateLessThan={TIME: "2026-11-23T08:26:47Z"})], {}, True),
    ("not before that very moment", [when(DateLessThan={TIME: "2026-11-23T08:26:46Z"})], {}, False),
    ("up to that very moment", [when(DateLessThanEquals={TIME: "2026-11-23T08:26:46.000Z"})], {}, True),
    ("after", [when(DateGreaterThan={TIME: "2026-11-23T08:26:45Z"})], {}, True),
    ("from that very moment", [when(DateGreaterThanEquals={TIME: "2026-11-23T08:26Z"})], {}, True),
    ("a moment of another zone, passed", [when(DateLessThan={TIME: "2026-11-23T09:00:00+01:00"})], {}, False),
    ("a moment of another zone, to come", [when(DateLessThan={TIME: "2026-11-23T08:00:00-01:00"})], {}, True),
    ("a day begins with its first second, in UTC", [when(DateLessThan={TIME: "2026-11-23"})], {}, False),
    ("epoch seconds", [when(DateLessThan={TIME: 1795422407})], {}, True),
    ("epoch seconds as text", [when(DateLessThan={TIME: "1795422406"})], {}, False),
    (
        "between two moments",
        [when(DateGreaterThan={TIME: "2026-01-01"}, DateLessThan={TIME: "2027-01-01"})],
        {},
        True,
    ),
    ("a Deny after a date that has not come", [allow(), when("Deny", DateGreaterThan={TIME: "2027-01-01"})], {}, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("statements", "changes", "permitted"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_decision_agrees_with_iam(statements, changes, permitted):
    assert decide(statements, **changes) is permitted


def test_every_known_operator_and_key_has_a_case():
    said = json.dumps([case[1] for case in CASES])
    assert [name for name in [*OPERATORS, *KEYS] if name not in said] == []


def test_decision_is_the_same_for_policy_version_2008():
    for version in ({}, {"Version": "2008-10-17"}, {"Version": "2012-10-17", "Id": "cd3ad3d9"}):
        text = json.dumps({**version, "Statement": [allow("ec2:b?ndle*", Sid="Bundle1", Condition=IN_NET)]})
        assert is_allowed(parse_policy(text), "ec2:BundleInstance", "*", context_of())


# What must hold whatever the policies are.

names = st.sampled_from(
    ["BundleInstance", "Bundle*", "bundle?nstance", "*", "Describe*", "CancelBundleTask", "cancel*"]
)
actions = st.builds("{}:{}".format, st.sampled_from(["ec2", "EC2", "s3", "*"]), names) | st.just("*")
networks = st.sampled_from(["203.0.113.0/24", "203.0.113.9", "0.0.0.0/0", "10.0.0.0/8", "2001:db8::/32", "::/0"])
regions = st.sampled_from(["us-east-1", "us-*", "*", "eu-west-1", "*-1", "US-EAST-1"])
moments = st.datetimes(NOW.replace(tzinfo=None) - timedelta(1), NOW.replace(tzinfo=None) + timedelta(1)).map(
    lambda moment: moment.strftime("%Y-%m-%dT%H:%M:%SZ")
)


def some(values):
    return values | st.lists(values, min_size=1, max_size=3)


def optional(**values):
    return st.fixed_dictionaries({}, optional=values)


def under(key, names, values):
    return {name: st.fixed_dictionaries({key: some(values)}) for name in names}


conditions = optional(
    **under(SOURCE, ("IpAddress", "NotIpAddress"), networks),
    **under(REGION, ("StringEquals", "StringNotEquals", "StringLike", "StringNotLike"), regions),
    **under(SECURE, ("Bool",), st.sampled_from(["true", "false"])),
    **under(TIME, ("DateLessThan", "DateLessThanEquals", "DateGreaterThan", "DateGreaterThanEquals"), moments),
)
statements = st.builds(
    lambda effect, action, values, condition: statement(effect, **{action: values}, Condition=condition),
    st.sampled_from(["Allow", "Allow", "Deny"]),
    st.sampled_from(["Action", "NotAction"]),
    some(actions),
    conditions,
)
requests = st.fixed_dictionaries(
    {
        "action": st.sampled_from(["ec2:BundleInstance", "ec2:DescribeBundleTasks", "ec2:CancelBundleTask"]),
        "source_ip": st.sampled_from([IPV4, IPV6, "10.1.2.3", MAPPED]),
        "secure": st.booleans(),
        "region": st.sampled_from(["us-east-1", "eu-west-1"]),
    }
)
without_address = requests.map(lambda request: {**request, "source_ip": None})


@given(st.lists(statements, min_size=1, max_size=4), requests)
@settings(max_examples=150, deadline=None)
def test_decision_agrees_with_cedar(policy, request_of):
    assert decide(policy, **request_of) == cedar_permits(policy, now=NOW, **request_of)


@given(st.lists(statements, max_size=4), statements, requests | without_address)
@settings(max_examples=50, deadline=None)
def test_added_deny_never_allows_more(policy, added, request_of):
    more = [*policy, {**added, "Effect": "Deny"}]
    assert decide([*policy, deny("s3:no")], **request_of) or not decide(more, **request_of)


@given(st.lists(statements, max_size=4), statements, requests | without_address)
@settings(max_examples=50, deadline=None)
def test_added_allow_never_allows_less(policy, added, request_of):
    less = decide([*policy, deny("s3:no")], **request_of)
    assert decide([*policy, {**added, "Effect": "Allow"}], **request_of) or not less


@given(
    st.lists(statements, min_size=1, max_size=5).flatmap(lambda all_: st.tuples(st.just(all_), st.permutations(all_))),
    requests,
)
@settings(max_examples=50, deadline=None)
def test_order_of_statements_does_not_matter(orders, request_of):
    assert decide(orders[0], **request_of) == decide(orders[1], **request_of)


@given(st.lists(statements, min_size=1, max_size=5), requests, st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_split_of_statements_into_policies_does_not_matter(policy, request_of, cut):
    def parsed(part):
        return parse_policy(json.dumps({"Statement": part})) if part else ()

    request = {**request_of}
    action = request.pop("action")
    together = is_allowed(parsed(policy), action, "*", context_of(**request))
    assert is_allowed(parsed(policy[:cut]) + parsed(policy[cut:]), action, "*", context_of(**request)) == together


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
operator_names = st.sampled_from([*OPERATORS, "DateEquals", "ForAllValues:StringLike", "NumericEquals"])
half_right = st.fixed_dictionaries(
    {
        "Effect": st.sampled_from(["Allow", "Deny"]) | json_values,
        "Action": some(actions) | json_values,
        "Resource": st.just("*") | json_values,
    },
    optional={
        "Sid": json_values,
        "Condition": json_values
        | st.dictionaries(
            operator_names, json_values | st.dictionaries(st.sampled_from([*KEYS]), json_values, max_size=2), max_size=2
        ),
    },
)


@given(
    st.fixed_dictionaries({"Version": st.sampled_from(["2012-10-17", 1]), "Statement": some(half_right) | json_values})
)
@settings(max_examples=250, deadline=None)
def test_parse_any_policy_raises_only_malformed_policy_document(policy):
    try:
        understood = parse_policy(json.dumps(policy))
    except MalformedPolicyDocument as refusal:
        str(refusal).encode("ascii")  # fit for any terminal and log
    else:
        for context in (context_of(), context_of(source_ip=None)):
            is_allowed(understood, "ec2:BundleInstance", "*", context)


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_parse_invalid_json_raises_only_malformed_policy_document(text):
    with pytest.raises(MalformedPolicyDocument):
        parse_policy(text)
