"""Policies that are refused when they are stored, with the reason, and policies that are accepted."""

import json
import re

import pytest

from thrave.identity.errors import MalformedPolicyDocument
from thrave.identity.policies import parse_policy

ALLOW = {"Effect": "Allow", "Action": "*", "Resource": "*"}
CURRENT = "aws:CurrentTime"


def policy(*statements, **elements):
    return json.dumps({"Version": "2012-10-17", "Statement": [*statements], **elements})


def without(name, **instead):
    return policy({**{key: value for key, value in ALLOW.items() if key != name}, **instead})


def when(operator, key="ec2:Region", values="us-east-1"):
    return policy({**ALLOW, "Condition": {operator: {key: values}}})


def at(moment):
    return when("DateLessThan", CURRENT, moment)


def from_network(network):
    return when("IpAddress", "aws:SourceIp", network)


def on(resource, action="s3:PutObject"):
    return policy({**ALLOW, "Action": action, "Resource": resource})


REFUSED = [
    # Documents
    ("", "not valid JSON"),
    ("{'Statement': []}", "not valid JSON"),
    ("[" * 100_000, "nested too deeply"),
    ('{"Statement": ' + "9" * 5000 + "}", "not valid JSON"),
    ('{"Statement": NaN}', "NaN is not valid JSON"),
    ("\ufeff{}", "not valid JSON"),
    ("\ud800", "not valid JSON"),
    ("[]", "The document must be a JSON object."),
    ("{}", "Statement is missing."),
    (policy(), "Statement is an empty list."),
    (policy("Allow"), "Statement 1: A statement must be a JSON object."),
    (policy(ALLOW, Version="2012-10-18"), "Version must be 2012-10-17 or 2008-10-17."),
    (policy(ALLOW, Version=["2012-10-17"]), "Version must be"),
    (policy(ALLOW, Id=7), "Id must be a text."),
    (policy(ALLOW, statement=[]), 'The element "statement" is not known here; use Version, Id, Statement.'),
    ('{"Statement": [], "Statement": []}', '"Statement" is given twice.'),
    # Statements
    ('{"Statement": {"Effect": "Deny", "Action": "*", "Effect": "Allow"}}', '"Effect" is given twice.'),
    (without("Effect"), "Statement 1: Effect is missing."),
    (policy(ALLOW, {**ALLOW, "Effect": "deny"}), 'Statement 2: Effect must be Allow or Deny, not "deny".'),
    (policy({**ALLOW, "Effect": ["Deny"]}), "Effect must be Allow or Deny"),
    (policy({**ALLOW, "Sid": "a b"}), "Sid must be letters and digits."),
    (policy({**ALLOW, "Sid": 1}), "Sid must be letters and digits."),
    (policy({**ALLOW, "Sid": "one"}, {**ALLOW, "Sid": "one"}), "(SID) in a single policy must be unique."),
    (policy({**ALLOW, "Principal": "*"}), 'The element "Principal" is not known here'),
    (policy({**ALLOW, "condition": {"Bool": {"aws:SecureTransport": "true"}}}), 'The element "condition" is not known'),
    (policy({**ALLOW, "NotAction": "ec2:*"}), "A statement has either Action or NotAction."),
    (without("Action"), "A statement has either Action or NotAction."),
    (policy({**ALLOW, "NotResource": "*"}), "A statement has either Resource or NotResource."),
    (without("Resource"), "A statement has either Resource or NotResource."),
    # Actions
    (without("Action", Action=[]), "Action is an empty list."),
    (without("Action", NotAction=[]), "NotAction is an empty list."),
    (without("Action", Action={"ec2": "*"}), "Action must be a text, or a list of texts."),
    (without("Action", Action=["*", None]), "Action must be a text, or a list of texts."),
    (without("Action", Action="BundleInstance"), "Actions/Conditions must be prefaced by a vendor"),
    (without("Action", Action="?"), "Actions/Conditions must be prefaced by a vendor"),
    (without("Action", Action="ec?:BundleInstance"), 'Vendor "ec?" is not valid'),
    (without("Action", Action="e*:BundleInstance"), 'Vendor "e*" is not valid'),
    (without("Action", Action=":BundleInstance"), 'Vendor "" is not valid'),
    (without("Action", Action="ec2:"), '"ec2:" is no action'),
    (without("Action", Action="ec2:Bundle Instance"), "is no action"),
    (without("Action", Action="ec2:Bundle[I]nstance"), "is no action"),
    (without("Action", Action="ec2:BundleIn\u017ftance"), "is no action"),
    (without("Action", Action="ec2:a:b"), "is no action"),
    (without("Action", Action="ec2:${aws:username}"), "is no action"),
    # Resources
    (on("arn:aws:ec2:*:*:instance/*", "ec2:BundleInstance"), 'Resource must be "*"'),
    (on("arn:aws:ec2:*:*:instance/*", "EC2:BundleInstance"), 'Resource must be "*"'),
    (on("arn:aws:ec2:*:*:instance/*", ["s3:*", "*"]), 'Resource must be "*"'),
    (on("arn:aws:s3:::b/*", "*:Bundle*"), 'Resource must be "*"'),
    (without("Action", NotAction="s3:*", Resource="arn:aws:s3:::b"), 'Resource must be "*"'),
    (on([]), "Resource is an empty list."),
    (on("my-bundles"), 'is neither "*" nor an ARN'),
    (on("?"), 'is neither "*" nor an ARN'),
    (on("arn:*"), 'is neither "*" nor an ARN'),
    (on("arn:aws:s?:::my-bundles/*"), "whose first parts are whole"),
    (on("arn:aws:s3:::${aws:username}/*"), "policy variable"),
    (without("Resource", NotResource=[1]), "NotResource must be a text, or a list of texts."),
    # Conditions
    (policy({**ALLOW, "Condition": []}), "Condition must be a JSON object."),
    (policy({**ALLOW, "Condition": {"Bool": {}}}), 'Condition "Bool" names no key.'),
    (policy({**ALLOW, "Condition": {"Bool": "true"}}), 'Condition "Bool" must be a JSON object.'),
    (when("StringEquals", values=[]), "StringEquals ec2:Region is an empty list."),
    (when("StringEquals", values=7), "7 is not a text."),
    (when("StringLike", values="${aws:username}"), "policy variable"),
    (when("stringlike"), 'The condition operator "stringlike" is not known here'),
    (when("StringMatches"), 'The condition operator "StringMatches" is not known here'),
    (when("NumericEquals"), 'The condition operator "NumericEquals" is not known here'),
    (when("NullIfExists", values="true"), 'The condition operator "NullIfExists" is not known here'),
    (when("StringLikeIfExistsIfExists"), "is not known here"),
    (when("ForAllValues:StringLike"), "ForAllValues holds without any"),
    (when("ForAnyValue:StringEqualsIfExists"), "leave the prefix out"),
    (when("StringLike", "aws:username"), 'The condition key "aws:username" is not known here; use ec2:Region'),
    (when("StringLike", "ec2:ResourceTag/Owner"), "is not known here"),
    (when("StringLike", "aws:SourceIp", "203.0.113.*"), "use IpAddress, NotIpAddress or Null."),
    (when("IpAddress", "ec2:Region"), '"IpAddress" cannot compare "ec2:Region"; use StringEquals'),
    (when("Bool", CURRENT, "true"), "use DateLessThan"),
    (when("StringEquals", "aws:SecureTransport", "true"), "use Bool or Null."),
    (when("DateEquals", CURRENT, "2026-11-23"), "no request comes at exactly one instant"),
    (when("DateNotEqualsIfExists", CURRENT, "2026-11-23"), "no request comes at exactly one instant"),
    (when("Bool", "aws:SecureTransport", "yes"), 'is neither "true" nor "false".'),
    (when("Bool", "aws:SecureTransport", 1), 'is neither "true" nor "false".'),
    (when("Null", values="us-east-1"), 'is neither "true" nor "false".'),
    (when("Null", values=None), 'is neither "true" nor "false".'),
    *(
        (at(moment), "is not a date")
        for moment in [
            "", "now", "2026", "2026-11", "23.11.2026", "2026-13-01", "2026-02-29", "20261123T082646Z", True, 7,
            "2026-11-23T24:30:00Z", "2026-11-23 08:26:46Z", "2026-11-23T08:26:46", "2026-11-23T08Z", "٢٠٢٦-11-23",
            "2026-11-23T08:26:46+0100", "2026-11-23T08:26:46+25:00", "2026-W48-1",
        ]
    ),
    *(
        (from_network(network), "is no")
        for network in [
            "", "*", "203.0.113.*", "203.0.113", "203.0.113.0/33", "203.0.113.0/-1", "203.0.113.9/24", "2001:db8::1/32",
            "203.0.113.0/255.255.255.0", "203.0.113.0/0.0.0.255", "0203.0.113.9", "fe80::1%eth0",
        ]
    ),
    (at(None), "null is not a text."),
    (at(1.5), "1.5 is not a text."),
    (from_network(3405803776), "is not a text."),
    (from_network("::ffff:203.0.113.0/120"), "write it as IPv4"),
    (from_network(["203.0.113.0/24", "everywhere"]), '"everywhere" is not an address'),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_parse_rejects_unsupported_policy_with_reason(text, reason):
    with pytest.raises(MalformedPolicyDocument, match=re.escape(reason)):
        parse_policy(text)


@pytest.mark.parametrize(
    "text",
    [
        policy(ALLOW, Id=""),
        policy({**ALLOW, "Sid": ""}, {**ALLOW, "Sid": ""}),
        policy(ALLOW, Version="2008-10-17"),
        without("Action", Action=["s3:*", "iam:PassRole", "elasticloadbalancing:*", "execute-api:Invoke"]),
        on(["arn:aws:s3:::my-bundles", "arn:aws:s3:::my-bundles/*"], ["s3:PutObject", "s3:PutObjectAcl"]),
        on("arn:aws-cn:iam::123456789012:role/*", "iam:PassRole"),
        when("StringLikeIfExists", values=["us-*", "eu-?est-1"]),
        from_network(["0.0.0.0/0", "::/0", "2001:DB8::/32", "127.0.0.1"]),
        at(["2026-11-23", "2026-11-23T08:26Z", "2026-11-23T08:26:46.123456-08:00", 1795422406]),
    ],
)
def test_parse_accepts_supported_iam_policy(text):
    assert parse_policy(text)


def test_pattern_with_many_stars_matches_quickly():
    hostile = policy({**ALLOW, "Action": "s3:*", "Resource": "arn:aws:s3:::" + "*a" * 400 + "b"})
    (statement,) = parse_policy(hostile)
    assert not statement.resources.match("arn:aws:s3:::" + "a" * 2000)
