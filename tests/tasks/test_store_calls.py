"""Concurrent calls to a store: no result and no error is lost, in any order of their ends.

The machine holds each call with an event and lets it end, with a result or an error, at a moment that Hypothesis
draws: before the next start, between the last start and the first wait, during a wait, and after the last wait.
"""

import errno
import threading

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from thrave.concurrency import NoThreadError
from thrave.pipeline import StoppedError
from thrave.tasks import store_calls
from thrave.tasks.store_calls import CallGroup, InFlightObjects

MANY_SECONDS = 60


class CallError(Exception):
    """The error of a call."""


class HeldCall:
    """A call that ends when the test sets its result."""

    def __init__(self, number):
        self.number = number
        self.fails = False
        self.has_ended = False
        self._go = threading.Event()
        self._thread = None

    def __call__(self):
        self._thread = threading.current_thread()
        assert self._go.wait(MANY_SECONDS)
        if self.fails:
            raise CallError(self.number)
        return self.number

    def let_go(self, *, fails):
        self.fails, self.has_ended = fails, True
        self._go.set()

    def end(self, *, fails):
        """End the call, and count it."""
        self.let_go(fails=fails)
        while self._thread is None:
            threading.Event().wait(0.001)
        self._thread.join(MANY_SECONDS)


class CallsMachine(RuleBasedStateMachine):
    """Starts calls in a `CallGroup`, waits for results, and leaves the block in each possible way."""

    def __init__(self):
        super().__init__()
        self.enter()

    def enter(self):
        self.calls = CallGroup()
        self.calls.__enter__()
        self.held, self.taken = [], []

    @property
    def running(self):
        return [call for call in self.held if not call.has_ended]

    @property
    def failed(self):
        return any(call.fails for call in self.held if call.has_ended)

    @rule()
    def start(self):
        call = HeldCall(len(self.held))
        if self.failed:
            with pytest.raises(CallError):
                self.calls.start(call)
        else:
            self.calls.start(call)
            self.held.append(call)

    @rule(data=st.data(), fails=st.booleans())
    def end_a_call(self, data, fails):
        if self.running:
            data.draw(st.sampled_from(self.running)).end(fails=fails)

    @rule()
    def look(self):
        if self.failed:
            with pytest.raises(CallError):
                self.calls.results(wait=False)
        else:
            self.taken += self.calls.results(wait=False)
            assert self.calls.pending == len(self.running)

    @rule(data=st.data())
    def wait_for_the_rest(self, data):
        """Let the calls end while another thread waits for them."""
        outcomes = [(call, data.draw(st.booleans())) for call in data.draw(st.permutations(self.running))]
        got, raised = [], []

        def wait():
            try:
                got.extend(self.calls.remaining())
            except CallError as error:
                raised.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        for call, fails in outcomes:
            call.end(fails=fails)
        waiting.join(MANY_SECONDS)
        assert not waiting.is_alive()
        if self.failed:
            assert raised
        else:
            self.taken += got
            assert not raised
            assert sorted(self.taken) == [call.number for call in self.held]
        self.leave()

    @rule(fails=st.booleans())
    def leave_without_a_look(self, fails):
        for call in self.running:
            call.end(fails=fails)
        self.leave()

    def leave(self):
        """Leave the block without an error: an error only if a call has failed or its result was not taken."""
        if self.failed:
            with pytest.raises(CallError):
                self.calls.__exit__(None, None, None)
        elif len(self.taken) < len(self.held):
            with pytest.raises(RuntimeError, match="were not taken"):
                self.calls.__exit__(None, None, None)
        else:
            self.calls.__exit__(None, None, None)
        self.enter()

    def teardown(self):
        for call in self.running:
            call.let_go(fails=False)


def test_call_group_loses_no_result_and_no_error():
    run_state_machine_as_test(
        CallsMachine,
        settings=settings(
            max_examples=150, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_call_group_wakes_waiting_thread_when_call_fails():
    woken, call = threading.Event(), HeldCall(0)
    group = CallGroup(wake=woken.set)
    group.start(call)
    call.end(fails=True)
    assert woken.is_set()
    with pytest.raises(CallError):
        next(group.remaining())


def test_call_group_stop_abandons_running_calls():
    call = HeldCall(0)

    def stop(group):
        with group:
            group.start(call)
            group.stop()
            next(group.remaining())

    group = CallGroup()
    with pytest.raises(StoppedError):
        stop(group)
    assert group.is_abandoned
    with pytest.raises(StoppedError):
        group.check_wanted()  # as a call does before its next attempt
    call.end(fails=False)


def refusing(monkeypatch, times):
    """Let the first `times` starts of a thread fail."""
    start, refused = threading.Thread.start, []

    def refuse(thread):
        if len(refused) < times:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(store_calls, "_PAUSE", 0.001)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    return refused


def test_call_group_start_retries_while_no_thread_is_available(monkeypatch):
    group = CallGroup()
    refused = refusing(monkeypatch, 2)
    group.start(lambda: "result")
    assert [*group.remaining()] == ["result"]
    assert len(refused) == 2


def test_call_group_does_not_wait_for_call_without_thread(monkeypatch):
    monkeypatch.setattr(store_calls, "START_TIMEOUT", 0.001)
    group = CallGroup()
    with monkeypatch.context() as patched:
        refusing(patched, 1000)
        with pytest.raises(NoThreadError) as caught:
            group.start(lambda: None)
    assert caught.value.errno == errno.EAGAIN  # a transient error
    assert caught.value.waited == store_calls.START_TIMEOUT
    assert group.pending == 0
    assert [*group.remaining()] == []


def test_in_flight_objects_wait_until_free_ends():
    """An abandoned upload hangs. A thread that waits for it can be stopped, and waits at most for the timeout."""
    places, passes = InFlightObjects(), []
    with places.lock("bucket", "key"):
        assert places.in_flight_keys("bucket") == {"key"}
        assert not places.wait_until_free("bucket", "key", lambda: passes.append("check"), 0.01)
        stopped = CallGroup()
        stopped.stop()
        with pytest.raises(StoppedError):
            places.wait_until_free("bucket", "key", stopped.check_wanted, 600.0)
    assert passes
    assert places.wait_until_free("bucket", "key", lambda: None, 0.0)
    assert places.in_flight_keys("bucket") == set()
