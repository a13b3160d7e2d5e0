"""The pytest fixture for tests of other projects."""

import signal

from thrave import pytest_plugin


def test_fixture_runs_a_service_and_stops_it(tmp_path):
    fixture = pytest_plugin.thrave_server.__wrapped__(tmp_path)
    server = next(fixture)
    assert server.process.args[1:4] == ["-m", "thrave", "serve"]
    account, key = server.account("alice")
    assert server.client(key, "sts").get_caller_identity()["Account"] == account.account_id
    assert next(fixture, None) is None
    assert server.process.returncode in {0, -signal.SIGTERM}
