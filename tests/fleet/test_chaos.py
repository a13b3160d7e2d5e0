"""A fleet whose processes are killed at random: no task is lost, duplicated, misrouted or stuck."""

import pytest

from support.crashes.fleet_chaos import Chaos, Plan
from support.service.fleet import Fleet

pytestmark = [pytest.mark.postgres, pytest.mark.sweep]


@pytest.fixture
def fleet(postgres, tmp_path):
    fleet = Fleet(tmp_path, {"database_url": postgres.new_database(), "heartbeat_interval": 0.5}, shared=False)
    fleet.api()
    yield fleet
    fleet.stop()


def test_tasks_survive_kills_of_every_process(fleet):
    outcome = Chaos(fleet, Plan(tasks=24, instances=12, agents=3, apis=2, seed=20080808)).run()
    assert outcome.kills
