"""What other people's tests have of Thrave: the fixture of pytest's, with a service of its own."""

import signal

from thrave import pytest_plugin


def test_the_fixture_gives_a_service_in_a_process_of_its_own_and_stops_it(tmp_path):
    fixture = pytest_plugin.thrave_server.__wrapped__(tmp_path)
    server = next(fixture)
    assert server.process.args[1:4] == ["-m", "thrave", "serve"]
    account, key = server.account("alice")
    assert server.client(key, "sts").get_caller_identity()["Account"] == account.account_id
    assert next(fixture, None) is None
    assert server.process.returncode in {0, -signal.SIGTERM}
