"""The limit on how many request threads one account uses."""

import threading
from types import SimpleNamespace

import pytest

from thrave.ec2.request_threads import AccountThreads

WAIT = 60  # seconds


def key(account_id):
    return SimpleNamespace(account_id=account_id)


def test_account_with_slow_requests_leaves_threads_to_others():
    threads = AccountThreads("test", 3, max_per_account=2)
    let_go = threading.Event()
    slow = [threads.submit(lambda: key("a"), lambda _key: let_go.wait(WAIT)) for _ in range(50)]
    try:
        for number in range(20):
            assert threads.submit(lambda: key("b"), lambda _key, n=number: n).result(WAIT) == number
        assert not any(future.done() for future in slow)
    finally:
        let_go.set()
    assert [future.result(WAIT) for future in slow] == [True] * 50


def test_account_never_exceeds_its_number_of_threads():
    threads = AccountThreads("test", 8, max_per_account=2)
    lock, busy, most = threading.Lock(), 0, 0
    both = threading.Barrier(2)

    def work(_key):
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        both.wait(WAIT)
        with lock:
            busy -= 1

    for future in [threads.submit(lambda: key("a"), work) for _ in range(40)]:
        future.result(WAIT)
    assert most == 2
    assert not threads._busy
    assert not threads._waiting


def test_waiting_requests_queue_behind_those_of_other_accounts():
    threads, order = AccountThreads("test", 2, max_per_account=1), []
    began, let_go = threading.Event(), threading.Event()

    def first(_key):
        began.set()
        let_go.wait(WAIT)

    futures = [threads.submit(lambda: key("a"), first)]
    began.wait(WAIT)
    futures += [
        threads.submit(lambda a=account: key(a), lambda a_key: order.append(a_key.account_id)) for account in "aaaabb"
    ]
    for future in futures[5:]:
        future.result(WAIT)
    assert order == ["b", "b"]
    let_go.set()
    for future in futures:
        future.result(WAIT)
    assert order == list("bbaaaa")


def test_future_gets_errors_of_authentication_and_handling():
    threads = AccountThreads("test", 1, max_per_account=1)

    def fail(*_):
        raise ZeroDivisionError

    for prove, response in ((fail, lambda _key: 1), (lambda: key("a"), fail)):
        with pytest.raises(ZeroDivisionError):
            threads.submit(prove, response).result(WAIT)
    assert threads.submit(lambda: key("a"), lambda _key: 1).result(WAIT) == 1
    assert not threads._busy


def test_cancelled_request_is_not_handled():
    threads, made = AccountThreads("test", 1, max_per_account=1), []
    began, let_go = threading.Event(), threading.Event()
    threads.submit(lambda: key("a"), lambda _key: began.set() or let_go.wait(WAIT))
    began.wait(WAIT)
    abandoned = threads.submit(lambda: key("b"), made.append)
    assert abandoned.cancel()
    let_go.set()
    threads.submit(lambda: key("c"), lambda _key: 1).result(WAIT)
    assert made == []
