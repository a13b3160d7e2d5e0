"""A volume sealed into a bucket: parts sent at once and out of order, crashes, refusals, and a store that hangs."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from support import storing
from support.buckets import owners
from support.sealed import private_key
from support.storing import BUCKET, MANIFEST, OWNER, PREFIX, HeldBuckets, directory, noise_disk, opened, part
from thrave.buckets.errors import AccessDenied, TransientError
from thrave.bundle.deflate import CHUNK
from thrave.bundle.names import PART_SIZE
from thrave.tasks.failures import Cancelled, TaskFailure
from thrave.volumes.raw import RawVolume

PARTS = 10
CHUNKS = 8 * (os.cpu_count() or 1) * CHUNK  # bytes: read and not yet deflated, deflated and not yet enciphered


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    return noise_disk(tmp_path_factory.mktemp("disk") / "root.raw", PARTS)


@pytest.fixture
def buckets(tmp_path):
    buckets = directory(tmp_path)
    yield buckets
    buckets.let_go()


@pytest.fixture
def made_bench(tmp_path):
    """Makes a task's bench; all of one test have the same database."""
    with ExitStack() as stack:
        yield lambda buckets, **options: stack.enter_context(closing(storing.Bench(tmp_path, buckets, **options)))


@pytest.fixture
def bench(made_bench, buckets):
    return made_bench(buckets)


@pytest.fixture
def killed(made_bench, tmp_path):
    """Seals in another process, killed when all parts up to the last of those that are held are stored but these."""

    def kill(disk, *held):
        argv = [sys.executable, "-m", "support.storing", tmp_path, disk, *map(str, held)]
        stored = [number not in held for number in range(held[-1] + 1)]
        bench = made_bench(directory(tmp_path))
        with subprocess.Popen(argv, cwd=Path(__file__).parents[1]) as process:
            wait_until(lambda: [item.size is not None for item in bench.journal.objects()] == stored)
            process.send_signal(signal.SIGKILL)
        return bench

    return kill


@pytest.fixture
def begun(buckets):
    """Begins something in another thread."""
    with ThreadPoolExecutor() as threads:
        yield threads.submit
        buckets.let_go()


def numbers(keys):
    return [int(key.rpartition(".")[2]) for key in keys]


class StoppingVolume(RawVolume):
    """A volume that can be read up to some place; behind that a read hangs until somebody lets it go."""

    def __init__(self, path, end, gate):
        super().__init__(path)
        self.read, self._end, self._gate = 0, end, gate

    def read_into(self, offset, buffer):
        if offset + len(buffer) > self._end:
            self._gate.wait()
        super().read_into(offset, buffer)
        self.read += len(buffer)


def test_parts_that_come_back_in_any_order_are_one_bundle(tmp_path, disk, buckets, bench):
    def let_the_next_go_first(what, key):
        if what == "put" and int(key[-2:]) % 2 == 0:
            following = f"{key[:-2]}{int(key[-2:]) + 1:02}"
            buckets.wait_for(lambda: following in buckets.ended)

    buckets.before = let_the_next_go_first
    sealed = bench.seal(RawVolume(disk))
    assert len(sealed.parts) == PARTS
    assert 1 < buckets.most_at_once <= 4
    assert opened(tmp_path, sealed, private_key("user")) == disk.read_bytes()
    assert [(item.key, item.size) for item in bench.journal.objects()] == [(p.filename, p.size) for p in sealed.parts]


def test_sealing_waits_for_a_slow_upload_only_when_it_is_a_window_ahead(disk, buckets, bench, begun):
    buckets.hold("put", part(0))
    sealing = begun(bench.seal, RawVolume(disk), at_once=2)
    buckets.wait_for(lambda: len(buckets.ended) == 7)
    time.sleep(0.3)
    assert sorted(numbers(buckets.begun)) == [*range(8)]
    buckets.let_go()
    assert len(sealing.result().parts) == PARTS


def test_no_more_parts_are_in_memory_than_may_be_sent_at_once_and_three(disk, buckets, bench):
    buckets.hold("put")
    volume = StoppingVolume(disk, disk.stat().st_size, threading.Event())
    with pytest.raises(TaskFailure, match=r"Server\.NoProgress"):
        bench.seal(volume, at_once=2, stall_timeout=1.0)
    assert len(buckets.begun) == 2
    assert volume.read < (2 + 3) * PART_SIZE + CHUNKS


