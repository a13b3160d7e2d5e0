"""Background threads: their failures reach somebody, and calls that hang can be abandoned."""

import threading

import pytest

from thrave.concurrency import Call, CallTimeoutError, NoThreadError, later, repeat, supervised
from thrave.tasks.errors import ErrorKind, kind_of

PATIENCE = 60


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt()])
def test_supervised_gives_whatever_its_work_raises_to_its_owner(error):
    failures = []

    def fail():
        raise error

    supervised("job", fail, on_failure=failures.append).join(PATIENCE)
    assert failures == [error]


def test_supervised_logs_a_failure_that_its_owner_cannot_handle(caplog):
    def fail(*_):
        raise ValueError("no")

    supervised("job", fail, on_failure=fail).join(PATIENCE)
    assert "error handler of background job failed: job" in caplog.text


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1)])
def test_repeat_goes_on_after_a_failure_and_ends_when_it_is_stopped(error, caplog):
    stop, done = threading.Event(), []

    def work():
        done.append(len(done))
        if len(done) == 3:
            stop.set()
        raise error

    thread = repeat("job", 0, work, stop=stop)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert done == [0, 1, 2]
    assert caplog.text.count("background job failed: job") == 3


def test_later_does_what_is_not_cancelled():
    done = threading.Event()
    cancel = later("never", PATIENCE, lambda: pytest.fail("it was cancelled"))
    cancel()
    later("soon", 0, done.set)
    assert done.wait(PATIENCE)


def test_call_gives_what_it_returned_or_raised():
    assert Call("call", lambda: 7).result(PATIENCE) == 7
    with pytest.raises(SystemExit):
        Call("call", lambda: exec("raise SystemExit")).result(PATIENCE)


def test_call_that_hangs_can_be_abandoned_and_asked_again():
    go = threading.Event()
    call = Call("call", lambda: go.wait(PATIENCE))
    with pytest.raises(CallTimeoutError):
        call.result(0)
    assert call.is_running
    go.set()
    assert call.result(PATIENCE) is True
    assert not call.is_running


@pytest.mark.parametrize(
    "start",
    [
        lambda: supervised("job", int, on_failure=print),
        lambda: repeat("job", 1, int),
        lambda: later("job", 1, int),
        lambda: Call("job", int),
    ],
)
def test_a_thread_that_cannot_be_started_is_a_condition_that_passes(start, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(NoThreadError) as caught:
            start()
    assert kind_of(caught.value) is ErrorKind.TRANSIENT
