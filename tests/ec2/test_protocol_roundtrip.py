"""Requests and responses of every supported action, against botocore's serializer and parser."""

from datetime import UTC, datetime
from urllib.parse import urlencode

import pytest
from botocore.parsers import create_parser
from botocore.serialize import create_serializer
from hypothesis import given, settings
from hypothesis import strategies as st

from thrave.ec2.actions import ACTIONS
from thrave.ec2.protocol import Blob, error_document, parse, read_form, serialize
from thrave.ec2.service_models import SERVICES

SERIALIZERS, PARSERS = (
    {service: make(service.model.metadata["protocol"]) for service in SERVICES}
    for make in (lambda protocol: create_serializer(protocol, include_validation=False), create_parser)
)

xml_text = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"]) | st.sampled_from("\t\n\r&<>'\"%+;=.")
)
instants = st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001 (given below)

SCALARS = {
    "string": xml_text,
    "boolean": st.booleans(),
    "integer": st.integers(-(2**31), 2**31 - 1),
    "long": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "double": st.floats(allow_nan=False, allow_infinity=False),
    "timestamp": instants,
}


@st.composite
def structures(draw, shape, blobs, *, min_list):
    """Some of a structure's members, all of the required; an empty structure would leave no trace in a form."""
    members = sorted(shape.members)
    names = draw(st.lists(st.sampled_from(members), min_size=min_list, max_size=4, unique=True)) if members else ()
    chosen = {*names, *shape.required_members}
    return {name: draw(values(shape.members[name], blobs, min_list=min_list)) for name in sorted(chosen)}


def values(shape, blobs, *, min_list):
    if shape.type_name == "structure":
        return structures(shape, blobs, min_list=min_list)
    if shape.type_name == "list":
        return st.lists(values(shape.member, blobs, min_list=min_list), min_size=min_list, max_size=3)
    return blobs if shape.type_name == "blob" else SCALARS[shape.type_name]


def plain(value):
    """The value with blobs as bytes."""
    match value:
        case Blob():
            return value.data
        case dict():
            return {name: plain(each) for name, each in value.items()}
        case list():
            return [plain(each) for each in value]
    return value


def to_milliseconds(value):
    match value:
        case datetime():
            return value.replace(microsecond=value.microsecond // 1000 * 1000)
        case dict():
            return {name: to_milliseconds(each) for name, each in value.items()}
        case list():
            return [to_milliseconds(each) for each in value]
    return value


@pytest.mark.parametrize("name", sorted(ACTIONS))
def test_parse_reads_every_request_of_botocore(name):
    service = ACTIONS[name].service
    operation = service.operation(name)

    @settings(max_examples=100, deadline=None)
    @given(structures(operation.input_shape, st.binary(max_size=40), min_list=1))
    def check(sent):
        body = SERIALIZERS[service].serialize_to_request(sent, operation)["body"]
        assert plain(parse(operation, read_form(urlencode(body).encode()))) == sent

    check()


@pytest.mark.parametrize("name", sorted({*ACTIONS} - {"RebootInstances"}))  # which has no output
def test_botocore_reads_every_serialized_response(name):
    service = ACTIONS[name].service
    operation = service.operation(name)
    blobs = st.builds(lambda data: Blob("", data), st.binary(max_size=40))

    @settings(max_examples=100, deadline=None)
    @given(structures(operation.output_shape, blobs, min_list=0))
    def check(result):
        document = serialize(operation, result, version=service.newest_version, request_id="an-id")
        response = {"status_code": 200, "headers": {}, "body": document}
        received = PARSERS[service].parse(response, operation.output_shape)
        assert received.pop("ResponseMetadata")["RequestId"] == "an-id"
        assert received == to_milliseconds(plain(result))

    check()


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_botocore_reads_every_error_document(service):
    operation = next(action.service.operation(name) for name, action in ACTIONS.items() if action.service is service)

    @given(xml_text, xml_text)
    def check(code, message):
        document = error_document(service.model, code, message, status=400, request_id="an-id")
        response = {"status_code": 400, "headers": {}, "body": document}
        received = PARSERS[service].parse(response, operation.output_shape)
        assert (received["Error"].get("Code") or "", received["Error"].get("Message") or "") == (code, message)
        assert received["ResponseMetadata"]["RequestId"] == "an-id"

    check()
