"""Errors of object stores in commands: one line with the remedy."""

import socket

import pytest

from support.servers.scripted_store import error, http, scripted
from thrave.buckets import retrying_store

LOCATION = "s3://My_Old_Bucket/win.manifest.xml"


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """Access keys of a user; hides the settings of the account that runs the tests."""
    for name in ("AWS_PROFILE", "AWS_REGION", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    environment = {
        "AWS_CONFIG_FILE": tmp_path / "config", "AWS_SHARED_CREDENTIALS_FILE": tmp_path / "credentials",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "secret",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(retrying_store, "FIRST_WAIT", 0.01)


def show(thrave, monkeypatch, url):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    status, _, stderr = thrave("show", LOCATION)
    assert "Traceback" not in stderr
    return int(status), stderr


def nowhere():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


@pytest.mark.parametrize(
    ("url", "says"),
    [(None, "Connection refused"), ("http://no-such-host.invalid", "does not resolve")],
    ids=["refused", "not resolved"],
)
def test_unreachable_store_is_reported_after_two_attempts(thrave, monkeypatch, url, says):
    status, stderr = show(thrave, monkeypatch, url or nowhere())
    assert (status, len(stderr.splitlines())) == (1, 2)
    assert says in stderr.splitlines()[-1]
    assert "503" not in stderr


def test_refused_request_without_credentials_lists_searched_places(thrave, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with scripted(error(403, "AccessDenied")) as script:
        status, stderr = show(thrave, monkeypatch, script.url)
    assert (status, "No credentials were found" in stderr) == (4, True)
    assert str(tmp_path / "credentials") in stderr


def test_refused_request_with_credentials_lists_no_places(thrave, monkeypatch):
    with scripted(error(403, "AccessDenied")) as script:
        status, stderr = show(thrave, monkeypatch, script.url)
    assert (status, "No credentials" in stderr) == (4, False)


def test_wrong_region_is_reported_with_settings(thrave, monkeypatch):
    with scripted(http(301, x_amz_bucket_region="eu-west-1")) as script:
        status, stderr = show(thrave, monkeypatch, script.url)
    assert (status, "eu-west-1" in stderr, "AWS_REGION" in stderr) == (1, True, True)


def test_busy_store_is_retried(thrave, monkeypatch):
    with scripted(error(503, "SlowDown"), http(529), error(404, "NoSuchKey")) as script:
        status, _ = show(thrave, monkeypatch, script.url)
    assert (status, len(script.requests)) == (3, 3)


@pytest.mark.parametrize("proxy", ["http://joe:hunter2@{}", "joe:hunter2@{}"])
def test_unreachable_proxy_is_named_without_password(thrave, monkeypatch, proxy):
    where = nowhere().removeprefix("http://")
    monkeypatch.setenv("http_proxy", proxy.format(where))
    status, stderr = show(thrave, monkeypatch, "http://store.example")
    assert (status, f"the proxy {where}" in stderr, "hunter2" in stderr) == (1, True, False)


def test_doctor_names_setting_of_missing_credentials_file(thrave, tmp_path):
    config = tmp_path / "thrave.toml"
    config.write_text(f'data_dir = "{tmp_path / "data"}"\nstore = "s3"\ns3_credentials_file = "{tmp_path / "none"}"\n')
    status, stdout, _ = thrave("doctor", "--config", config)
    assert (int(status), "InvalidArgument" in stdout) == (1, False)
    assert "The setting s3_credentials_file cannot be used: No such file" in stdout
