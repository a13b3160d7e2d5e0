"""A client that does not own an instance, or has no key, learns nothing about it and changes nothing."""

import json
from dataclasses import replace

import pytest
from botocore.exceptions import ClientError
from structlog.testing import capture_logs

from ec2.test_app import FORM, code_of, send, signed
from support.buckets.s3_storage import storage
from thrave.buckets import errors as bucket_errors
from thrave.buckets.upload_policy import UploadPolicy
from thrave.compute import errors as instance_errors
from thrave.ec2.app import create_app
from thrave.ec2.errors import to_ec2_error
from thrave.volumes import errors as volume_errors

INSTANCE = "i-0123456789abcdef0"
NOT_THERE = "i-0fedcba9876543210"
CALLS = {
    "start_instances": "InstanceIds",
    "stop_instances": "InstanceIds",
    "reboot_instances": "InstanceIds",
    "terminate_instances": "InstanceIds",
    "describe_instances": "InstanceIds",
    "bundle_instance": "InstanceId",
}


def refusal(client, key, call, instance_id, **options):
    """Return code and message without the requested id."""
    given = {CALLS[call]: instance_id if call == "bundle_instance" else [instance_id], **options}
    if call == "bundle_instance":
        given["Storage"] = storage(key)
    with pytest.raises(ClientError) as refused:
        getattr(client, call)(**given)
    error = refused.value.response["Error"]
    return error["Code"], error["Message"].replace(instance_id, "ID")


def broken_file(service, content):
    service.add_instance(INSTANCE)
    (service.instances._files._root / f"{INSTANCE}.json").write_text(content)


def with_state_command(service, *command):
    service.add_instance(INSTANCE, state_command=command)


def not_executable(service):
    program = service.volume.path.with_name("program")
    program.write_bytes(b"not a program")
    program.chmod(0o755)
    with_state_command(service, str(program))


INSTANCES = {
    "is well": lambda service: service.add_instance(INSTANCE),
    "has a command that fails": lambda service: with_state_command(service, "false"),
    "has a command that cannot be executed": not_executable,
    "has a command that is not there": lambda service: with_state_command(service, "/no/such/program"),
    "has a command that says nothing": lambda service: with_state_command(service, "true"),
    "has a file that is not JSON": lambda service: broken_file(service, "{oops"),
    "has an empty file": lambda service: broken_file(service, ""),
    "has a file that names an owner and nothing else": lambda service: broken_file(
        service, json.dumps({"accountId": service.key.account_id})
    ),
    "has a file with a field that nobody knows": lambda service: broken_file(
        service, json.dumps({"instanceId": INSTANCE, "accountId": service.key.account_id, "colour": "red"})
    ),
}


@pytest.mark.parametrize("what", INSTANCES)
def test_other_account_gets_not_found_for_an_existing_instance(service, client_of, what):
    INSTANCES[what](service)
    key = service.another_key()
    other = client_of(key)
    for call in CALLS:
        there, not_there = (refusal(other, key, call, each) for each in (INSTANCE, NOT_THERE))
        assert there == not_there
        assert there[0] == "InvalidInstanceID.NotFound"


@pytest.mark.parametrize("dry_run", [False, True])
def test_request_of_another_account_runs_no_command(service, client_of, tmp_path, dry_run):
    ran = tmp_path / "ran"
    commands = {
        f"{name}_command": ("sh", "-c", f"echo {name} >> {ran}; echo running")
        for name in ("state", "stop", "start", "force_stop")
    }
    service.add_instance(INSTANCE, **commands)
    key = service.another_key()
    for call in CALLS:
        refusal(client_of(key), key, call, INSTANCE, **({"DryRun": True} if dry_run else {}))
    assert client_of(key).describe_instances()["Reservations"] == []
    assert not ran.exists()
    client_of(service.key).describe_instances()
    assert ran.read_text().split() == ["state"]


@pytest.mark.parametrize("what", [what for what in INSTANCES if what != "is well"])
def test_error_of_a_broken_instance_has_no_path_and_is_not_internal(service, ec2, tmp_path, what):
    INSTANCES[what](service)
    with capture_logs() as logs:
        told = {refusal(ec2, service.key, call, INSTANCE) for call in CALLS if call != "describe_instances"}
    assert {code for code, _ in told} <= {"Unavailable", "IncorrectInstanceState", "InvalidInstanceID.NotFound"}
    assert str(tmp_path) not in str(told)
    assert "/no/such" not in str(told)
    assert not [entry for entry in logs if "traceback" in entry]


@pytest.mark.parametrize("what", INSTANCES)
def test_describe_instances_returns_instances_next_to_a_broken_one(service, ec2, what):
    INSTANCES[what](service)
    service.add_instance("i-00000001")
    shown = [one["InstanceId"] for each in ec2.describe_instances()["Reservations"] for one in each["Instances"]]
    assert "i-00000001" in shown


def subclasses(kind):
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


FOREIGN = sorted(
    subclasses(instance_errors.InstanceError)
    | subclasses(bucket_errors.BucketError)
    | subclasses(volume_errors.VolumeError),
    key=lambda kind: f"{kind.__module__}.{kind.__name__}",
)


