"""Asking again for what cannot be had just now: a hypervisor that is away, an instance that is held."""

from types import SimpleNamespace

import pytest

from thrave.compute.errors import HypervisorError, HypervisorGoneError, InstanceHeld
from thrave.tasks.patience import patiently

GONE, REFUSED = HypervisorGoneError("i-00000000", "no connection"), HypervisorError("i-00000000", "no")


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
    hypervisor = Hypervisor(monkeypatch, GONE, GONE, "here")
    assert patiently(hypervisor.ask, 3.0, pause=hypervisor.pause) == "here"


def test_an_instance_that_is_let_go_of_is_asked_for_again(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, InstanceHeld("i-00000000"), "here")
    assert patiently(hypervisor.ask, 3.0, pause=hypervisor.pause) == "here"


def test_one_that_stays_away_is_given_up(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, *[GONE] * 9)
    with pytest.raises(HypervisorGoneError):
        patiently(hypervisor.ask, 3.0, pause=hypervisor.pause)
    assert len(hypervisor.answers) == 5


def test_one_that_was_there_for_long_may_be_away_for_as_long_again(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, *[GONE] * 5, "here", takes=4.0)
    assert patiently(hypervisor.ask, 3.0, pause=hypervisor.pause) == "here"


def test_an_attempt_that_got_through_ends_the_absence(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, *[GONE] * 5, "here", takes=299.0)
    assert patiently(hypervisor.ask, 300.0, pause=hypervisor.pause) == "here"


def test_one_that_takes_its_time_to_be_away_is_given_up(monkeypatch):
    silent = HypervisorGoneError("i-00000000", "no answer", waited=30.0)
    hypervisor = Hypervisor(monkeypatch, *[silent] * 30, takes=30.0)
    with pytest.raises(HypervisorGoneError):
        patiently(hypervisor.ask, 300.0, pause=hypervisor.pause)
    assert hypervisor.now < 400


def test_one_that_refuses_is_not_asked_again(monkeypatch):
    hypervisor = Hypervisor(monkeypatch, REFUSED, "here")
    with pytest.raises(HypervisorError, match=r"^no$"):
        patiently(hypervisor.ask, 3.0, pause=hypervisor.pause)
    assert hypervisor.answers == ["here"]
