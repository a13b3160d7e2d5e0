"""A fleet on one PostgreSQL, with an account."""

import pytest

from support.service.fleet import Fleet


@pytest.fixture
def fleet(postgres, tmp_path):
    fleet = Fleet(
        tmp_path, {"database_url": postgres.new_database(), "heartbeat_interval": 0.2, "heartbeat_timeout": 2}
    )
    fleet.api()
    yield fleet
    fleet.stop()


@pytest.fixture
def alice(fleet):
    return fleet.first.account("alice")
