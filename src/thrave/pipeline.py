"""Threads that work for one stream, and stop together.

The stages of a bundle are iterators; a crew lets one run ahead of the next in a thread of its own, or maps a function
over one on every core, in order, always within a bound. Whatever a stage raises comes out at its consumer, like
from any iterator. Leaving the crew's ``with`` block stops every thread before it returns: none outlives its stream,
but for one that hangs in a read, which nothing can interrupt. It is left behind, and stops when the read ends.

A stream's bytes in memory that is used over and over.

What a library returns is new memory each time, and of every size. Kept for a while by other threads, such pieces
tear holes into the allocator's heap, which then grows with the length of the stream (glibc 2.36: from 130 to 210 MiB
over 8 GiB). Copied at once, they are freed where they were made, and what is kept is as large as it was at first.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, Self, TypeVar

from thrave.concurrency import Background, supervised

PATIENCE = 1.0
"""Seconds that the threads of a crew have to stop, together."""


T = TypeVar("T")


R = TypeVar("R")


class StoppedError(Exception):
    """The crew has been told to stop; seen inside its threads, and by the consumer if somebody else said so."""


class BoundedQueue(Generic[T]):
    """A queue with a bound, which can be closed under those who wait at either end."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[T] = deque()
        self._capacity = capacity
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T) -> None:
        """Add an item; wait while the channel is full. Raises StoppedError once it is closed."""
        with self._changed:
            # No timeout, here and in `get`: leaving the crew closes the channel.
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


class Pipeline:
    """The threads of one stream; a context manager.

    Args:
        workers: threads of the pool that ``map`` uses.
    """

    def __init__(self, workers: int) -> None:
        self._number = workers
        self._workers: list[Background] = []
        self._threads: list[Background] = []
        self._closers: list[Callable[[], None]] = []
        self._stopped = False
        self._jobs: BoundedQueue[Callable[[], None]] = self.channel(sys.maxsize)
        self._job_ended = threading.Condition()

    def __enter__(self) -> Self:
        return self

    def stop(self) -> None:
        """Have every thread of the crew, and whoever waits for one, stop; any thread may call this, at any time."""
        self._stopped = True
        for close in tuple(self._closers):
            close()
        with self._job_ended:
            self._job_ended.notify_all()

    def __exit__(self, *_: object) -> None:
        self.stop()
        until = time.monotonic() + PATIENCE
        for thread in (*self._threads, *self._workers):
            thread.join(max(0.0, until - time.monotonic()))

    def channel(self, capacity: int) -> BoundedQueue[T]:
        """Return a channel that is closed when the crew stops."""
        channel: BoundedQueue[T] = BoundedQueue(capacity)
        self._closers.append(channel.close)
        if self._stopped:
            channel.close()
        return channel

    def ahead(self, items: Iterable[T], capacity: int) -> Iterator[T]:
        """Iterate in a thread of its own, at most ``capacity`` items ahead of the consumer."""
        channel: BoundedQueue[T | _End] = self.channel(capacity)
        # What the items raise goes through the channel; the consumer must not wait if that fails.
        feed = supervised("bundle-stage", partial(_feed, items, channel), on_failure=lambda _error: channel.close())
        self._threads.append(feed)
        return _drain(channel)

    def map(self, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
        """Yield ``work(item)`` in the items' order; at most ``ahead`` of them are in work or done.

        The items are iterated in a thread of their own, so that the pool never waits for the consumer.
        """
        while len(self._workers) < self._number:
            work_off = partial(_work_off, self._jobs)
            self._workers.append(supervised("bundle-worker", work_off, on_failure=lambda _error: self.stop()))
        for job in self.ahead((self._submit(partial(work, item)) for item in items), ahead):
            yield self._result(job)

    def _submit(self, work: Callable[[], R]) -> "_Job[R]":
        job = _Job(work, self._job_ended)
        self._jobs.put(job.do)
        return job

    def _result(self, job: "_Job[R]") -> R:
        with self._job_ended:
            # No timeout: a job ends, or the crew is stopped.
            self._job_ended.wait_for(lambda: job.is_done or self._stopped)
            if not job.is_done:
                raise StoppedError
        if job.failure is not None:
            raise job.failure
        return job.results[0]


class _Job(Generic[R]):
    """One call of the pool's."""

    def __init__(self, work: Callable[[], R], ended: threading.Condition) -> None:
        self._work = work
        self._ended = ended
        self.is_done = False
        self.results: list[R] = []
        self.failure: BaseException | None = None

    def do(self) -> None:
        try:
            self.results.append(self._work())
        except BaseException as failure:  # noqa: BLE001 - it is raised again where the result is consumed
            self.failure = failure
        with self._ended:
            self.is_done = True
            self._ended.notify_all()


def _work_off(jobs: BoundedQueue[Callable[[], None]]) -> None:
    while True:
        try:
            do = jobs.get()
        except StoppedError:
            return
        do()


def _feed(items: Iterable[T], channel: BoundedQueue[T | _End]) -> None:
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


def _drain(channel: BoundedQueue[T | _End]) -> Iterator[T]:
    while not isinstance(item := channel.get(), _End):
        yield item
    if item.failure is not None:
        raise item.failure


class BufferPool:
    """A fixed number of buffers, each with one piece of the stream.

    Args:
        crew: whose stages wait for them.
        count: how many; the stage that fills them waits while all are in use.
        size: bytes of each, as many as the largest piece has.
    """

    def __init__(self, crew: Pipeline, count: int, size: int) -> None:
        self._unused: BoundedQueue[memoryview] = crew.channel(count)
        for _ in range(count):
            self._unused.put(memoryview(bytearray(size)))

    def free(self) -> memoryview:
        """Wait for a buffer that nobody uses."""
        return self._unused.get()

    def filled(self, pieces: Iterable[bytes]) -> Iterator[memoryview]:
        """Copy the pieces into buffers, as many into each as it has room for; none is larger than a buffer."""
        buffer, used = self.free(), 0
        for piece in pieces:
            if used + len(piece) > len(buffer):
                yield buffer[:used]
                buffer, used = self.free(), 0
            buffer[used : used + len(piece)] = piece
            used += len(piece)
        yield buffer[:used]

    def freed(self, pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        """Hand on pieces, each of which is somebody else's memory as soon as the next is asked for."""
        for piece in pieces:
            yield piece
            self._unused.put(memoryview(piece.obj))
