"""Threads that handle requests, with a limit on how many one account uses at once.

Any free thread authenticates a request; only then its account is known. A request beyond the account's limit waits
without a thread. When its turn comes it joins the queue behind the requests that have arrived in the meantime. So one
account's requests, however many and however slow, leave threads to other accounts.
"""

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from thrave.concurrency import new_lock
from thrave.identity.accounts import AccessKey

Response = TypeVar("Response")


class AccountThreads(Generic[Response]):
    """A thread pool for requests.

    Args:
        name: Prefix of the threads' names.
        size: Number of threads.
        max_per_account: Maximum number of threads that handle requests of one account at the same time.
    """

    def __init__(self, name: str, size: int, *, max_per_account: int) -> None:
        self._pool = ThreadPoolExecutor(size, name)
        self._max_per_account = max_per_account
        self._busy: Counter[str] = Counter()  # account id to number of threads
        self._waiting: dict[str, deque[Callable[[], None]]] = {}
        self._lock = new_lock()

    def submit(
        self, authenticate: Callable[[], AccessKey], handle: Callable[[AccessKey], Response]
    ) -> Future[Response]:
        """Authenticate and handle a request; the future has the response, or the exception of either function.

        Args:
            authenticate: Returns the key that signed the request. It must be fast: no account's limit counts it.
            handle: Handles the request of that key.
        """
        future: Future[Response] = Future()

        def start() -> None:
            try:
                key = authenticate()
            except BaseException as error:  # noqa: BLE001 (the future passes it on)
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
                return
            self._run_or_wait(key.account_id, lambda: _complete(future, handle, key))

        self._pool.submit(start)
        return future

    def _run_or_wait(self, account_id: str, work: Callable[[], None]) -> None:
        with self._lock:
            if self._busy[account_id] >= self._max_per_account:
                self._waiting.setdefault(account_id, deque()).append(work)
                return
            self._busy[account_id] += 1
        self._run(account_id, work)

    def _run(self, account_id: str, work: Callable[[], None]) -> None:
        work()
        with self._lock:
            waiting = self._waiting.get(account_id)
            if waiting:
                next_work = waiting.popleft()
            else:
                self._waiting.pop(account_id, None)
                self._busy[account_id] -= 1
                if not self._busy[account_id]:
                    del self._busy[account_id]
                return
        # Queued behind newer requests; otherwise accounts with long queues would keep all threads.
        self._pool.submit(self._run, account_id, next_work)


def _complete(future: Future[Response], handle: Callable[[AccessKey], Response], key: AccessKey) -> None:
    if not future.set_running_or_notify_cancel():  # cancelled: the caller has stopped waiting
        return
    try:
        future.set_result(handle(key))
    except BaseException as error:  # noqa: BLE001 (the future passes it on)
        future.set_exception(error)
