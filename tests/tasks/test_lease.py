"""The lease timer of a process, by its own clock."""

import time

import pytest

from support.manual_clock import ManualClock
from thrave.tasks.lease import LeaseExpiredError, LeaseTimer


def test_lease_timer_allows_attempt_that_ends_in_time():
    clock = ManualClock()
    timer = LeaseTimer(60.0, clock)
    timer.check(50.0)
    with pytest.raises(LeaseExpiredError):
        timer.check(55.0)  # within the margin


def test_lease_timer_counts_from_before_heartbeat_was_sent():
    clock = ManualClock()
    timer = LeaseTimer(60.0, clock)
    sent = timer.now()
    clock.now += 50.0  # the database takes long to answer
    timer.renew(sent)
    with pytest.raises(LeaseExpiredError):
        timer.check(10.0)


def test_lease_timer_is_not_shortened_by_late_response():
    clock = ManualClock()
    timer = LeaseTimer(60.0, clock)
    late = timer.now()
    clock.now += 10.0
    timer.renew(timer.now())
    timer.renew(late)
    clock.now += 50.0
    timer.check()


def test_lease_timer_is_valid_again_after_heartbeat():
    clock = ManualClock()
    timer = LeaseTimer(60.0, clock)
    clock.now += 60.0
    assert not timer.is_valid()
    timer.renew(timer.now())
    timer.check()


def test_lease_timer_without_limit_never_expires():
    clock = ManualClock()
    timer = LeaseTimer(None, clock)
    clock.now += 1e9
    timer.check(1e9)


def test_lease_timer_counts_suspended_time(monkeypatch):
    clocks = {time.CLOCK_BOOTTIME: 100.0, time.CLOCK_MONOTONIC: 100.0}
    monkeypatch.setattr(time, "clock_gettime", clocks.get)
    timer = LeaseTimer(60.0)
    timer.check()
    clocks[time.CLOCK_BOOTTIME] += 100.0
    with pytest.raises(LeaseExpiredError):
        timer.check()
