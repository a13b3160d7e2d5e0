"""`thrave doctor` on real services: findings, remedies, and that it leaves no objects."""

import json
import socket
import threading
import uuid

import pytest

from support.disks.raw_disk import make_disk
from support.servers import stores
from thrave.buckets.s3_objects import S3ObjectClient, read_buckets
from thrave.doctor.check_context import CheckFailed
from thrave.doctor.check_table import CHECKS, CLEAN_UP
from thrave.doctor.checks import Check, Outcome, run_check

NAMES = [check.name for check in (*CHECKS, CLEAN_UP)]


@pytest.fixture
def data(tmp_path, thrave_json):
    """A data directory with an account whose access key is Alice's key in the stores."""
    account = thrave_json("account", "create", "alice", "--data-dir", tmp_path / "data")["accountId"]
    credentials = tmp_path / "alice.credentials"
    credentials.write_text(f"[default]\naws_access_key_id={stores.ALICE.access_key_id}\n"
                           f"aws_secret_access_key={stores.ALICE.secret_access_key}\n")  # fmt: skip
    credentials.chmod(0o600)
    thrave_json("account", "key", "import", account, "--credentials", credentials, "--data-dir", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def doctor(data, thrave, monkeypatch):
    """Function that runs `thrave doctor` and returns its exit code and the findings by check name."""

    def run(*words, **settings):
        for name, value in settings.items():
            monkeypatch.setenv(f"THRAVE_{name.upper()}", str(value))
        status, stdout, stderr = thrave("doctor", "--data-dir", data, "--output", "json", *words)
        assert stores.ALICE.secret_access_key not in stdout + stderr
        return status, {found["check"]: found for found in json.loads(stdout)["checks"]}

    return run


def outcomes(found):
    return {name: finding["outcome"] for name, finding in found.items()}


def failed(found):
    return {name for name, outcome in outcomes(found).items() if outcome == "failed"}


def test_check_names_are_unique_and_needs_name_earlier_checks():
    assert len({*NAMES}) == len(NAMES)
    assert all({*check.needs} <= {*NAMES[:number]} for number, check in enumerate((*CHECKS, CLEAN_UP)))


def test_doctor_passes_with_bucket_directories_and_leaves_no_objects(doctor, data):
    status, found = doctor()
    assert (status, failed(found), [*found]) == (0, set(), NAMES)
    assert found["POST, version 4"]["outcome"] == "ok"
    assert [*(data / "buckets").glob("[!.]*")] == [*(data / "buckets" / ".owners").iterdir()] == []


def test_doctor_names_missing_file(doctor, data):
    (data / "vault.key").unlink()
    _, found = doctor()
    assert found["vault key"]["outcome"] == "failed"
    assert found["vault key"]["detail"] == f"{data / 'vault.key'}: No such file or directory"


def test_doctor_checks_version_and_clock_of_postgresql(doctor, postgres, thrave_json, tmp_path):
    url = postgres.new_database()
    _, before = doctor(database_url=url)
    assert failed(before) == {"tables"}
    thrave_json("account", "create", "alice", "--data-dir", tmp_path / "fleet")
    _, found = doctor("--data-dir", tmp_path / "fleet")
    assert found["reachable"]["detail"].startswith("PostgreSQL ")
    assert outcomes(found)["database clock"] == outcomes(found)["vault check"] == "ok"


def test_doctor_creates_nothing_without_data_directory(thrave, tmp_path):
    status, stdout, stderr = thrave("doctor", "--data-dir", tmp_path / "data")
    assert (status, "thrave account create" in stdout, "reachable" in stderr) == (1, True, True)
    assert [*tmp_path.iterdir()] == []


def test_failed_check_has_remedy_and_skips_dependent_checks(doctor, data, tmp_path):
    (data / "vault.key").chmod(0o644)
    status, found = doctor()
    assert (status, failed(found)) == (1, {"vault key"})
    assert "mode 0600" in found["vault key"]["remedy"]
    assert found["vault check"]["detail"] == "needs: vault key"


def test_doctor_never_prints_database_url(data, thrave, monkeypatch):
    monkeypatch.setenv("THRAVE_DATABASE_URL", "postgresql:/nonsense:hunter2@")
    status, stdout, stderr = thrave("doctor", "--data-dir", data)
    assert (status, "hunter2" in stdout + stderr) == (2, False)
    assert "THRAVE_DATABASE_URL" in stderr


@pytest.mark.parametrize(
    ("words", "check", "says"),
    [
        (["--stop-command", "/no/such/program"], "commands", "stop_command: /no/such/program"),
        ([], "root volumes", "No such file"),
    ],
)
def test_doctor_names_instance_that_cannot_be_bundled(doctor, data, thrave_json, tmp_path, words, check, says):
    disk = make_disk(tmp_path / "disk.raw", 1 << 20)
    account = thrave_json("account", "list", "--data-dir", data)["accounts"][0]["accountId"]
    added = thrave_json("instance", "add", "--account", account, "--platform", "windows",
                        "--root-volume", disk, *words, "--data-dir", data)  # fmt: skip
    if check == "root volumes":
        disk.unlink()
    status, found = doctor()
    assert (status, failed(found)) == (1, {check})
    assert added["instanceId"] in found[check]["detail"]
    assert says in found[check]["detail"]


def s3(store, **settings):
    return {"store": "s3", "s3_endpoint": store.url, **settings}


def by_the_service(store):
    key = {"s3_access_key_id": stores.SERVICE.access_key_id, "s3_secret_access_key": stores.SERVICE.secret_access_key}
    return s3(store, upload_credentials="service", **key)


def buckets_of(store, key):
    return [name for page in S3ObjectClient(store.connection(key))._pages(None, {}, read_buckets) for name in page]


@pytest.mark.parametrize(
    "name", [pytest.param("seaweedfs", marks=pytest.mark.s3), pytest.param("rgw", marks=pytest.mark.rgw)]
)
class TestStores:
    @pytest.fixture
    def store(self, name, request):
        return request.getfixturevalue(name)

    def test_doctor_passes_with_upload_policies(self, doctor, store):
        bucket = f"alice-{uuid.uuid4().hex[:12]}"
        status, found = doctor("--bucket", bucket, **s3(store))
        warnings = {check for check, outcome in outcomes(found).items() if outcome == "warning"}
        assert (status, failed(found)) == (0, set())
        assert warnings == ({"AWS CLI policy"} if store.name == "rgw" else set())
        assert found["HEAD and ETag"]["detail"] == "size and ETag"
        assert bucket not in buckets_of(store, stores.ALICE)

    def test_doctor_passes_with_service_key_and_leaves_no_bucket(self, doctor, store):
        status, found = doctor(**by_the_service(store))
        assert (status, failed(found)) == (0, set())
        assert not [name for name in buckets_of(store, stores.SERVICE) if name.startswith("thrave-doctor-")]

    def test_doctor_keeps_existing_bucket(self, doctor, store):
        bucket = f"alice-{uuid.uuid4().hex[:12]}"
        objects = S3ObjectClient(store.connection(stores.ALICE))
        objects._requests.send("PUT", bucket)
        objects.put(bucket, "mine", b"x")
        status, _ = doctor("--bucket", bucket, **s3(store))
        assert (status, [*objects.list(bucket, "")]) == (0, ["mine"])

    def test_doctor_names_key_that_store_does_not_know(self, doctor, store, thrave_json, data):
        key = thrave_json("account", "create", "bob", "--data-dir", data)["accessKeyId"]
        status, found = doctor("--access-key-id", key, **s3(store))
        refused = (
            "create bucket" if store.name == "rgw" else "key"
        )  # RGW's response is that of a key without permission
        assert (status, failed(found)) == (1, {refused})
        assert "key import" in found[refused]["remedy"]


def test_unreachable_store_fails_one_check(doctor):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    status, found = doctor(store="s3", s3_endpoint=f"http://127.0.0.1:{port}")
    assert (status, failed(found)) == (1, {"available"})
    assert outcomes(found)["clean-up"] == "skipped"


@pytest.mark.rgw
def test_doctor_fails_on_untrusted_certificate(doctor, rgw):
    _, found = doctor(**{**s3(rgw), "s3_endpoint": rgw.tls_url})
    assert failed(found) == {"available", "TLS"}
    assert "not trusted" in found["available"]["detail"]


@pytest.mark.rgw
def test_doctor_fails_on_certificate_that_expires_soon(doctor, rgw):
    _, found = doctor(**s3(rgw, s3_ca_file=rgw.ca) | {"s3_endpoint": rgw.tls_url})
    assert failed(found) == {"TLS"}
    assert "the certificate expires in 0 days" in found["TLS"]["detail"]


def test_hanging_check_is_abandoned():
    over = threading.Event()
    found = run_check(Check("store", "hang", "", "", lambda _context: over.wait(60), seconds=0.1), None)
    over.set()
    assert (found.outcome, "no result after" in found.detail) == (Outcome.FAILED, True)


@pytest.mark.parametrize(
    ("error", "optional", "outcome", "detail"),
    [
        (CheckFailed("two\nlines"), False, Outcome.FAILED, "two lines"),
        (CheckFailed("it"), True, Outcome.WARNING, "it"),
        (ValueError("a secret"), False, Outcome.FAILED, "unexpected error: ValueError"),
    ],
)
def test_check_error_is_reported_without_secrets(error, optional, outcome, detail):
    def fail(_context):
        raise error

    found = run_check(Check("store", "fail", "", "", fail, optional=optional), None)
    assert (found.outcome, found.detail) == (outcome, detail)
