"""The helper that every test waits with."""

import pytest

from support.eventually import eventually, one_of


def test_eventually_returns_the_first_true_result():
    results = iter([0, "", [1], [2]])
    assert eventually(lambda: next(results), interval=0) == [1]


def test_eventually_returns_the_first_accepted_result():
    states = iter(["pending", "bundling", "complete"])
    assert eventually(lambda: next(states), until=one_of("complete", "failed"), interval=0) == "complete"


def test_eventually_reports_the_last_result_and_the_details():
    with pytest.raises(AssertionError, match=r"not within 0 s: a part is stored; last result: \[\]\nthe log"):
        eventually(list, "a part is stored", timeout=0, details=lambda: "the log")


def test_eventually_reports_the_last_ignored_exception():
    with pytest.raises(AssertionError, match=r"the answer; last exception: ZeroDivisionError"):
        eventually(lambda: 1 / 0, "the answer", ignore=ArithmeticError, timeout=0)


def test_eventually_raises_other_exceptions_at_once():
    with pytest.raises(ZeroDivisionError):
        eventually(lambda: 1 / 0, ignore=OSError)