@pytest.mark.parametrize("kind", FOREIGN, ids=lambda kind: kind.__name__)
def test_to_ec2_error_converts_every_component_error_without_its_message(kind):
    error = kind.__new__(kind, "/srv/secret/path")
    error.args = ("/srv/secret/path",)
    error.__dict__.update({"message": "/srv/secret/path", "instance_id": INSTANCE})
    if issubclass(kind, bucket_errors.BucketError):
        error.code = getattr(kind, "code", "SlowDown")
    response = to_ec2_error(error)
    assert response.code in {
        "InvalidInstanceID.NotFound",
        "IncorrectInstanceState",
        "Unavailable",
        "InvalidParameterValue",
    }
    assert "/srv" not in response.message


def test_to_ec2_error_returns_none_for_unexpected_errors():
    assert to_ec2_error(ZeroDivisionError()) is None


@pytest.mark.parametrize("path", ["/", "/services/compute", "/services/Eucalyptus", "/services/Cloud"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_api_accepts_the_paths_of_old_clients(endpoint, service, path, slash):
    request = signed(endpoint, service.key, path=path.rstrip("/") + slash or "/")
    assert send(endpoint, request)[0] == 200


def test_signature_uses_the_path_as_sent(endpoint, service):
    moved = signed(endpoint, service.key, path="/services/compute").replace(b"/services/compute", b"/services/Cloud", 1)
    assert (send(endpoint, moved)[0], code_of(send(endpoint, moved))) == (401, "AuthFailure")


@pytest.mark.parametrize("path", ["/nothing/here", "/services/compute//", "/services", "/%2F", "/services/cloud", "//"])
def test_unknown_path_error_has_the_right_url(endpoint, service, path):
    response = send(endpoint, signed(endpoint, service.key, path=path))
    assert (response[0], code_of(response)) == (404, "InvalidPath")
    assert f"Use {endpoint} as the endpoint" in response[2]


def test_invalid_host_is_not_repeated_in_the_error(endpoint):
    response = send(endpoint, b"GET /x HTTP/1.1\r\nHost: <b>\r\nConnection: close\r\n\r\n")
    assert "b&gt;" not in response[2]
    assert f"Use {endpoint} as" in response[2]


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND"])
def test_only_get_and_post_run_actions(endpoint, service, ec2, method):
    service.add_instance(INSTANCE)
    body = f"Action=StopInstances&Version=2016-11-15&InstanceId.1={INSTANCE}".encode()
    request = signed(endpoint, service.key, method=method, body=body)
    assert send(endpoint, request)[0] == 405
    assert service.instances.get(INSTANCE).state == "running"


def test_browser_gets_an_explanation(endpoint):
    status, headers, body = send(
        endpoint, b"GET / HTTP/1.1\r\nHost: x:1\r\nAccept: text/html,*/*\r\nConnection: close\r\n\r\n"
    )
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert "aws --endpoint-url http://x:1" in body


def test_authentication_failure_is_logged_without_secrets(endpoint, service):
    request = signed(endpoint, replace(service.key, secret_access_key="x" * 40))
    changed = request.replace(b"Host: ", b"Host: backend.internal\r\nX-Forwarded-Host: ", 1)
    with capture_logs() as logs:
        send(endpoint, changed)
    (entry,) = logs
    assert entry["event"] == "request refused"
    assert entry["host"] == "backend.internal"
    assert entry["access_key_id"] == service.key.access_key_id
    assert entry["signing"] == "version 4, header"
    assert entry["remote"] == "127.0.0.1"
    assert entry["clock_difference"].endswith(" s")
    assert "Host header" in entry["advice"]
    assert "x_forwarded_host" in entry
    assert "Signature=" not in str(entry)


def test_signature_version_2_can_be_disabled(service, current_app):
    query = (
        f"AWSAccessKeyId={service.key.access_key_id}&Signature=x&SignatureVersion=2&SignatureMethod=HmacSHA256"
        "&Timestamp=2026-01-01T00:00:00Z"
    )
    request = f"GET /?{query} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    current_app.app = create_app(service.backend)
    assert code_of(send(current_app.url, request)) == "RequestExpired"
    current_app.app = create_app(replace(service.backend, allow_signature_v2=False))
    response = send(current_app.url, request)
    assert (response[0], code_of(response)) == (400, "InvalidParameterValue")
    assert "signature version 4 only" in response[2]
    assert send(current_app.url, signed(current_app.url, service.key, content_type=FORM))[0] == 200


def test_upload_policy_check_does_the_same_work_for_unknown_and_wrong_keys(service, ec2, monkeypatch):
    service.add_instance(INSTANCE)
    verified, verify = [], UploadPolicy.verify
    monkeypatch.setattr(
        UploadPolicy, "verify", lambda *args, **keywords: verified.append(1) or verify(*args, **keywords)
    )
    other = service.another_key()
    responses = set()
    for access_key_id in ("AKIANOBODY", other.access_key_id, service.key.access_key_id):
        s3 = storage(service.key, UploadPolicySignature="c2ln", AWSAccessKeyId=access_key_id)
        with pytest.raises(ClientError) as refused:
            ec2.bundle_instance(InstanceId=INSTANCE, Storage=s3)
        error = refused.value.response["Error"]
        responses.add((error["Code"], error["Message"].replace(access_key_id, "KEY")))
    assert len(responses) == 1
    assert len(verified) == 3
