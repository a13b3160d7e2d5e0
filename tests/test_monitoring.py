"""The monitoring listener over real HTTP."""

import json
import urllib.error
import urllib.request

import pytest

from thrave.config import Settings
from thrave.health import STORE, HealthCache
from thrave.http_server import AddressError, MonitoringServer, open_monitoring
from thrave.monitoring import MonitoringApp


@pytest.fixture(scope="module")
def health():
    return HealthCache({STORE: 1.0})


@pytest.fixture(scope="module")
def url(health):
    server = MonitoringServer("127.0.0.1", 0)
    server.start(MonitoringApp(health))
    return server.url


def get(url, method="GET"):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method)) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_monitoring_answers_health_checks_with_errors(url, health):
    assert get(f"{url}/healthz") == (200, b'{"status": "ok"}\n')
    health.record(STORE, "Cannot connect to s3.example.com")
    status, body = get(f"{url}/readyz")
    assert (status, json.loads(body)["components"]["store"]["error"]) == (503, "Cannot connect to s3.example.com")
    health.record(STORE, None)
    assert get(f"{url}/readyz")[0] == 200


@pytest.mark.parametrize(("path", "method", "status"), [("/", "GET", 404), ("/healthz", "POST", 405)])
def test_monitoring_refuses_other_requests(url, path, method, status):
    assert get(f"{url}{path}", method)[0] == status


def test_monitoring_is_off_by_default():
    assert open_monitoring(Settings()) is None


def test_monitoring_address_error_names_its_settings():
    with pytest.raises(AddressError, match="Change `monitoring_address` or `monitoring_port`"):
        open_monitoring(Settings(monitoring_address="192.0.2.1", monitoring_port=0))
