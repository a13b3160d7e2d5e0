"""No account has more than its share of the threads that answer requests."""

import threading
from types import SimpleNamespace

import pytest

from thrave.ec2.request_threads import AccountThreads

WAIT = 60  # seconds


def key(account_id):
    return SimpleNamespace(account_id=account_id)


def test_an_account_with_slow_requests_leaves_threads_to_the_others():
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


def test_never_more_than_the_share_at_once():
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


def test_whoever_came_later_is_answered_before_those_who_have_their_share():
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


def test_what_proving_or_answering_raises_is_given_to_whoever_waits():
    threads = AccountThreads("test", 1, max_per_account=1)

    def fail(*_):
        raise ZeroDivisionError

    for prove, answer in ((fail, lambda _key: 1), (lambda: key("a"), fail)):
        with pytest.raises(ZeroDivisionError):
            threads.submit(prove, answer).result(WAIT)
    assert threads.submit(lambda: key("a"), lambda _key: 1).result(WAIT) == 1
    assert not threads._busy


def test_an_answer_that_nobody_waits_for_is_not_made():
    threads, made = AccountThreads("test", 1, max_per_account=1), []
    began, let_go = threading.Event(), threading.Event()
    threads.submit(lambda: key("a"), lambda _key: began.set() or let_go.wait(WAIT))
    began.wait(WAIT)
    abandoned = threads.submit(lambda: key("b"), made.append)
    assert abandoned.cancel()
    let_go.set()
    threads.submit(lambda: key("c"), lambda _key: 1).result(WAIT)
    assert made == []
