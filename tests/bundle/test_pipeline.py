"""`Pipeline` keeps the order of items, limits queues, and stops all its threads."""

import threading
import time

import pytest

from thrave.pipeline import BoundedQueue, Pipeline, StoppedError


def pipeline_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("bundle-")]


def test_map_returns_results_in_order():
    def slowest_first(number):
        time.sleep((10 - number) / 1000)
        return number * number

    with Pipeline(4) as pipeline:
        assert list(pipeline.map(slowest_first, range(10), limit=4)) == [n * n for n in range(10)]


@pytest.mark.parametrize("capacity", [1, 3, 8])
def test_prefetch_reads_at_most_capacity_items_ahead(capacity):
    items_read = []

    def numbers():
        for number in range(100):
            items_read.append(number)
            yield number

    with Pipeline(1) as pipeline:
        items = pipeline.prefetch(numbers(), capacity)
        assert next(items) == 0
        time.sleep(0.05)
        assert len(items_read) <= capacity + 2


def test_map_yields_all_results_before_error():
    def failing():
        yield from range(3)
        raise OSError("no more")

    found = []
    with Pipeline(2) as pipeline, pytest.raises(OSError, match="no more"):
        found.extend(pipeline.map(str, failing(), limit=2))
    assert found == ["0", "1", "2"]


def test_exit_stops_threads_waiting_for_queue():
    with Pipeline(2) as pipeline:
        empty: BoundedQueue[int] = pipeline.queue(1)
        pipeline.prefetch(iter(empty.get, None), 1)
        pipeline.prefetch(iter(int, 1), 1)
        assert len(pipeline_threads()) == 2
    assert pipeline_threads() == []


def test_stop_before_start_stops_new_stage():
    pipeline = Pipeline(1)
    pipeline.stop()
    with pipeline, pytest.raises(StoppedError):
        next(pipeline.prefetch(range(10), 1))
    assert pipeline_threads() == []


def test_closed_queue_refuses_put_and_get():
    queue: BoundedQueue[int] = BoundedQueue(1)
    queue.put(1)
    queue.close()
    for use in (queue.get, lambda: queue.put(2)):
        with pytest.raises(StoppedError):
            use()


def test_exit_abandons_stage_that_hangs_in_read():
    release = threading.Event()

    def hanging():
        yield 1
        release.wait()
        yield 2

    with Pipeline(1) as pipeline:
        assert next(pipeline.prefetch(hanging(), 1)) == 1
    (abandoned,) = pipeline_threads()
    release.set()
    abandoned.join(10)
    assert pipeline_threads() == []


def test_exit_abandons_hanging_call_and_wakes_consumer():
    started, release, woken = threading.Event(), threading.Event(), []

    def hang(_item):
        started.set()
        release.wait()

    def consume(results):
        with pytest.raises(StoppedError):
            next(results)
        woken.append(True)

    with Pipeline(1) as pipeline:
        consumer = threading.Thread(target=consume, args=[pipeline.map(hang, range(4), 2)])
        consumer.start()
        assert started.wait(60)
    consumer.join(60)
    assert woken
    release.set()
    for thread in pipeline_threads():
        thread.join(60)
    assert pipeline_threads() == []
