"""Retries, growing waits and polling."""

import itertools

import pytest

from thrave.retry import backoff, poll_until, retry


class Clock:
    """A clock that advances in `sleep` only, and records the waits."""

    def __init__(self):
        self.now, self.waits = 0.0, []

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds

    def retry(self, *results, on=OSError, **options):
        """Call `retry` with an operation that returns or raises these results in turn."""
        remaining = iter(results)

        def operation():
            result = next(remaining)
            if isinstance(result, Exception):
                raise result
            return result

        return retry(operation, on=on, sleep=self.sleep, clock=lambda: self.now, **options)


@pytest.fixture
def clock():
    return Clock()


def test_retry_returns_first_successful_result(clock):
    assert clock.retry(OSError(), OSError(), "done", timeout=10.0, interval=2.0) == "done"
    assert clock.waits == [2.0, 2.0]


def test_retry_with_zero_timeout_calls_once(clock):
    with pytest.raises(OSError, match="first"):
        clock.retry(OSError("first"), "done", timeout=0.0)
    assert clock.waits == []


@pytest.mark.parametrize("on", [OSError, (OSError, KeyError), lambda error: isinstance(error, OSError)])
def test_retry_raises_other_errors_immediately(clock, on):
    with pytest.raises(ValueError, match="other"):
        clock.retry(OSError(), ValueError("other"), "done", on=on, timeout=10.0)
    assert clock.waits == [1.0]


@pytest.mark.parametrize(("is_strict", "attempts"), [(False, 4), (True, 3)])
def test_retry_starts_last_attempt_within_strict_timeout(clock, is_strict, attempts):
    errors = [OSError(str(number)) for number in range(1, 9)]
    with pytest.raises(OSError, match=f"^{attempts}$"):
        clock.retry(*errors, timeout=2.5, is_timeout_strict=is_strict)


@pytest.mark.parametrize(("requested", "wait"), [(0.5, 1.0), (3.0, 3.0), (600.0, 10.0)])
def test_retry_waits_requested_time_within_timeout(clock, requested, wait):
    clock.retry(OSError(), "done", timeout=10.0, min_wait=lambda _: requested)
    assert clock.waits == [wait]


def test_retry_restarts_timeout_after_progress(clock):
    errors = [OSError("progress" if number % 3 == 2 else "none") for number in range(9)]

    def is_progress(error, _seconds):
        return str(error) == "progress"

    assert clock.retry(*errors, "done", timeout=3.0, is_progress=is_progress) == "done"


def test_retry_reports_each_failure(clock):
    failures = []
    with pytest.raises(OSError):
        clock.retry(OSError(), OSError(), OSError(), timeout=2.0, on_failure=failures.append)
    assert [(failed.restarts_timeout, failed.elapsed, failed.wait) for failed in failures] == [
        (True, 0.0, 1.0), (False, 1.0, 1.0), (False, 2.0, None),
    ]  # fmt: skip


def test_backoff_doubles_wait_up_to_maximum_with_jitter():
    for wait, longest in zip(itertools.islice(backoff(0.25, 1.0), 5), [0.25, 0.5, 1.0, 1.0, 1.0], strict=True):
        assert longest / 2 <= wait <= longest


def test_poll_until_returns_first_accepted_value():
    values, waits = iter([1, 2, 3, 4]), []
    assert poll_until(lambda: next(values), lambda value: value > 2, timeout=60, interval=5, sleep=waits.append) == 3
    assert waits == [5, 5]


def test_poll_until_returns_last_value_after_timeout():
    assert poll_until(lambda: False, timeout=-1.0, interval=60) is False
