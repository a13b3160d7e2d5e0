"""Background threads: errors are reported or logged, and hanging calls can be abandoned."""

import threading

import pytest

from thrave.concurrency import Call, CallTimeoutError, NoThreadError, start_later, start_repeating, start_thread
from thrave.tasks.errors import ErrorKind, kind_of

TIMEOUT = 60  # seconds; no test waits so long unless it fails


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt()])
def test_start_thread_passes_error_to_handler(error):
    failures = []

    def fail():
        raise error

    start_thread("job", fail, on_failure=failures.append).join(TIMEOUT)
    assert failures == [error]


def test_start_thread_logs_error_of_handler(caplog):
    def fail(*_):
        raise ValueError("no")

    start_thread("job", fail, on_failure=fail).join(TIMEOUT)
    assert "error handler of background job failed: job" in caplog.text


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1)])
def test_start_repeating_continues_after_error_until_stopped(error, caplog):
    stop, done = threading.Event(), []

    def work():
        done.append(len(done))
        if len(done) == 3:
            stop.set()
        raise error

    thread = start_repeating("job", 0, work, stop=stop)
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert done == [0, 1, 2]
    assert caplog.text.count("background job failed: job") == 3


def test_start_later_runs_job_unless_cancelled():
    done = threading.Event()
    cancel = start_later("never", TIMEOUT, lambda: pytest.fail("the cancelled job was run"))
    cancel()
    start_later("soon", 0, done.set)
    assert done.wait(TIMEOUT)


def test_call_returns_result_or_raises_error():
    assert Call("call", lambda: 7).result(TIMEOUT) == 7
    with pytest.raises(SystemExit):
        Call("call", lambda: exec("raise SystemExit")).result(TIMEOUT)


def test_call_result_can_be_requested_again_after_timeout():
    release = threading.Event()
    call = Call("call", lambda: release.wait(TIMEOUT))
    with pytest.raises(CallTimeoutError):
        call.result(0)
    assert call.is_running
    release.set()
    assert call.result(TIMEOUT) is True
    assert not call.is_running


@pytest.mark.parametrize(
    "start",
    [
        lambda: start_thread("job", int, on_failure=print),
        lambda: start_repeating("job", 1, int),
        lambda: start_later("job", 1, int),
        lambda: Call("job", int),
    ],
)
def test_failed_thread_start_is_transient_error(start, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(NoThreadError) as caught:
            start()
    assert kind_of(caught.value) is ErrorKind.TRANSIENT
