"""The store of `s3://`: endpoint, region, credentials and proxy come from the settings of the AWS tools."""

import pytest

from thrave.buckets.s3_client import Credentials
from thrave.cli.remote_folders import store_connection

CONFIG = """
[default]
region = eu-west-1
[profile mine]
region = eu-central-2
services = store
ca_bundle = /etc/mine.pem
s3 =
    addressing_style = virtual
[services store]
s3 =
    endpoint_url = https://store.example:8333
"""
CREDENTIALS = """
[mine]
aws_access_key_id = AKIAMINE
aws_secret_access_key = secret
aws_session_token = token
"""


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """Settings files of a user; hides the settings of the account that runs the tests."""
    (tmp_path / "config").write_text(CONFIG)
    (tmp_path / "credentials").write_text(CREDENTIALS)
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_store_connection_uses_profile(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "mine")
    found = store_connection()
    assert (found.endpoint, found.region, found.addressing) == ("https://store.example:8333", "eu-central-2", "virtual")
    assert found.credentials == Credentials(access_key_id="AKIAMINE", secret_access_key="secret", session_token="token")
    assert str(found.ca) == "/etc/mine.pem"


def test_store_connection_prefers_environment_to_files(monkeypatch):
    environment = {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:8333",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "AKIAENV",
        "AWS_SECRET_ACCESS_KEY": "other",
        "AWS_DEFAULT_REGION": "eu-north-1",
        "AWS_CA_BUNDLE": "/etc/other.pem",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = store_connection()
    assert (found.endpoint, found.region, found.addressing) == ("http://127.0.0.1:8333", "eu-north-1", "path")
    assert found.credentials == Credentials(access_key_id="AKIAENV", secret_access_key="other")
    assert str(found.ca) == "/etc/other.pem"


def test_store_connection_without_keys_is_unsigned():
    found = store_connection()
    assert (found.credentials, found.ca) == (None, None)
    assert (found.endpoint, found.region) == ("https://s3.eu-west-1.amazonaws.com", "eu-west-1")


def test_store_connection_without_region_uses_default(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert store_connection().region == "us-east-1"


@pytest.mark.parametrize(("without", "proxy"), [("", "http://proxy:3128"), ("store.example,127.0.0.1", None)])
def test_store_connection_uses_proxy_of_environment(monkeypatch, without, proxy):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://store.example:8333")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", without)
    assert store_connection().proxy == proxy


def test_missing_profile_is_usage_error(thrave, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    status, _, stderr = thrave("show", "s3://bucket/a.manifest.xml")
    assert (status, "nobodys" in stderr) == (2, True)
