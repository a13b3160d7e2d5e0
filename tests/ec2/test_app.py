"""The API over real HTTP: unmodified boto3, and raw sockets for requests that no client sends."""

import json
import re
import socket
import urllib.request
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from structlog.testing import capture_logs

from support.buckets.s3_storage import storage
from thrave.ec2.app import MAX_BYTES, create_app
from thrave.health import DATABASE, STORE, HealthCache

DESCRIBE = b"Action=DescribeBundleTasks&Version=2016-11-15"
FORM = "application/x-www-form-urlencoded"


def send(endpoint, request):
    """Send bytes and give the whole response: status, headers, body."""
    place = urlsplit(endpoint)
    with socket.create_connection((place.hostname, place.port), timeout=20) as connection:
        connection.sendall(request)
        response = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = response.decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


def signed(endpoint, key, *, body=DESCRIBE, content_type=FORM, method="POST", framing=None, path="/"):
    """A signed request as bytes; `framing` replaces the Content-Length."""
    headers = {"Content-Type": content_type} if content_type else {}
    request = AWSRequest(method, endpoint + path, data=body, headers=headers)
    SigV4Auth(Credentials(key.access_key_id, key.secret_access_key), "ec2", "us-east-1").add_auth(request)
    lines = [f"{method} {path} HTTP/1.1", f"Host: {urlsplit(endpoint).netloc}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    lines.append(framing or f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def code_of(response):
    return re.search("<Code>(.*)</Code>", response[2])[1]


def test_response_has_request_id_in_body_and_header(endpoint, service):
    status, headers, body = send(endpoint, signed(endpoint, service.key))
    assert status == 200
    assert f"<requestId>{headers['x-amzn-requestid']}</requestId>" in body
    assert headers["content-type"] == "text/xml;charset=utf-8"
    status, headers, body = send(endpoint, signed(endpoint, service.key, body=b"Action=X&Version=2016-11-15"))
    assert status == 400
    assert f"<RequestID>{headers['x-amzn-requestid']}</RequestID>" in body


@pytest.mark.parametrize("version", ["2008-08-08", "2010-08-31", "2014-10-01", "2016-11-15"])
def test_response_namespace_has_the_callers_version(endpoint, service, version):
    body = b"Action=DescribeBundleTasks&Version=" + version.encode()
    _, _, response = send(endpoint, signed(endpoint, service.key, body=body))
    assert f'<DescribeBundleTasksResponse xmlns="http://ec2.amazonaws.com/doc/{version}/">' in response
    assert "<bundleInstanceTasksSet/>" in response


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "MissingParameter"),
        (b"Version=2016-11-15", 400, "MissingParameter"),
        (b"Action=DescribeBundleTasks", 400, "MissingParameter"),
        (b"Action=DescribeBundleTask&Version=2016-11-15", 400, "InvalidAction"),
        (b"Action=describebundletasks&Version=2016-11-15", 400, "InvalidAction"),
        (b"Action=RunInstances&Version=2016-11-15", 400, "InvalidAction"),
        (b"Action=DescribeBundleTasks&Version=2006-06-26", 400, "NoSuchVersion"),
        (b"Action=DescribeBundleTasks&Version=3000-01-01", 400, "NoSuchVersion"),
        (DESCRIBE + b"&Verbose=1", 400, "UnknownParameter"),
        (DESCRIBE + b"&DryRun=perhaps", 400, "InvalidParameterValue"),
        (DESCRIBE + b"&BundleId.99999999999999=x", 400, "UnknownParameter"),
        (DESCRIBE + b"&Version=2016-11-15", 400, "InvalidQueryParameter"),
        (DESCRIBE + b"&BundleId.1=%FF", 400, "MalformedQueryString"),
        (DESCRIBE + b"&BundleId.1=%00", 400, "InvalidCharacter"),
        (DESCRIBE + b"&Filter.1.Name=color&Filter.1.Value.1=x", 400, "InvalidParameterValue"),
        (DESCRIBE + b"&BundleId.1=bun-12345678", 400, "InvalidBundleID.NotFound"),
        (DESCRIBE + b"&DryRun=true", 412, "DryRunOperation"),
        (b"Action=CancelBundleTask&Version=2016-11-15", 400, "MissingParameter"),
        (b"Action=CancelBundleTask&Version=2016-11-15&BundleId=x", 400, "InvalidBundleID.NotFound"),
        (DESCRIBE + b"&x=" + b"x" * MAX_BYTES, 413, "RequestEntityTooLarge"),
    ],
)
def test_invalid_request_gets_ec2_code_and_status(endpoint, service, body, status, code):
    response = send(endpoint, signed(endpoint, service.key, body=body))
    assert (response[0], code_of(response)) == (status, code)


@pytest.mark.parametrize(
    ("content_type", "code"),
    [
        (FORM, None),
        (f"{FORM}; charset=utf-8", None),
        (f"{FORM.title()};charset=UTF-8", None),
        (None, None),
        ("text/xml; charset=utf-8", "UnsupportedProtocol"),
        ("multipart/form-data; boundary=x", "UnsupportedProtocol"),
        ("", "UnsupportedProtocol"),
    ],
)
def test_body_content_type_may_have_a_charset(endpoint, service, content_type, code):
    request = signed(endpoint, service.key, content_type=content_type)
    if content_type == "":
        request = request.replace(b"Connection", b"Content-Type: \r\nConnection")
    response = send(endpoint, request)
    assert (code_of(response) if response[0] != 200 else None) == code


