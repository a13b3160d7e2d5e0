"""The settings select the driver of the store, and the source of the service's key."""

import pytest
from pydantic import ValidationError

from thrave.buckets.directory_store import DirectoryStore
from thrave.buckets.errors import InvalidArgument
from thrave.buckets.s3_client import Credentials
from thrave.buckets.s3_store import OwnerKeyStore, ServiceKeyStore
from thrave.config import Settings, load_settings
from thrave.drivers import open_store, read_credentials, store_config

SECRET = "secret%of/the+service"
IN_ENVIRONMENT = {"s3_access_key_id": "AKIASERVICE", "s3_secret_access_key": SECRET}


@pytest.fixture
def file(tmp_path):
    """A credentials file, as the AWS CLI writes it."""
    path = tmp_path / "credentials"
    path.touch(mode=0o600)
    path.write_text(
        f"[other]\naws_access_key_id = AKIAOTHER\n[default]\naws_access_key_id = AKIASERVICE\n"
        f"aws_secret_access_key = {SECRET}\naws_session_token = session-of-a-day\n"
    )
    return path


@pytest.mark.parametrize(
    ("settings", "driver"),
    [
        ({}, DirectoryStore),
        ({"store": "s3"}, OwnerKeyStore),
        ({"store": "s3", "upload_credentials": "policy", **IN_ENVIRONMENT}, OwnerKeyStore),
        ({"store": "s3", "upload_credentials": "service", **IN_ENVIRONMENT}, ServiceKeyStore),
    ],
)
def test_settings_select_the_driver(tmp_path, settings, driver):
    assert type(open_store(Settings(data_dir=tmp_path, **settings), lambda _: None)) is driver


def test_key_is_read_from_a_file_readable_by_owner_only(file):
    key = store_config(Settings(store="s3", s3_credentials_file=file)).credentials
    assert key == Credentials(access_key_id="AKIASERVICE", secret_access_key=SECRET, session_token="session-of-a-day")
    file.chmod(0o640)
    with pytest.raises(InvalidArgument, match="chmod 600"):
        read_credentials(file)


@pytest.mark.parametrize("content", ["", "aws_access_key_id", "[default]\n", f"[default]\n{SECRET}", "\xff"])
def test_file_without_key_is_rejected_without_showing_its_content(file, content):
    file.write_text(content, encoding="latin-1")
    with pytest.raises(InvalidArgument, match="not a credentials file") as caught:
        read_credentials(file)
    assert SECRET not in str(caught.value)


def test_key_is_read_from_the_environment(monkeypatch):
    for name, value in {**IN_ENVIRONMENT, "s3_session_token": "session-of-a-day"}.items():
        monkeypatch.setenv(f"THRAVE_{name.upper()}", value)
    key = store_config(load_settings(None, store="s3")).credentials
    assert key == Credentials(access_key_id="AKIASERVICE", secret_access_key=SECRET, session_token="session-of-a-day")


def test_default_endpoint_is_that_of_the_region():
    connection = store_config(Settings(store="s3", s3_region="eu-west-1"))
    assert connection.endpoint == "https://s3.eu-west-1.amazonaws.com"
    assert connection.credentials is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"upload_credentials": "service"}, "s3_credentials_file"),
        ({"s3_access_key_id": "AKIASERVICE"}, "belong together"),
        ({"s3_secret_access_key": SECRET}, "belong together"),
        ({"s3_endpoint": "s3.example.com"}, "s3_endpoint"),
        ({"s3_endpoint": "https://s3.example.com/path"}, "s3_endpoint"),
        ({"s3_addressing_style": "host"}, "s3_addressing_style"),
    ],
)
def test_contradictory_settings_are_rejected_without_showing_a_secret(settings, message):
    with pytest.raises(ValidationError, match=message) as caught:
        Settings(store="s3", **settings)
    assert SECRET not in str(caught.value)


def test_repr_shows_no_secret(file):
    settings = Settings(store="s3", s3_credentials_file=file, s3_proxy="http://user:password@proxy", **IN_ENVIRONMENT)
    shown = f"{settings!r} {store_config(settings)!r}"
    assert not any(secret in shown for secret in (SECRET, "password", "session-of-a-day"))


@pytest.mark.parametrize(("tasks", "uploads"), [(1, 1), (2, 4), (8, 4), (3, 40)])
def test_every_parallel_request_has_a_connection(tmp_path, tasks, uploads):
    settings = Settings(data_dir=tmp_path, store="s3", worker_concurrency=tasks, upload_concurrency=uploads)
    assert store_config(settings).max_connections > tasks * (uploads + 16)
    assert settings.max_open_files > settings.max_connections + store_config(settings).max_connections
