"""Signatures of upload policies: requests of real clients, and forged ones."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.buckets.upload_policies import (
    ACCESS_KEY_ID,
    FAR,
    SECRET,
    bundle_document,
    document,
    encoded,
    signed_v2,
    signed_v4,
)
from thrave.buckets.errors import BucketError, InvalidArgument, InvalidPolicyDocument, SignatureDoesNotMatch
from thrave.buckets.upload_policy import POLICY_CHARACTERS, UploadPolicy

# Recorded requests of boto3, the AWS CLI 1 and boto 2.49, with the secret `example123example`.
ONCE = (
    "eyJleHBpcmF0aW9uIjogIjIwMzAtMDEtMDFUMDA6MDA6MDBaIiwiY29uZGl0aW9ucyI6IFt7ImJ1Y2tldCI6ICJteS1idWNrZXQifSx7ImFjbCI6"
    "ICJlYzItYnVuZGxlLXJlYWQifSxbInN0YXJ0cy13aXRoIiwgIiRrZXkiLCAid2luYW1pIl1dfQ=="
)
ONCE_SIGNATURE = "e1U3H03Afk3Kyrawo+mvC+AZAdA="
TWICE = base64.b64encode(ONCE.encode()).decode()
# Encoded twice, from a file with a newline at its end, as the AWS CLI 1 signs it.
OF_A_FILE = base64.b64encode(base64.b64encode(base64.b64decode(ONCE) + b"\n")).decode()
OF_A_FILE_SIGNATURE = "DgBckrGNi10vZl2BfQAfOjsxqf4="
# aws-cli, tests/functional/ec2/test_bundle_instance.py
CLI_POLICY = (
    '{"expiration": "2013-08-10T00:00:00.000000Z","conditions": [{"bucket": "mybucket"},{"acl": "ec2-bundle-read"},'
    '["starts-with", "$key", "foobar"]]}'
)
CLI_SIGNATURE = "ynxybUMv9YuGbPl7HZ8AFJW/2t0="
# AWS S3 documentation, "Example: Browser-Based Upload using HTTP POST (Using AWS Signature Version 4)"
V4_POLICY = """\
{ "expiration": "2015-12-30T12:00:00.000Z",
  "conditions": [
    {"bucket": "sigv4examplebucket"},
    ["starts-with", "$key", "user/user1/"],
    {"acl": "public-read"},
    {"success_action_redirect": "http://sigv4examplebucket.s3.amazonaws.com/successful_upload.html"},
    ["starts-with", "$Content-Type", "image/"],
    {"x-amz-meta-uuid": "14365123651274"},
    {"x-amz-server-side-encryption": "AES256"},
    ["starts-with", "$x-amz-meta-tag", ""],

    {"x-amz-credential": "AKIAIOSFODNN7EXAMPLE/20151229/us-east-1/s3/aws4_request"},
    {"x-amz-algorithm": "AWS4-HMAC-SHA256"},
    {"x-amz-date": "20151229T000000Z" }
  ]
}""".replace("\n", "\r\n")
V4_SIGNATURE = "8afdbf4008c03f22c2cd3cdb72e4afbb1f6a588f3255ac628749a66d7f09699e"


def verify(text, signature, secret=SECRET, access_key_id=ACCESS_KEY_ID):
    return UploadPolicy.verify(text, signature, access_key_id=access_key_id, secret=secret)


@pytest.mark.parametrize(
    ("wire_text", "signature", "signed_text"),
    [
        (ONCE, ONCE_SIGNATURE, ONCE),
        (OF_A_FILE, OF_A_FILE_SIGNATURE, OF_A_FILE),
        (TWICE, ONCE_SIGNATURE, ONCE),
        (ONCE, ONCE_SIGNATURE + "\n", ONCE),
    ],
    ids=["once", "twice, the outer signed (CLI 1)", "twice, the inner signed (boto3)", "Ruby's newline"],
)
def test_signed_text_is_found_and_kept(wire_text, signature, signed_text):
    policy = verify(wire_text, signature, "example123example")
    assert policy.text == signed_text
    assert policy.expiration.isoformat() == "2030-01-01T00:00:00+00:00"
    assert [str(condition) for condition in policy.conditions] == [
        '["eq", "$bucket", "my-bucket"]',
        '["eq", "$acl", "ec2-bundle-read"]',
        '["starts-with", "$key", "winami"]',
    ]


def test_vector_of_the_aws_cli_verifies():
    assert verify(encoded(CLI_POLICY), CLI_SIGNATURE).expiration.year == 2013


def test_empty_policy_is_rejected_although_signed():
    with pytest.raises(InvalidPolicyDocument, match="Invalid Policy: Unexpected: 'notarealpolicy'"):
        verify(encoded('{"notarealpolicy":true}'), "a5SmoLOxoM0MHpOdC25nE7KIafg=")


def test_vector_of_aws_for_version_4_verifies():
    policy = verify(encoded(V4_POLICY), V4_SIGNATURE)
    fields = policy.form_fields("user/user1/x")
    assert fields["x-amz-credential"] == "AKIAIOSFODNN7EXAMPLE/20151229/us-east-1/s3/aws4_request"
    assert fields["x-amz-signature"] == V4_SIGNATURE
    assert "AWSAccessKeyId" not in fields


@pytest.mark.parametrize(
    ("wire_text", "signature"),
    [
        (ONCE, OF_A_FILE_SIGNATURE),
        (ONCE[:-4] + "fQo=", ONCE_SIGNATURE),
        (ONCE + "\n", ONCE_SIGNATURE),
        (ONCE, ""),
        (ONCE, "ä"),
        (ONCE, ONCE_SIGNATURE.lower()),
        ("ä", ONCE_SIGNATURE),
        ("", ONCE_SIGNATURE),
        ("\ud800", ONCE_SIGNATURE),
        (base64.b64encode(TWICE.encode()).decode(), ONCE_SIGNATURE),
        (base64.b64encode(b"not a policy").decode(), ONCE_SIGNATURE),
    ],
)
def test_signature_of_other_text_is_rejected(wire_text, signature):
    with pytest.raises(SignatureDoesNotMatch):
        verify(wire_text, signature, "example123example")


def test_signature_of_another_key_is_rejected():
    with pytest.raises(SignatureDoesNotMatch):
        verify(ONCE, ONCE_SIGNATURE, "example123examplf")


def test_white_space_counts_for_the_signature_only():
    wrapped = ONCE[:76] + "\n" + ONCE[76:] + "\n"
    policy = verify(wrapped, signed_v2(wrapped))
    assert (policy.text, len(policy.conditions)) == (wrapped, 3)


def padded(length):
    """Return a policy with this number of characters, padded with white space."""
    text = encoded(bundle_document("my-bucket", "winami"))
    return text + " " * (length - len(text))


def test_longest_policy_is_accepted_and_a_longer_one_rejected():
    longest = padded(POLICY_CHARACTERS)
    assert verify(longest, signed_v2(longest)).text == longest
    too_long = padded(POLICY_CHARACTERS + 1)
    with pytest.raises(InvalidPolicyDocument, match="4096"):
        verify(too_long, signed_v2(too_long))


def v4_document(credential=f"{ACCESS_KEY_ID}/20260101/eu-west-1/s3/aws4_request", algorithm="AWS4-HMAC-SHA256"):
    return document(
        {"bucket": "my-bucket"},
        ["starts-with", "$key", "winami"],
        {"x-amz-algorithm": algorithm},
        {"x-amz-credential": credential},
        {"x-amz-date": "20260101T000000Z"},
    )


def test_version_4_policy_verifies_encoded_once_and_twice():
    once = encoded(v4_document())
    signature = signed_v4(once, date="20260101", region="eu-west-1")
    assert verify(once, signature).text == once
    assert verify(encoded(once), signature).text == once


@pytest.mark.parametrize("scope", [{"date": "20260102"}, {"region": "us-east-1"}, {"secret": "other"}])
def test_version_4_signature_of_another_scope_or_key_is_rejected(scope):
    text = encoded(v4_document())
    with pytest.raises(SignatureDoesNotMatch):
        verify(text, signed_v4(text, **{"date": "20260101", "region": "eu-west-1", **scope}))


def test_version_4_policy_for_another_key_id_is_rejected():
    text = encoded(v4_document())
    with pytest.raises(SignatureDoesNotMatch):
        verify(text, signed_v4(text, date="20260101", region="eu-west-1"), access_key_id="AKIAOTHER")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (bundle_document("my-bucket", "winami"), "x-amz-algorithm"),
        (v4_document(algorithm="AWS4-ECDSA-P256-SHA256"), "only supports AWS4-HMAC-SHA256"),
        (v4_document(credential="AKIA/20260101/eu-west-1/ec2/aws4_request"), "Credential is mal-formed"),
        (v4_document(credential="AKIA"), "Credential is mal-formed"),
    ],
)
def test_version_4_policy_without_scope_is_rejected_with_reason(policy, message):
    text = encoded(policy)
    with pytest.raises(InvalidArgument, match=message):
        verify(text, signed_v4(text))


def test_verified_policy_is_loaded_without_the_secret():
    for wire_text, signature in ((ONCE, ONCE_SIGNATURE), (OF_A_FILE, OF_A_FILE_SIGNATURE)):
        policy = verify(wire_text, signature, "example123example")
        assert UploadPolicy.parse_trusted(policy.text, policy.signature, policy.access_key_id) == policy


def test_repr_and_errors_show_no_signature_and_no_secret():
    text = encoded(document({"x-amz-security-token": "session"}, {"bucket": "my-bucket"}))
    policy = verify(text, signed_v2(text))
    assert not any(hidden in repr(policy) for hidden in (policy.signature, text, "session", SECRET))
    with pytest.raises(SignatureDoesNotMatch) as caught:
        verify(text, ONCE_SIGNATURE)
    assert not any(hidden in str(caught.value) for hidden in (signed_v2(text), ONCE_SIGNATURE, SECRET))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
conditions = st.lists(
    json_values
    | st.lists(
        st.sampled_from(["eq", "starts-with", "content-length-range", "$key", "$acl"]) | json_values, max_size=4
    ),
    max_size=5,
)
documents = st.builds(
    lambda expiration, conditions: {"expiration": expiration, "conditions": conditions},
    st.sampled_from([FAR, "2030-13-01T00:00:00Z"]) | json_values,
    conditions | json_values,
)


@given(st.one_of(json_values, documents, st.text(), st.binary()))
def test_any_signed_text_raises_only_our_errors(policy):
    text = encoded(policy)
    try:
        verified = verify(text, signed_v2(text))
        verified.form_fields("key")
        verified.check_upload("my-bucket", "key", content_length=1, now=verified.expiration)
    except BucketError as error:
        str(error).encode()


@given(st.text(), st.text() | st.just("0" * 64))
def test_any_text_raises_only_our_errors(text, signature):
    with pytest.raises(BucketError):
        verify(text, signature)


@pytest.mark.parametrize(
    "policy",
    [
        b"[" * 3000,
        b'{"a":' * 600,
        b"\xff{}",
        b"\xef\xbb\xbf{}",
        b'{"conditions":NaN}',
        b"9" * 3000,
        b'"\\ud800"',
        b"{}{}",
    ],
    ids=repr,
)
def test_json_bombs_are_rejected_as_invalid_json(policy):
    text = encoded(policy)
    with pytest.raises(InvalidPolicyDocument):
        verify(text, signed_v2(text))