def test_chunked_body_is_read_up_to_the_limit(endpoint, service):
    too_much = b"10001\r\n" + b"x" * (MAX_BYTES + 1) + b"\r\n"  # and no end
    response = send(endpoint, signed(endpoint, service.key, body=b"", framing="Transfer-Encoding: chunked") + too_much)
    assert (response[0], code_of(response)) == (413, "RequestEntityTooLarge")


def test_client_disconnect_is_not_logged_as_error(endpoint, service):
    place = urlsplit(endpoint)
    with capture_logs() as logs:
        with socket.create_connection((place.hostname, place.port), timeout=20) as connection:
            connection.sendall(signed(endpoint, service.key)[:-10])
        assert send(endpoint, signed(endpoint, service.key))[0] == 200
    assert logs == []


def test_query_string_above_a_limit_is_refused(endpoint):
    response = send(
        endpoint, b"GET /?x=" + b"x" * (MAX_BYTES - 1) + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    assert response[0] in {400, 413}


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_http_methods_are_refused(endpoint, method):
    status, headers, _ = send(endpoint, f"{method} / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert status == 405
    assert "get" in headers["allow"]


@pytest.mark.parametrize(
    "request_line",
    ["GET / HTTP/1.1", "GET /?Action=DescribeInstances&Version=2016-11-15 HTTP/1.1", "GET /?%FF HTTP/1.1"],
)
def test_request_without_credentials_gets_no_details(endpoint, request_line):
    response = send(endpoint, f"{request_line}\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert (response[0], code_of(response)) in {(400, "MissingParameter"), (400, "MalformedQueryString")}


def test_unauthorized_caller_gets_the_same_error_with_and_without_dry_run(service, current_app):
    current_app.app = create_app(
        replace(service.backend, is_allowed=lambda caller, action, on: action != "ec2:DescribeBundleTasks")
    )
    for body in (DESCRIBE, DESCRIBE + b"&DryRun=true", DESCRIBE + b"&BundleId.1=bun-12345678"):
        response = send(current_app.url, signed(current_app.url, service.key, body=body))
        assert (response[0], code_of(response)) == (403, "UnauthorizedOperation")
    dry = b"Action=DescribeInstances&Version=2016-11-15&DryRun=true"
    allowed = send(current_app.url, signed(current_app.url, service.key, body=dry))
    assert (allowed[0], code_of(allowed)) == (412, "DryRunOperation")


def test_unexpected_error_is_logged_with_request_id_and_hidden_from_the_caller(service, current_app):
    def fail(caller, action, resource):
        raise ZeroDivisionError(f"the secret of {caller.account_id}")

    current_app.app = create_app(replace(service.backend, is_allowed=fail))
    with capture_logs() as logs:
        status, headers, body = send(current_app.url, signed(current_app.url, service.key))
    assert status == 500
    assert "<Code>InternalError</Code>" in body
    assert "secret" not in body
    assert "Zero" not in body
    (entry,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert entry["request_id"] == headers["x-amzn-requestid"]
    assert "ZeroDivisionError" in entry["traceback"]
    assert service.key.secret_access_key not in str(entry)


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"access_key_id": "AKIDNOBODY"}, 401, "AuthFailure"),
        ({"secret_access_key": "x" * 40}, 401, "AuthFailure"),
    ],
)
def test_wrong_credentials_get_the_message_of_aws(service, client_of, change, status, code):
    with pytest.raises(ClientError) as refusal:
        client_of(replace(service.key, **change)).describe_instances()
    error = refusal.value.response
    assert (error["ResponseMetadata"]["HTTPStatusCode"], error["Error"]["Code"]) == (status, code)
    assert error["Error"]["Message"] == "AWS was not able to validate the provided access credentials"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_presigned_url_bundles_without_headers(service, ec2, method):
    service.add_instance("i-12345678")
    parameters = {"InstanceId": "i-12345678", "Storage": storage(service.key)}
    url = ec2.generate_presigned_url("bundle_instance", Params=parameters, HttpMethod=method)
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=20) as response:
        assert b"<state>pending</state>" in response.read()
    assert [task["InstanceId"] for task in ec2.describe_bundle_tasks()["BundleTasks"]] == ["i-12345678"]


def request_unsigned(endpoint, path, method="GET"):
    return send(endpoint, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())


def test_health_checks_need_no_signature_and_show_no_error(service, current_app):
    health = HealthCache({DATABASE: 1.0, STORE: 1.0})
    current_app.app = create_app(replace(service.backend, health=health))
    assert request_unsigned(current_app.url, "/healthz")[0] == 200
    health.record(DATABASE, None)
    health.record(STORE, "Cannot connect to store.internal")
    status, headers, body = request_unsigned(current_app.url, "/readyz")
    assert (status, headers["content-type"]) == (503, "application/json")
    assert json.loads(body)["components"] == {"database": {"state": "ok"}, "store": {"state": "failed"}}
    health.record(STORE, None)
    assert request_unsigned(current_app.url, "/readyz?Action=DescribeInstances")[0] == 200
    assert request_unsigned(current_app.url, "/readyz", "HEAD")[::2] == (200, "")


@pytest.mark.parametrize(("path", "method"), [("/healthz/", "GET"), ("/healthz", "POST"), ("/metrics", "GET")])
def test_other_paths_and_methods_are_refused_as_before(endpoint, path, method):
    assert code_of(request_unsigned(endpoint, path, method)) == "InvalidPath"