def test_an_upload_that_is_refused_stops_the_others_and_nothing_stays(disk, buckets, bench):
    def refuse(what, key):
        if what == "put" and key.endswith(part(3)):
            raise AccessDenied("Policy expired.")

    buckets.before = refuse
    buckets.hold("put", part(1))
    store = bench.store()
    with pytest.raises(AccessDenied):
        bench.seal(RawVolume(disk), store=store)
    store.remove()
    assert bench.stored_keys() == []
    assert [item.key for item in bench.journal.objects()] == [PREFIX + part(1)]  # it may yet come
    assert len(buckets.begun) < PARTS
    buckets.let_go()
    buckets.wait_for(lambda: len(buckets.ended) == len(buckets.begun))
    wait_until(lambda: bench.stored_keys() == [])


def test_a_cancellation_takes_effect_while_uploads_hang(disk, buckets, bench, begun):
    buckets.hold("put")
    sealing = begun(bench.seal, RawVolume(disk))
    buckets.wait_for(lambda: len(buckets.begun) == 4)
    assert bench.records.cancel(bench.bundle_id)
    with pytest.raises(Cancelled):
        sealing.result(timeout=30)
    assert len(buckets.ended) == 0
    buckets.let_go()
    buckets.wait_for(lambda: len(buckets.ended) == 4)
    wait_until(lambda: bench.stored_keys() == [])


def test_a_disk_that_stops_answering_fails_the_task(disk, bench):
    gate = threading.Event()
    with pytest.raises(TaskFailure, match=r"Server\.NoProgress: Nothing could be read or stored for 1 seconds"):
        bench.seal(StoppingVolume(disk, 3 * PART_SIZE, gate), stall_timeout=1.0)
    gate.set()


def test_a_disk_that_is_slow_does_not(disk, bench):
    class Slow(RawVolume):
        def read_into(self, offset, buffer):
            time.sleep(0.02)
            super().read_into(offset, buffer)

    assert bench.seal(Slow(disk), stall_timeout=1.0)


@pytest.mark.parametrize("hanging", ["head", "put"])
def test_a_store_that_stops_answering_fails_the_task_at_its_end_too(disk, buckets, bench, hanging):
    bench.seal(RawVolume(disk))
    store = bench.store()
    buckets.hold(hanging)

    def finish():
        with bench.watch(stall_timeout=1.0) as watch:
            store.check(watch)
            store.put(MANIFEST, b"<manifest/>", watch)

    with pytest.raises(TaskFailure, match=r"Server\.NoProgress"):
        finish()


def test_removing_from_a_store_that_does_not_answer_ends_and_can_be_done_again(disk, buckets, bench):
    bench.seal(RawVolume(disk))
    buckets.hold("delete")
    with pytest.raises(TaskFailure, match=r"Server\.NoProgress"):
        bench.store(stall_timeout=0.5).remove()
    assert len(bench.journal.objects()) == PARTS
    buckets.let_go()
    bench.store().remove()
    assert (bench.stored_keys(), bench.journal.objects()) == ([], [])


@pytest.mark.parametrize("held", [(0, 7, 8), (3, 7, 8), (3, 5, 8)])
def test_after_a_kill_no_part_is_sent_again_but_those_in_flight(tmp_path, disk, killed, held):
    bench = killed(disk, *held)
    before = bench.journal.left()
    assert (before.first, sorted(n for n, sent in before.sent.items() if not sent.stored)) == (held[0], [*held])
    sealed = bench.seal(RawVolume(disk))
    assert sealed.secrets == before.secrets
    assert sorted(numbers(bench.buckets.begun)) == [*held, 9]
    assert opened(tmp_path, sealed, private_key("user")) == disk.read_bytes()
    beyond = sum(number not in held for number in range(held[0], held[-1]))
    assert bench.told() == [f"Sealing goes on after {held[0]} parts; {beyond} beyond them are stored."]


