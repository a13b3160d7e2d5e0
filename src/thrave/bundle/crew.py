"""Threads that work for one stream, and stop together.

The stages of a bundle are iterators; a crew lets one run ahead of the next in a thread of its own, or maps a function
over one on every core, in order, always within a bound. Whatever a stage raises comes out at its consumer, like
from any iterator. Leaving the crew's ``with`` block stops every thread before it returns: none outlives its stream,
but for one that hangs in a read, which nothing can interrupt. It is left behind, and stops when the read ends.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

PATIENCE = 1.0
"""Seconds that the threads of a crew have to stop, together."""

T = TypeVar("T")
R = TypeVar("R")


class StoppedError(Exception):
    """The crew has been told to stop; seen inside its threads, and by the consumer if somebody else said so."""


class Channel(Generic[T]):
    """A queue with a bound, which can be closed under those who wait at either end."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[T] = deque()
        self._capacity = capacity
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T) -> None:
        """Add an item; wait while the channel is full. Raises StoppedError once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            self._refuse_if_closed()
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Take the oldest item; wait for one. Raises StoppedError once the channel is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._items)
            self._refuse_if_closed()
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Wake everybody who waits, drop what is inside."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise StoppedError


@dataclass(frozen=True)
class _End:
    """What a stage sends last: nothing more will come, or why."""

    failure: BaseException | None = None


class Crew:
    """The threads of one stream; a context manager.

    Args:
        workers: threads of the pool that ``map`` uses.
    """

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="bundle-worker")
        self._threads: list[threading.Thread] = []
        self._closers: list[Callable[[], None]] = []
        self._stopped = False

    def __enter__(self) -> Self:
        return self

    def stop(self) -> None:
        """Have every thread of the crew, and whoever waits for one, stop; any thread may call this, at any time."""
        self._stopped = True
        for close in tuple(self._closers):
            close()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        until = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def channel(self, capacity: int) -> Channel[T]:
        """Return a channel that is closed when the crew stops."""
        channel: Channel[T] = Channel(capacity)
        self._closers.append(channel.close)
        if self._stopped:
            channel.close()
        return channel

    def ahead(self, items: Iterable[T], capacity: int) -> Iterator[T]:
        """Iterate in a thread of its own, at most ``capacity`` items ahead of the consumer."""
        channel: Channel[T | _End] = self.channel(capacity)
        thread = threading.Thread(target=_feed, args=(items, channel), name="bundle-stage", daemon=True)
        self._threads.append(thread)
        thread.start()
        return _drain(channel)

    def map(self, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
        """Yield ``work(item)`` in the items' order; at most ``ahead`` of them are in work or done.

        The items are iterated in a thread of their own, so that the pool never waits for the consumer.
        """
        for result in self.ahead((self._pool.submit(work, item) for item in items), ahead):
            yield result.result()


def _feed(items: Iterable[T], channel: Channel[T | _End]) -> None:
    end = _End()
    try:
        for item in items:
            channel.put(item)
    except StoppedError:
        return
    except BaseException as failure:  # noqa: BLE001 - it is raised again where the items are consumed
        end = _End(failure)
    try:
        channel.put(end)
    except StoppedError:
        return


def _drain(channel: Channel[T | _End]) -> Iterator[T]:
    while not isinstance(item := channel.get(), _End):
        yield item
    if item.failure is not None:
        raise item.failure
