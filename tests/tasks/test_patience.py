"""Asking again for what cannot be had just now: a hypervisor that is away, an instance that is held."""

import errno
from types import SimpleNamespace

import pytest

from thrave.compute.errors import (
    HypervisorError,
    HypervisorUnavailable,
    InstanceCommandFailed,
    InstanceError,
    InstanceLocked,
    StateChangedError,
)
from thrave.tasks.patience import retry_hypervisor

REFUSED = HypervisorError("i-00000000", "no")


def gone(times, **options):
    return [HypervisorUnavailable("i-00000000", "no connection", **options) for _ in range(times)]


class Hypervisor:
    """Gives these answers one after the other; time passes only where it is waited for."""

    def __init__(self, monkeypatch, *answers, takes=0.0):
        self.answers, self.takes, self.now = [*answers], takes, 0.0
        # Of this module only: with another time for all, a server of the same test process would sleep for hours.
        monkeypatch.setattr("thrave.tasks.patience.time", SimpleNamespace(monotonic=lambda: self.now))

    def ask(self):
        self.now += self.takes
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def pause(self, seconds):
        self.now += seconds


def test_one_that_comes_back_in_time_is_asked_again(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, *gone(2), "here")
    assert retry_hypervisor(hypervisor.ask, 3.0, pause=hypervisor.pause) == "here"


def test_an_instance_that_is_let_go_of_is_asked_for_again(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, InstanceLocked("i-00000000"), "here")
    assert retry_hypervisor(hypervisor.ask, 3.0, pause=hypervisor.pause) == "here"


def test_one_that_stays_away_is_given_up(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, *gone(9))
    with pytest.raises(HypervisorUnavailable):
        retry_hypervisor(hypervisor.ask, 3.0, pause=hypervisor.pause)
    assert len(hypervisor.answers) == 5


def test_one_that_was_there_for_long_may_be_away_for_as_long_again(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, *gone(5), "here", takes=4.0)
    assert retry_hypervisor(hypervisor.ask, 3.0, pause=hypervisor.pause) == "here"


def test_an_attempt_that_got_through_ends_the_absence(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, *gone(5), "here", takes=299.0)
    assert retry_hypervisor(hypervisor.ask, 300.0, pause=hypervisor.pause) == "here"


def test_one_that_takes_its_time_to_be_away_is_given_up(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, *gone(30, waited=30.0), takes=30.0)
    with pytest.raises(HypervisorUnavailable):
        retry_hypervisor(hypervisor.ask, 300.0, pause=hypervisor.pause)
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
def test_attempts_that_only_wait_have_an_end(monkeypatch, error, takes):
    hypervisor = Hypervisor(monkeypatch, *[error() for _ in range(100)], takes=takes)
    with pytest.raises((OSError, InstanceError)):
        retry_hypervisor(hypervisor.ask, 600.0, pause=hypervisor.pause)
    assert hypervisor.now < 900


def test_attempts_that_are_repeated_within_attempts_have_an_end(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, *gone(1000), takes=0.5)

    def ask():
        return retry_hypervisor(hypervisor.ask, 60.0, pause=hypervisor.pause)

    with pytest.raises(HypervisorUnavailable):
        retry_hypervisor(ask, 600.0, pause=hypervisor.pause)
    assert hypervisor.now < 900


def test_one_that_refuses_is_not_asked_again(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, REFUSED, "here")
    with pytest.raises(HypervisorError, match=r"^no$"):
        retry_hypervisor(hypervisor.ask, 3.0, pause=hypervisor.pause)
    assert hypervisor.answers == ["here"]
