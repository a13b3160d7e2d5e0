"""Threads that work for one stream: in order, within bounds, never left behind."""

import threading
import time

import pytest

from thrave.pipeline import BoundedQueue, Pipeline, StoppedError


def crew_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("bundle-")]


def test_map_returns_results_in_order():
    def slowest_first(number):
        time.sleep((10 - number) / 1000)
        return number * number

    with Pipeline(4) as pipeline:
        assert list(pipeline.map(slowest_first, range(10), limit=4)) == [n * n for n in range(10)]


@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_ahead_makes_no_more_than_its_limit(ahead):
    made = []

    def numbers():
        for number in range(100):
            made.append(number)
            yield number

    with Pipeline(1) as pipeline:
        items = pipeline.prefetch(numbers(), ahead)
        assert next(items) == 0
        time.sleep(0.05)
        assert len(made) <= ahead + 2


def test_ahead_returns_all_items_before_the_error():
    def failing():
        yield from range(3)
        raise OSError("no more")

    found = []
    with Pipeline(2) as pipeline, pytest.raises(OSError, match="no more"):
        found.extend(pipeline.map(str, failing(), limit=2))
    assert found == ["0", "1", "2"]


def test_exit_stops_threads_that_wait_at_either_end():
    with Pipeline(2) as pipeline:
        empty: BoundedQueue[int] = pipeline.queue(1)
        pipeline.prefetch(iter(empty.get, None), 1)
        pipeline.prefetch(iter(int, 1), 1)
        assert len(crew_threads()) == 2
    assert crew_threads() == []


def test_stop_before_start_takes_effect_at_start():
    pipeline = Pipeline(1)
    pipeline.stop()
    with pipeline, pytest.raises(StoppedError):
        next(pipeline.prefetch(range(10), 1))
    assert crew_threads() == []


def test_closed_channel_accepts_and_returns_nothing():
    channel: BoundedQueue[int] = BoundedQueue(1)
    channel.put(1)
    channel.close()
    for use in (channel.get, lambda: channel.put(2)):
        with pytest.raises(StoppedError):
            use()


def test_exit_abandons_stage_that_hangs_until_its_read_ends():
    lets_go = threading.Event()

    def hanging():
        yield 1
        lets_go.wait()
        yield 2

    with Pipeline(1) as pipeline:
        assert next(pipeline.prefetch(hanging(), 1)) == 1
    (left,) = crew_threads()
    lets_go.set()
    left.join(10)
    assert crew_threads() == []


def test_exit_abandons_hanging_call_and_wakes_its_waiter():
    begun, lets_go, woken = threading.Event(), threading.Event(), []

    def hang(_item):
        begun.set()
        lets_go.wait()

    def consume(results):
        with pytest.raises(StoppedError):
            next(results)
        woken.append(True)

    with Pipeline(1) as pipeline:
        consumer = threading.Thread(target=consume, args=[pipeline.map(hang, range(4), 2)])
        consumer.start()
        assert begun.wait(60)
    consumer.join(60)
    assert woken
    lets_go.set()
    for thread in crew_threads():
        thread.join(60)
    assert crew_threads() == []
