"""A pipeline of threads that process one stream and stop together: bounded queues, read-ahead, a pool, buffers.

Stages are iterators. A pipeline runs a stage ahead of its consumer in a thread, or maps a function over a stage on
several cores and keeps the order. An error of a stage is raised at its consumer, as by any iterator. Threads that do
one job in the background are in `thrave.concurrency`.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, Self, TypeVar

from thrave.concurrency import Condition, OnFailure, RunningThread, monotonic, new_condition, new_lock, start_thread

STOP_TIMEOUT = 1.0
"""Seconds that all threads of a pipeline have to stop."""


T = TypeVar("T")
R = TypeVar("R")


class StoppedError(Exception):
    """The pipeline was stopped. Raised in its threads, and at its consumer if another thread stopped it."""


class BoundedQueue(Generic[T]):
    """A queue with a maximum length. Closing it wakes the threads that wait at either end."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[T] = deque()
        self._capacity = capacity
        self._changed = new_condition()
        self._closed = False

    def put(self, item: T) -> None:
        """Add an item; wait while the queue is full. Raises StoppedError once the queue is closed."""
        with self._changed:
            # No timeout, here and in `get`: leaving the pipeline closes the queue.
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            self._refuse_if_closed()
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Remove and return the oldest item; wait for one. Raises StoppedError once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._items)
            self._refuse_if_closed()
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Drop all items and wake every waiting thread."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise StoppedError


class Pipeline:
    """The threads of one stream, as a context manager.

    Leaving the ``with`` block stops every thread and waits up to `STOP_TIMEOUT` seconds. A thread that hangs in a read
    cannot be interrupted: it is abandoned, and ends when the read returns.

    Args:
        workers: Threads of the pool that `map` uses.
    """

    def __init__(self, workers: int) -> None:
        self._missing_workers = workers
        self._threads: list[RunningThread] = []
        self._lock = new_lock()  # no thread is started after `stop`, so leaving the block joins all of them
        self._closers: list[Callable[[], None]] = []
        self._stopped = False
        self._jobs: BoundedQueue[Callable[[], None]] = self.queue(sys.maxsize)
        self._job_ended = new_condition()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        deadline = monotonic() + STOP_TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))

    def stop(self) -> None:
        """Stop every thread of the pipeline and every thread that waits for one. Safe from any thread, at any time."""
        with self._lock:
            self._stopped = True
        for close in tuple(self._closers):
            close()
        with self._job_ended:
            self._job_ended.notify_all()

    def queue(self, capacity: int) -> BoundedQueue[T]:
        """Return a new queue, which is closed when the pipeline stops."""
        queue: BoundedQueue[T] = BoundedQueue(capacity)
        self._closers.append(queue.close)
        # `stop` may have run before the queue was registered.
        if self._stopped:
            queue.close()
        return queue

    def prefetch(self, items: Iterable[T], capacity: int) -> Iterator[T]:
        """Iterate over `items` in a thread, at most `capacity` items ahead of the consumer.

        Raises:
            StoppedError: The pipeline was stopped before.
            NoThreadError: No thread can be started.
        """
        queue: BoundedQueue[T | _End] = self.queue(capacity)
        # Errors of the items go through the queue. Close it if that fails, or the consumer would wait forever.
        self._start("bundle-stage", partial(_fill_queue, items, queue), lambda _error: queue.close())
        return _read_queue(queue)

    def map(self, work: Callable[[T], R], items: Iterable[T], limit: int) -> Iterator[R]:
        """Yield ``work(item)`` in the order of the items; at most `limit` of them are in work or finished.

        The items are iterated over in a separate thread, so that the pool never waits for the consumer.
        """
        while self._missing_workers:
            self._start("bundle-worker", partial(_run_jobs, self._jobs), lambda _error: self.stop())
            self._missing_workers -= 1
        for job in self.prefetch((self._submit(partial(work, item)) for item in items), limit):
            yield self._wait_for_result(job)

    def _start(self, name: str, work: Callable[[], None], on_failure: OnFailure) -> None:
        with self._lock:
            if self._stopped:
                raise StoppedError
            self._threads.append(start_thread(name, work, on_failure=on_failure))

    def _submit(self, work: Callable[[], R]) -> "_Job[R]":
        job = _Job(work, self._job_ended)
        self._jobs.put(job.run)
        return job

    def _wait_for_result(self, job: "_Job[R]") -> R:
        with self._job_ended:
            # No timeout: a job ends, or the pipeline is stopped.
            self._job_ended.wait_for(lambda: job.is_done or self._stopped)
            if not job.is_done:
                raise StoppedError
        if job.error is not None:
            raise job.error
        return job.results[0]


class _Job(Generic[R]):
    """One call in the pool."""

    def __init__(self, work: Callable[[], R], ended: Condition) -> None:
        self._work = work
        self._ended = ended
        self.is_done = False
        self.results: list[R] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.results.append(self._work())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is consumed
            self.error = error
        with self._ended:
            self.is_done = True
            self._ended.notify_all()


def _run_jobs(jobs: BoundedQueue[Callable[[], None]]) -> None:
    while True:
        try:
            run = jobs.get()
        except StoppedError:
            return
        run()


@dataclass(frozen=True)
class _End:
    """The last item that a stage puts into its queue, with the error that ended the stage."""

    error: BaseException | None = None


def _fill_queue(items: Iterable[T], queue: BoundedQueue[T | _End]) -> None:
    end = _End()
    try:
        for item in items:
            queue.put(item)
    except StoppedError:
        return
    except BaseException as error:  # noqa: BLE001 - raised again where the items are consumed
        end = _End(error)
    try:
        queue.put(end)
    except StoppedError:
        return


def _read_queue(queue: BoundedQueue[T | _End]) -> Iterator[T]:
    while not isinstance(item := queue.get(), _End):
        yield item
    if item.error is not None:
        raise item.error


class BufferPool:
    """A fixed number of buffers, each with one piece of the stream.

    Libraries return new memory of any size. If other threads keep such pieces for a while, the allocator's heap
    fragments and grows with the length of the stream (glibc 2.36: from 130 to 210 MiB over 8 GiB). Pieces that are
    copied at once are freed by the thread that allocated them, and the memory in use stays constant.

    Args:
        pipeline: Its stages wait for the buffers.
        count: Number of buffers; the stage that fills them waits while all are in use.
        size: Bytes of each buffer; at least the size of the largest piece.
    """

    def __init__(self, pipeline: Pipeline, count: int, size: int) -> None:
        self._unused: BoundedQueue[memoryview] = pipeline.queue(count)
        for _ in range(count):
            self._unused.put(memoryview(bytearray(size)))

    def acquire(self) -> memoryview:
        """Wait for an unused buffer and return it."""
        return self._unused.get()

    def fill(self, pieces: Iterable[bytes]) -> Iterator[memoryview]:
        """Copy the pieces into buffers, as many into each as fit. No piece is larger than a buffer."""
        buffer, used = self.acquire(), 0
        for piece in pieces:
            if used + len(piece) > len(buffer):
                yield buffer[:used]
                buffer, used = self.acquire(), 0
            buffer[used : used + len(piece)] = piece
            used += len(piece)
        yield buffer[:used]

    def release_each(self, pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        """Yield the pieces. The buffer of a piece is reused as soon as the next piece is requested."""
        for piece in pieces:
            yield piece
            self._unused.put(memoryview(piece.obj))
