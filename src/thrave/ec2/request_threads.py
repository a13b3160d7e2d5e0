"""Threads that answer requests, of which no account has more than its share at once.

A request is proved first, by whichever thread is free; only then it is known whose it is. What an account asks for
beyond its share waits without a thread, and joins the queue again behind whatever arrived meanwhile. So one account's
requests, however many and however slow, leave threads to the others.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from thrave.identity.accounts import AccessKey

Answer = TypeVar("Answer")


class AccountThreads(Generic[Answer]):
    """A pool of threads for requests.

    Args:
        name: Of the threads.
        number: How many there are.
        share: How many of them answer requests of one account at the same time.
    """

    def __init__(self, name: str, number: int, *, share: int) -> None:
        self._pool = ThreadPoolExecutor(number, name)
        self._share = share
        self._busy: Counter[str] = Counter()  # account id to threads
        self._waiting: dict[str, deque[Callable[[], None]]] = {}
        self._lock = threading.Lock()

    def submit(self, prove: Callable[[], AccessKey], answer: Callable[[AccessKey], Answer]) -> Future[Answer]:
        """Prove a request and answer it; the future has the answer, or what either has raised.

        Args:
            prove: Says which key has signed. Its work must be small: it counts for nobody's share.
            answer: Answers the request of that key.
        """
        future: Future[Answer] = Future()

        def begin() -> None:
            try:
                key = prove()
            except BaseException as error:  # noqa: BLE001 (whoever waits for the future is given it)
                _fail(future, error)
                return
            self._take_turn(key.account_id, lambda: _finish(future, answer, key))

        self._pool.submit(begin)
        return future

    def _take_turn(self, account_id: str, work: Callable[[], None]) -> None:
        with self._lock:
            if self._busy[account_id] >= self._share:
                self._waiting.setdefault(account_id, deque()).append(work)
                return
            self._busy[account_id] += 1
        self._run(account_id, work)

    def _run(self, account_id: str, work: Callable[[], None]) -> None:
        work()
        with self._lock:
            waiting = self._waiting.get(account_id)
            if waiting:
                following = waiting.popleft()
            else:
                self._waiting.pop(account_id, None)
                self._busy[account_id] -= 1
                if not self._busy[account_id]:
                    del self._busy[account_id]
                return
        # Behind what has arrived meanwhile, or accounts with long queues would keep all threads.
        self._pool.submit(self._run, account_id, following)


def _finish(future: Future[Answer], answer: Callable[[AccessKey], Answer], key: AccessKey) -> None:
    if not future.set_running_or_notify_cancel():  # nobody waits for it any more
        return
    try:
        future.set_result(answer(key))
    except BaseException as error:  # noqa: BLE001 (whoever waits for the future is given it)
        future.set_exception(error)


def _fail(future: Future[Answer], error: BaseException) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
