"""The pytest fixture for tests of other projects."""

import signal

import pytest

from thrave import pytest_plugin


def test_fixture_runs_a_service_and_stops_it(request, tmp_path):
    fixture = pytest_plugin.thrave_server.__wrapped__(request, tmp_path)
    server = next(fixture)
    assert server.process.args[1:4] == ["-m", "thrave", "serve"]
    account, key = server.account("alice")
    assert server.client(key, "sts").get_caller_identity()["Account"] == account.account_id
    assert next(fixture, None) is None
    assert server.process.returncode in {0, -signal.SIGTERM}


@pytest.mark.thrave_fault("throttle")
def test_marker_is_refused_for_a_server_without_faults(request, tmp_path):
    with pytest.raises(pytest.fail.Exception, match="has no effect on thrave_server"):
        next(pytest_plugin.thrave_server.__wrapped__(request, tmp_path))