@pytest.mark.parametrize("changed", [1, 3, 6], ids=["before the checkpoint", "in flight", "beyond"])
def test_a_disk_that_changed_after_a_kill_is_sealed_with_another_key(tmp_path, disk, killed, changed):
    other = tmp_path / "root.raw"
    other.write_bytes(disk.read_bytes())
    bench = killed(other, 3, 7, 8)
    first = bench.journal.left().secrets
    with other.open("r+b") as file:
        file.seek(changed * PART_SIZE + PART_SIZE // 2)
        file.write(b"somebody was here")
    sealed = bench.seal(RawVolume(other))
    assert sealed.secrets != first
    assert "Sealing begins again with another key: " in bench.told()[1]
    assert opened(tmp_path, sealed, private_key("user")) == other.read_bytes()


def test_an_earlier_bundles_manifest_goes_before_its_first_part(disk, buckets, bench):
    buckets.put(BUCKET, MANIFEST, b"<manifest/>")
    there = []
    buckets.before = lambda what, _: what == "put" and there.append(bench.stored_keys().count(MANIFEST))
    bench.seal(RawVolume(disk))
    assert not any(there)
    assert bench.told() == ["The manifest of an earlier bundle was removed, because its parts are overwritten now."]


def test_what_a_later_task_has_stored_in_the_same_place_is_not_removed(disk, buckets, bench, made_bench):
    bench.seal(RawVolume(disk))
    later = made_bench(buckets, bundle_id="bun-00000002")
    later.seal(RawVolume(disk))
    bench.store().remove()
    assert len(later.stored_keys()) == PARTS
    later.store().remove()
    assert later.stored_keys() == []


def test_a_part_that_somebody_else_overwrote_is_noticed(disk, buckets, bench):
    sealed = bench.seal(RawVolume(disk))
    buckets.put(BUCKET, sealed.parts[4].filename, b"somebody was here")
    with (
        pytest.raises(TaskFailure, match=rf"something else now as '{PREFIX}{part(4)}'"),
        bench.watch() as watch,
    ):
        bench.store().check(watch)


def test_how_often_the_store_was_asked_again_is_told(disk, buckets, bench):
    def fail(what, key):
        if what == "put" and key.endswith(part(3)) and key in buckets.ended:
            return
        if what == "put" and key.endswith(part(3)):
            raise TransientError("SlowDown", 503, "Please reduce your request rate.")

    buckets.before = fail
    bench.seal(RawVolume(disk), patience=30.0)
    assert bench.told() == [
        "Calls to the store that were made again: 1, the last after SlowDown(503)- Please reduce your request rate."
    ]


@pytest.mark.s3
def test_a_part_of_the_same_size_that_somebody_else_wrote_is_noticed_by_its_etag(disk, made_bench, seaweedfs):
    buckets = owners(seaweedfs).of(OWNER)
    buckets.create(BUCKET, OWNER)
    bench = made_bench(HeldBuckets(buckets))
    sealed = bench.seal(RawVolume(disk))
    assert [item.etag for item in bench.journal.objects()] == [
        buckets.head(BUCKET, key).etag for key in bench.stored_keys()
    ]
    with bench.watch() as watch:
        bench.store().check(watch)
    buckets.put(BUCKET, sealed.parts[4].filename, bytes(PART_SIZE))
    with (
        pytest.raises(TaskFailure, match=rf"something else now as '{PREFIX}{part(4)}'"),
        bench.watch() as watch,
    ):
        bench.store().check(watch)
    bench.store().remove()
    assert bench.stored_keys() == []


def test_the_journal_is_the_same_on_every_database(disk, buckets, made_bench, database):
    bench = made_bench(buckets, **database)
    first = bench.seal(RawVolume(disk))
    left = bench.journal.left()
    assert (left.first, [*left.sent]) == (PARTS - 1, [PARTS - 1])
    assert bench.seal(RawVolume(disk)).parts == first.parts
    assert len(buckets.begun) == PARTS
    bench.store().remove()
    assert (bench.journal.left(), bench.journal.objects(), bench.stored_keys()) == (None, [], [])


def wait_until(condition, seconds=60):
    given_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < given_up
        time.sleep(0.01)
