"""Forms of the EC2 Query protocol as input of an operation; a round trip is in test_protocol_roundtrip.py."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrave.ec2.protocol import Blob, ProtocolError, error_document, parse, read_form, serialize
from thrave.ec2.service_models import EC2, STS

BUNDLE = "InstanceId=i-12345678&Storage.S3.Bucket=b"


def read(form, action="DescribeBundleTasks"):
    return parse(EC2.operation(action), read_form(form.encode() if isinstance(form, str) else form))


def outcome(form, action="DescribeBundleTasks"):
    """The input that was read, or the code of the refusal."""
    try:
        return read(form, action)
    except ProtocolError as refusal:
        return refusal.code


@pytest.mark.parametrize(
    ("form", "parameters"),
    [
        ("", {}),
        ("BundleId=bun-1", {"BundleIds": ["bun-1"]}),
        ("BundleId=", {"BundleIds": []}),
        ("BundleId.2=b&BundleId.1=a", {"BundleIds": ["a", "b"]}),
        ("BundleId.7=a&BundleId.10=b", {"BundleIds": ["a", "b"]}),
        ("Filter.1.Name=state&Filter.1.Value=x", {"Filters": [{"Name": "state", "Values": ["x"]}]}),
        ("Filter.1.Value.1=%E6%97%A5+%2B", {"Filters": [{"Values": ["日 +"]}]}),
        ("DryRun=TRUE", {"DryRun": True}),
        ("DryRun=false", {"DryRun": False}),
        ("Action=x&Version=y&AWSAccessKeyId=z&Timestamp=t&X-Amz-Signature=s", {}),
        ("BundleId.1=a%3Db&", {"BundleIds": ["a=b"]}),
    ],
)
def test_parse_returns_the_input_of_the_operation(form, parameters):
    assert read(form) == parameters


@pytest.mark.parametrize(
    ("form", "code", "message"),
    [
        ("Bundleid.1=x", "UnknownParameter", "The parameter Bundleid is not recognized"),
        ("Filter.1.Nome=x", "UnknownParameter", "The parameter Filter.1.Nome is not recognized"),
        ("Filter.1.Name.x=x", "UnknownParameter", "The parameter Filter.1.Name.x is not recognized"),
        ("BundleId.0=x", "UnknownParameter", "The parameter BundleId.0 is not recognized"),
        ("BundleId.01=x", "UnknownParameter", "The parameter BundleId.01 is not recognized"),
        ("BundleId.-1=x", "UnknownParameter", "The parameter BundleId.-1 is not recognized"),
        ("BundleId.99999999999=x", "UnknownParameter", "The parameter BundleId.99999999999 is not recognized"),
        (
            "BundleId.%D9%A1=x",
            "UnknownParameter",
            "The parameter BundleId.\N{ARABIC-INDIC DIGIT ONE} is not recognized",
        ),
        ("BundleId.1.2=x", "UnknownParameter", "The parameter BundleId.1.2 is not recognized"),
        ("BundleId..=x", "UnknownParameter", "The parameter BundleId. is not recognized"),
        ("=x", "UnknownParameter", "The parameter  is not recognized"),
        (
            "DryRun=yes",
            "InvalidParameterValue",
            "Value (yes) for parameter DryRun is invalid. It must be true or false.",
        ),
        (
            "Filter.1=x",
            "InvalidParameterValue",
            "Value (x) for parameter Filter.1 is invalid. It must be given member by member.",
        ),
        ("DryRun=true&DryRun=true", "InvalidQueryParameter", "The parameter DryRun is given more than once."),
        (
            "BundleId=x&BundleId.1=x",
            "InvalidQueryParameter",
            "The parameter BundleId.1 stands below another that has a value.",
        ),
        (
            "BundleId.1=x&BundleId=x",
            "InvalidQueryParameter",
            "The parameter BundleId has a value, and others stand below it.",
        ),
        ("BundleId.1=%ff", "MalformedQueryString", "The request is not UTF-8."),
        (b"BundleId.1=\xff", "MalformedQueryString", "The request is not UTF-8."),
        ("BundleId.1=%ed%a0%80", "MalformedQueryString", "The request is not UTF-8."),
        ("BundleId.1=%00", "InvalidCharacter", "The request contains a character that XML does not allow."),
        ("%1b=1", "InvalidCharacter", "The request contains a character that XML does not allow."),
    ],
)
def test_parse_rejects_forms_outside_the_model(form, code, message):
    with pytest.raises(ProtocolError) as refusal:
        read(form)
    assert (refusal.value.code, str(refusal.value)) == (code, message)


@pytest.mark.parametrize(
    ("form", "code", "message"),
    [
        ("", "MissingParameter", "The request must contain the parameter InstanceId"),
        ("InstanceId=i-1", "MissingParameter", "The request must contain the parameter Storage"),
        ("Storage.S3.Bukket=x", "UnknownParameter", "The parameter Storage.S3.Bukket is not recognized"),
        ("Storage.s3.Bucket=x", "UnknownParameter", "The parameter Storage.s3 is not recognized"),
        (
            f"{BUNDLE}&Storage.S3.UploadPolicy=%7B%7D",
            "InvalidParameterValue",
            "Value ({}) for parameter Storage.S3.UploadPolicy is invalid. It must be base64.",
        ),
    ],
)
def test_parse_checks_bundle_instance_against_its_shape(form, code, message):
    with pytest.raises(ProtocolError) as refusal:
        read(form, "BundleInstance")
    assert (refusal.value.code, str(refusal.value)) == (code, message)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("5", 5),
        ("-5", -5),
        ("2147483647", 2147483647),
        ("2147483648", None),
        ("5.0", None),
        ("\N{ARABIC-INDIC DIGIT FIVE}", None),
        ("", None),
    ],
)
def test_parse_integer_accepts_digits_within_its_type(value, number):
    expected = "InvalidParameterValue" if number is None else {"MaxResults": number}
    assert outcome(f"MaxResults={value}", "DescribeInstances") == expected


@pytest.mark.parametrize(
    ("value", "instant"),
    [
        ("2026-11-23T08:33:40.339Z", datetime(2026, 11, 23, 8, 33, 40, 339000, tzinfo=UTC)),
        ("2026-11-23T09:33:40%2B01:00", datetime(2026, 11, 23, 8, 33, 40, tzinfo=UTC)),
        ("2026-11-23", datetime(2026, 11, 23, tzinfo=UTC)),
        ("yesterday", None),
        ("0001-01-01T00:00:00%2B10:00", None),
    ],
)
def test_parse_timestamp_accepts_iso_8601(value, instant):
    expected = "InvalidParameterValue" if instant is None else {"StartTime": instant}
    assert outcome(f"StartTime={value}", "DescribeSpotPriceHistory") == expected


@pytest.mark.parametrize(
    ("value", "number"), [("0.5", 0.5), ("1e3", 1000.0), ("nan", None), ("inf", None), ("x", None)]
)
def test_parse_double_accepts_finite_numbers(value, number):
    form = f"InstanceTypeSpecification.1.Weight={value}&TotalTargetCapacity=1"
    read_as = {"InstanceTypeSpecifications": [{"Weight": number}], "TotalTargetCapacity": 1}
    expected = "InvalidParameterValue" if number is None else read_as
    assert outcome(form, "CreateCapacityReservationFleet") == expected


def test_parse_blob_keeps_the_received_text():
    wire = "eyJl%0D%0AeHAi%2BfQ%3D"
    storage = read(f"{BUNDLE}&Storage.S3.UploadPolicy={wire}", "BundleInstance")["Storage"]
    assert storage["S3"]["UploadPolicy"] == Blob("eyJl\r\neHAi+fQ=", b'{"exp"\xf9\xf4')
    assert "exp" not in repr(storage)
    assert "eyJl" not in repr(storage)


def test_parse_rejects_names_of_dots():
    with pytest.raises(ProtocolError) as refusal:
        read("Filter" + "." * 60000)
    assert refusal.value.code == "UnknownParameter"


@given(st.binary(max_size=200))
def test_random_forms_are_parsed_or_get_an_ec2_error(junk):
    refusals = {"MalformedQueryString", "InvalidCharacter", "UnknownParameter", "InvalidQueryParameter"}
    assert outcome(junk) in ({}, *refusals)


@given(st.text("BundleIdFilterNameValueDryRun.=&19 ", max_size=80))
def test_random_requests_are_parsed_or_get_an_ec2_error(junk):
    refusals = {"InvalidQueryParameter", "UnknownParameter", "InvalidParameterValue"}
    result = outcome(junk)
    assert isinstance(result, dict) or result in refusals


def test_serialize_writes_the_xml_of_aws():
    task = {"BundleId": "bun-1", "Progress": None, "BundleTaskError": {"Message": "<&>\r\x00"}}
    document = serialize(
        EC2.operation("DescribeBundleTasks"), {"BundleTasks": [task]}, version="2010-08-31", request_id="r"
    )
    assert document.decode() == (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<DescribeBundleTasksResponse xmlns="http://ec2.amazonaws.com/doc/2010-08-31/"><requestId>r</requestId>'
        "<bundleInstanceTasksSet><item><bundleId>bun-1</bundleId>"
        "<error><message>&lt;&amp;&gt;&#13;\ufffd</message></error></item></bundleInstanceTasksSet>"
        "</DescribeBundleTasksResponse>"
    )


def test_serialize_writes_an_empty_list_as_an_empty_element():
    document = serialize(EC2.operation("DescribeBundleTasks"), {"BundleTasks": []}, version="v", request_id="r")
    assert b"<bundleInstanceTasksSet/>" in document


def test_serialize_returns_true_without_an_output_shape():
    document = serialize(EC2.operation("RebootInstances"), {}, version="2014-10-01", request_id="r")
    assert document.decode() == (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<RebootInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2014-10-01/"><requestId>r</requestId>'
        "<return>true</return></RebootInstancesResponse>"
    )


def test_serialize_writes_the_xml_of_sts():
    document = serialize(STS.operation("GetCallerIdentity"), {"Account": "1"}, version="2011-06-15", request_id="r")
    assert document.decode() == (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
        "<GetCallerIdentityResult><Account>1</Account></GetCallerIdentityResult>"
        "<ResponseMetadata><RequestId>r</RequestId></ResponseMetadata></GetCallerIdentityResponse>"
    )


@pytest.mark.parametrize(("status", "fault"), [(400, "Sender"), (403, "Sender"), (500, "Receiver")])
def test_error_document_of_sts_has_sender_or_receiver(status, fault):
    assert error_document(STS.model, "A", "x < y", status=status, request_id="r").decode() == (
        '<?xml version="1.0" encoding="UTF-8"?>\n<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
        f"<Error><Type>{fault}</Type><Code>A</Code><Message>x &lt; y</Message></Error>"
        "<RequestId>r</RequestId></ErrorResponse>"
    )


def test_error_document_writes_the_xml_of_aws():
    assert error_document(EC2.model, "A.B", "x < y", status=400, request_id="r").decode() == (
        '<?xml version="1.0" encoding="UTF-8"?>\n<Response><Errors><Error><Code>A.B</Code><Message>x &lt; y</Message>'
        "</Error></Errors><RequestID>r</RequestID></Response>"
    )


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("2016-11-15", True),
        ("2008-02-01", True),
        ("2014-10-01", True),
        ("2007-08-29", False),
        ("2016-11-16", False),
        ("2014-13-01", False),
        ("2014-1-1", False),
        ("2014-10-01/", False),
        ("latest", False),
        ("", False),
    ],
)
def test_ec2_versions_are_known_from_2008_to_that_of_the_model(version, known):
    assert EC2.is_known_version(version) is known


@pytest.mark.parametrize(("version", "known"), [("2011-06-15", True), ("2016-11-15", False), ("2011-06-14", False)])
def test_sts_has_one_known_version(version, known):
    assert STS.is_known_version(version) is known
