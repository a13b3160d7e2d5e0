"""What goes on while the database is unavailable."""

import pytest
import sqlalchemy as sa

from thrave.tasks import database_outage
from thrave.tasks.errors import TaskFailure

FULL = sa.exc.OperationalError("INSERT", {}, Exception("database or disk is full"))


class Power:
    """What is done without the database, counted."""

    timeout = 0.0

    def __init__(self, *, ends_step, unavailable=0):
        self.ends_step = ends_step
        self.unavailable = unavailable
        self.acts = 0

    def act(self):
        self.acts += 1
        return self.ends_step

    def record(self):
        self.unavailable -= 1
        if self.unavailable >= 0:
            raise FULL
        return TaskFailure("Server.NoProgress", "the instance was started")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(database_outage, "PAUSES", (0.0,))


def fail_times(number, result):
    """A step that finds the database full so often."""
    calls = []

    def work():
        calls.append(None)
        if len(calls) <= number:
            raise FULL
        return result

    return work, calls


def test_step_is_not_repeated_once_the_instance_was_started():
    power = Power(ends_step=True, unavailable=3)
    work, calls = fail_times(1, "read to its end")
    with pytest.raises(TaskFailure, match="the instance was started"):
        database_outage.retry_database(work, power)
    assert len(calls) == 1
    assert power.acts == 4, "a guest may power off later: it is looked at again each time"


def test_step_is_repeated_if_nothing_had_to_be_started():
    power = Power(ends_step=False)
    work, calls = fail_times(3, "done")
    assert database_outage.retry_database(work, power) == "done"
    assert (len(calls), power.acts) == (4, 3)


def test_nothing_is_done_before_the_timeout():
    power = Power(ends_step=True)
    power.timeout = float("inf")
    work, _ = fail_times(3, "done")
    assert database_outage.retry_database(work, power) == "done"
    assert power.acts == 0


def test_another_error_ends_the_step():
    def work():
        raise TaskFailure("Server.VolumeError", "broken")

    power = Power(ends_step=True)
    with pytest.raises(TaskFailure, match="broken"):
        database_outage.retry_database(work, power)
    assert power.acts == 0
