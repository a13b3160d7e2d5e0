"""Retries while the hypervisor is unavailable, an instance is locked, or the database does not respond."""

import errno

import pytest
import sqlalchemy as sa

from thrave.compute.errors import (
    HypervisorError,
    HypervisorUnavailable,
    InstanceCommandFailed,
    InstanceError,
    InstanceLocked,
    StateChangedError,
)
from thrave.tasks import step_retry
from thrave.tasks.errors import TaskFailure
from thrave.tasks.step_retry import retry_database, retry_hypervisor

FULL = sa.exc.OperationalError("INSERT", {}, Exception("database or disk is full"))
REFUSED = HypervisorError("i-00000000", "no")


def unavailable(times, **options):
    return [HypervisorUnavailable("i-00000000", "no connection", **options) for _ in range(times)]


class Hypervisor:
    """Returns or raises these results in turn; the clock advances only in `call` and `sleep`."""

    def __init__(self, *answers, takes=0.0):
        self.answers, self.takes, self.now = [*answers], takes, 0.0

    def call(self):
        self.now += self.takes
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def time(self):
        return {"sleep": self.sleep, "clock": lambda: self.now}

    def sleep(self, seconds):
        self.now += seconds


def test_retry_hypervisor_returns_when_hypervisor_is_back_in_time():
    hypervisor = Hypervisor(*unavailable(2), "done")
    assert retry_hypervisor(hypervisor.call, 3.0, **hypervisor.time) == "done"


def test_retry_hypervisor_retries_locked_instance():
    hypervisor = Hypervisor(InstanceLocked("i-00000000"), "done")
    assert retry_hypervisor(hypervisor.call, 3.0, **hypervisor.time) == "done"


def test_retry_hypervisor_raises_after_timeout():
    hypervisor = Hypervisor(*unavailable(9))
    with pytest.raises(HypervisorUnavailable):
        retry_hypervisor(hypervisor.call, 3.0, **hypervisor.time)
    assert len(hypervisor.answers) == 5


def test_retry_hypervisor_counts_timeout_again_after_long_attempts():
    hypervisor = Hypervisor(*unavailable(5), "done", takes=4.0)
    assert retry_hypervisor(hypervisor.call, 3.0, **hypervisor.time) == "done"


def test_retry_hypervisor_counts_timeout_again_after_progress():
    hypervisor = Hypervisor(*unavailable(5), "done", takes=299.0)
    assert retry_hypervisor(hypervisor.call, 300.0, **hypervisor.time) == "done"


def test_retry_hypervisor_does_not_count_measured_wait_as_progress():
    hypervisor = Hypervisor(*unavailable(30, waited=30.0), takes=30.0)
    with pytest.raises(HypervisorUnavailable):
        retry_hypervisor(hypervisor.call, 300.0, **hypervisor.time)
    assert hypervisor.now < 400


@pytest.mark.parametrize(
    ("error", "takes"),
    [
        (lambda: InstanceLocked("i-00000000", waited=30.0), 30.0),
        (lambda: InstanceLocked("i-00000000"), 30.0),
        (lambda: OSError(errno.EMFILE, "too many files"), 60.0),
        (lambda: InstanceCommandFailed("i-00000000", "stateCommand", "took too long"), 11.0),
        (lambda: StateChangedError("i-00000000", "running"), 120.0),
    ],
)
def test_retry_hypervisor_ends_for_attempts_that_only_wait(error, takes):
    hypervisor = Hypervisor(*[error() for _ in range(100)], takes=takes)
    with pytest.raises((OSError, InstanceError)):
        retry_hypervisor(hypervisor.call, 600.0, **hypervisor.time)
    assert hypervisor.now < 900


def test_retry_hypervisor_ends_within_another_retry_hypervisor():
    hypervisor = Hypervisor(*unavailable(1000), takes=0.5)

    def inner():
        return retry_hypervisor(hypervisor.call, 60.0, **hypervisor.time)

    with pytest.raises(HypervisorUnavailable):
        retry_hypervisor(inner, 600.0, **hypervisor.time)
    assert hypervisor.now < 900


def test_retry_hypervisor_raises_permanent_error_at_once():
    hypervisor = Hypervisor(REFUSED, "done")
    with pytest.raises(HypervisorError, match=r"^no$"):
        retry_hypervisor(hypervisor.call, 3.0, **hypervisor.time)
    assert hypervisor.answers == ["done"]


# retry_database


class Power:
    """An outage action that counts its calls."""

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
    monkeypatch.setattr(step_retry, "DATABASE_INTERVALS", (0.0,))


def fail_times(number, result):
    """Return a step that fails `number` times because the database is full."""
    calls = []

    def work():
        calls.append(None)
        if len(calls) <= number:
            raise FULL
        return result

    return work, calls


def test_retry_database_does_not_repeat_step_after_instance_was_started():
    power = Power(ends_step=True, unavailable=3)
    work, calls = fail_times(1, "read to its end")
    with pytest.raises(TaskFailure, match="the instance was started"):
        retry_database(work, power)
    assert len(calls) == 1
    assert power.acts == 4, "a guest may power off later: it is checked again each time"


def test_retry_database_repeats_step_if_nothing_had_to_be_started():
    power = Power(ends_step=False)
    work, calls = fail_times(3, "done")
    assert retry_database(work, power) == "done"
    assert (len(calls), power.acts) == (4, 3)


def test_retry_database_does_not_act_before_timeout():
    power = Power(ends_step=True)
    power.timeout = float("inf")
    work, _ = fail_times(3, "done")
    assert retry_database(work, power) == "done"
    assert power.acts == 0


def test_retry_database_raises_other_errors_at_once():
    def work():
        raise TaskFailure("Server.VolumeError", "broken")

    power = Power(ends_step=True)
    with pytest.raises(TaskFailure, match="broken"):
        retry_database(work, power)
    assert power.acts == 0
