"""Upload of a volume: parallel uploads, crashes, refusals, and a store that hangs."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from support.buckets.bucket_drivers import owners
from support.bundles.sample_bundles import manifest_of, private_key
from support.eventually import eventually, one_of
from support.service.upload_bench import (
    BUCKET,
    MANIFEST,
    OWNER,
    PREFIX,
    BlockingStore,
    UploadBench,
    directory,
    noise_disk,
    opened,
    part,
)
from thrave.buckets.errors import AccessDenied, TransientError
from thrave.bundle.gzip_stream import CHUNK
from thrave.bundle.model import PART_SIZE, bound_side_filename, part_pattern, side_filename
from thrave.tasks.bundle_location import MIN_MANIFEST_SIZE, BundleLocation
from thrave.tasks.errors import TaskCancelled, TaskFailure
from thrave.tasks.housekeeping import ObjectCleanup
from thrave.tasks.models import BundleTaskState
from thrave.tasks.queries import TaskQueries
from thrave.volumes.raw import RawVolume

PARTS = 10
CHUNKS = 8 * (os.cpu_count() or 1) * CHUNK  # bytes that are read and not compressed, or compressed and not encrypted


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    return noise_disk(tmp_path_factory.mktemp("disk") / "root.raw", PARTS)


@pytest.fixture
def make_bench(tmp_path):
    """Return a function that creates a bench; all benches of a test have the same database."""
    with ExitStack() as stack:
        yield lambda buckets, **options: stack.enter_context(closing(UploadBench(tmp_path, buckets, **options)))


@pytest.fixture
def bench(make_bench, buckets):
    return make_bench(buckets)


@pytest.fixture
def killed(make_bench, tmp_path):
    """Return a function that seals in another process, and kills it once all unblocked parts before the last blocked
    one are stored."""

    def kill(disk, *held):
        argv = [sys.executable, "-m", "support.service.upload_bench", tmp_path, disk, *map(str, held)]
        stored = [number not in held for number in range(held[-1] + 1)]
        bench = make_bench(directory(tmp_path))
        with subprocess.Popen(argv, cwd=Path(__file__).parents[1]) as process:
            eventually(lambda: [item.size is not None for item in bench.journal.objects()] == stored)
            process.send_signal(signal.SIGKILL)
        return bench

    return kill


def numbers(keys):
    return [int(key.rpartition(".")[2]) for key in keys]


class StoppingVolume(RawVolume):
    """A volume that can be read up to an offset; a read behind it hangs until the test releases it."""

    def __init__(self, path, end, gate):
        super().__init__(path)
        self.read, self._end, self._gate = 0, end, gate

    def read_into(self, offset, buffer):
        if offset + len(buffer) > self._end:
            self._gate.wait()
        super().read_into(offset, buffer)
        self.read += len(buffer)


def test_uploads_that_end_in_any_order_make_one_bundle(tmp_path, disk, buckets, bench):
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


def test_sealing_waits_for_slow_upload_only_at_end_of_window(disk, buckets, bench, run_in_thread):
    buckets.block("put", part(0))
    sealing = run_in_thread(bench.seal, RawVolume(disk), at_once=2)
    buckets.wait_for(lambda: len(buckets.ended) == 7)
    time.sleep(0.3)
    assert sorted(numbers(buckets.started)) == [*range(8)]
    buckets.release_all()
    assert len(sealing.result().parts) == PARTS


def test_parts_in_memory_are_limited(disk, buckets, bench, run_in_thread, stall_clock):
    buckets.block("put")
    volume = StoppingVolume(disk, disk.stat().st_size, threading.Event())
    sealing = run_in_thread(bench.seal, volume, at_once=2, stall_timeout=1.0)
    eventually(lambda: len(buckets.started), until=one_of(2))
    stall_clock.run()
    with pytest.raises(TaskFailure, match=r"Server\.NoProgress"):
        sealing.result(120)
    assert len(buckets.started) == 2
    assert volume.read < (2 + 3) * PART_SIZE + CHUNKS


def test_refused_upload_stops_the_others(disk, buckets, bench):
    def refuse(what, key):
        if what == "put" and key.endswith(part(3)):
            raise AccessDenied("Policy expired.")

    buckets.before = refuse
    buckets.block("put", part(1))
    store = bench.store()
    with pytest.raises(AccessDenied):
        bench.seal(RawVolume(disk), store=store)
    buckets.wait_for(lambda: len(buckets.ended) == len(buckets.started) - 1)
    store.remove_objects()
    assert bench.stored_keys() == []
    assert [item.key for item in bench.journal.objects()] == [PREFIX + part(1)]  # its request may still arrive
    assert len(buckets.started) < PARTS
    buckets.release_all()
    buckets.wait_for(lambda: len(buckets.ended) == len(buckets.started))
    eventually(lambda: store.remove_objects() or bench.journal.objects() == [])
    assert bench.stored_keys() == []


def test_cancellation_takes_effect_while_uploads_hang(disk, buckets, bench, run_in_thread):
    buckets.block("put")
    sealing = run_in_thread(bench.seal, RawVolume(disk))
    buckets.wait_for(lambda: len(buckets.started) == 4)
    assert bench.records.cancel(bench.bundle_id)
    with pytest.raises(TaskCancelled):
        sealing.result(timeout=30)
    assert len(buckets.ended) == 0
    buckets.release_all()
    buckets.wait_for(lambda: len(buckets.ended) == 4)
    store = bench.store()
    eventually(lambda: store.remove_objects() or bench.journal.objects() == [])
    assert bench.stored_keys() == []


def test_unresponsive_disk_fails_task(disk, bench):
    gate = threading.Event()
    with pytest.raises(TaskFailure, match=r"Server\.NoProgress: No progress for 1 seconds"):
        bench.seal(StoppingVolume(disk, 3 * PART_SIZE, gate), stall_timeout=1.0)
    gate.set()


def test_slow_disk_does_not_fail_task(disk, bench, stall_clock):
    class Slow(RawVolume):
        slow_reads = 5

        def read_into(self, offset, buffer):
            if self.slow_reads:
                self.slow_reads -= 1
                stall_clock.advance(0.4)
            super().read_into(offset, buffer)

    assert bench.seal(Slow(disk), stall_timeout=1.0)


@pytest.mark.parametrize("hanging", ["head", "put"])
def test_unresponsive_store_fails_task_also_at_its_end(disk, buckets, bench, hanging):
    documents = bench.documents(bench.seal(RawVolume(disk)))
    store = bench.store()
    buckets.block(hanging)

    def finish():
        with bench.monitor(stall_timeout=1.0) as monitor:
            store.verify_stored(documents, monitor)
            store.put_manifest(documents, monitor, lambda: True)

    with pytest.raises(TaskFailure, match=r"Server\.NoProgress"):
        finish()


def test_removal_from_unresponsive_store_ends_and_can_be_repeated(disk, buckets, bench):
    bench.seal(RawVolume(disk))
    buckets.block("delete")
    with pytest.raises(TaskFailure, match=r"Server\.NoProgress"):
        bench.store(stall_timeout=0.5).remove_objects()
    assert len(bench.journal.objects()) == PARTS
    buckets.release_all()
    store = bench.store()
    eventually(lambda: store.remove_objects() or bench.journal.objects() == [])
    assert bench.stored_keys() == []


@pytest.mark.parametrize("held", [(0, 7, 8), (3, 7, 8), (3, 5, 8)])
def test_only_parts_in_flight_are_uploaded_again_after_kill(tmp_path, disk, killed, held):
    bench = killed(disk, *held)
    before = bench.journal.resume_state()
    assert (before.first_part, sorted(n for n, sent in before.sent.items() if not sent.stored)) == (held[0], [*held])
    sealed = bench.seal(RawVolume(disk))
    assert sealed.bundle_key == before.bundle_key
    assert sorted(numbers(bench.buckets.started)) == [*held, 9]
    assert opened(tmp_path, sealed, private_key("user")) == disk.read_bytes()
    beyond = sum(number not in held for number in range(held[0], held[-1]))
    assert bench.events() == [f"Sealing resumes after {held[0]} parts; {beyond} later parts are already stored."]


@pytest.mark.parametrize("changed", [1, 3, 6], ids=["before the checkpoint", "in flight", "beyond"])
def test_disk_that_changed_after_kill_is_sealed_with_another_key(tmp_path, disk, killed, changed):
    other = tmp_path / "root.raw"
    other.write_bytes(disk.read_bytes())
    bench = killed(other, 3, 7, 8)
    first = bench.journal.resume_state().bundle_key
    with other.open("r+b") as file:
        file.seek(changed * PART_SIZE + PART_SIZE // 2)
        file.write(b"overwritten part")
    sealed = bench.seal(RawVolume(other))
    assert sealed.bundle_key != first
    assert "Sealing restarts with another key: " in bench.events()[1]
    assert opened(tmp_path, sealed, private_key("user")) == other.read_bytes()


def test_verify_stored_finds_overwritten_part(disk, buckets, bench):
    sealed = bench.seal(RawVolume(disk))
    buckets.put(BUCKET, sealed.parts[4].filename, b"overwritten part")
    with (
        pytest.raises(TaskFailure, match=rf"a different object now as '{PREFIX}{part(4)}'"),
        bench.monitor() as monitor,
    ):
        bench.store().verify_stored(bench.documents(sealed), monitor)


def test_event_has_number_of_repeated_store_calls(disk, buckets, bench):
    def fail(what, key):
        if what == "put" and key.endswith(part(3)) and key in buckets.ended:
            return
        if what == "put" and key.endswith(part(3)):
            raise TransientError("SlowDown", 503, "Please reduce your request rate.")

    buckets.before = fail
    bench.seal(RawVolume(disk), retry_timeout=30.0)
    assert bench.events() == [
        "Calls to the store that were repeated: 1, the last after SlowDown(503)- Please reduce your request rate."
    ]


def sealed_bundle(bench, disk, **options):
    """Store a complete bundle of a small disk, and end its task."""
    sealed = bench.seal(RawVolume(disk), **options)
    bench.finish(sealed, **options)
    assert bench.records.complete(bench.bundle_id)
    return sealed


def contents(bench):
    return {key: bench.buckets.get(BUCKET, key) for key in bench.stored_keys()}


def failed(bench):
    bench.records.fail(bench.bundle_id, TaskCancelled())


def test_upload_refuses_prefix_with_bundle(small, buckets, make_bench):
    sealed_bundle(make_bench(buckets), small)
    before = contents(make_bench(buckets))
    second = make_bench(buckets, bundle_id="bun-00000002")
    with pytest.raises(TaskFailure, match=r"Client\.PrefixInUse"):
        second.seal(RawVolume(small))
    second.store().remove_objects()
    assert contents(second) == before


def test_put_manifest_refuses_manifest_stored_during_sealing(small, buckets, bench):
    sealed = bench.seal(RawVolume(small))
    buckets.put(BUCKET, MANIFEST, b"m" * MIN_MANIFEST_SIZE)
    with pytest.raises(TaskFailure, match=r"Client\.PrefixInUse"):
        bench.finish(sealed)
    bench.store().remove_objects()
    assert contents(bench) == {MANIFEST: b"m" * MIN_MANIFEST_SIZE}


def test_upload_never_overwrites_objects_under_prefix(small, buckets, bench):
    """Parts of another user without a manifest, and a side file, are at the location of the bundle."""
    strange = {f"{PREFIX}.part.{number}": b"of another user" for number in range(3)} | {side_filename(PREFIX): b"{}"}
    for key, data in strange.items():
        buckets.put(BUCKET, key, data)
    sealed = bench.seal(RawVolume(small))
    bench.finish(sealed)
    assert contents(bench).items() >= strange.items()
    bench.store().remove_objects()
    assert contents(bench) == strange


def test_sealings_of_one_prefix_use_different_keys(small, buckets, make_bench):
    """A failed task, two complete ones, and one that restarted with another key."""
    names = []
    for number in range(1, 5):
        bench = make_bench(buckets, bundle_id=f"bun-{number:08}")
        sealed = bench.seal(RawVolume(small), existing="replace")
        names += [{part.filename for part in sealed.parts}]
        if number == 4:
            bench.journal.start_sealing(sealed.bundle_key)  # as after a crash, if the sealing cannot be resumed
            bench.store().remove_objects()
            sealed = bench.seal(RawVolume(small), existing="replace")
            names += [{part.filename for part in sealed.parts}]
        if number == 1:
            bench.store().remove_objects()
            failed(bench)
        else:
            bench.finish(sealed, existing="replace")
            bench.records.complete(bench.bundle_id)
    assert len(set().union(*names)) == sum(map(len, names))
    assert all(part_pattern(PREFIX).fullmatch(name) for name in set().union(*names))
    assert names[0] == {f"{PREFIX}.part.0"}


@pytest.fixture
def small(tmp_path):
    return noise_disk(tmp_path / "small.raw", 1)


@pytest.fixture
def replacing(tmp_path, small, buckets, make_bench):
    """Prepare a second task at the location of a complete bundle, up to the upload of its manifest."""
    first = make_bench(buckets)
    sealed_bundle(first, small)
    before = contents(first)
    other = noise_disk(tmp_path / "other.raw", 2, seed=2)
    bench = make_bench(buckets, bundle_id="bun-00000002")
    return bench, before, bench.seal(RawVolume(other), existing="replace"), other


def test_replacement_keeps_earlier_bundle_until_manifest_is_stored(tmp_path, replacing):
    bench, before, sealed, other = replacing
    assert contents(bench).items() >= before.items()

    def look(what, key):
        if what == "put":
            assert contents(bench).items() >= before.items()

    bench.buckets.before = look
    bench.finish(sealed, existing="replace")
    bench.store().remove_earlier()
    side_file = bound_side_filename(PREFIX, bench.buckets.get(BUCKET, MANIFEST))
    assert bench.stored_keys() == sorted([MANIFEST, side_file, *(part.filename for part in sealed.parts)])
    assert bench.journal.earlier() is None
    assert opened(tmp_path, sealed, private_key("user")) == other.read_bytes()


@pytest.mark.parametrize("moment", ["parts", "side file", "manifest refused", "manifest damaged", "manifest stored"])
def test_failed_replacement_leaves_exactly_the_earlier_bundle(replacing, moment):
    bench, before, sealed, _ = replacing
    documents = bench.documents(sealed)
    bench.records.change_state(bench.bundle_id, BundleTaskState.STORING)
    send = partial(bench.records.record_manifest_sent, bench.bundle_id)

    def refuse(what, key):
        if moment == "manifest refused" and (what, key) == ("put", MANIFEST):
            raise AccessDenied("Policy expired.")

    bench.buckets.before = refuse
    with bench.monitor() as monitor, suppress(AccessDenied):
        if moment != "parts":
            bench.store().put_side_file(documents, monitor)
        if moment.startswith("manifest"):
            bench.store(existing="replace").put_manifest(documents, monitor, send)
    if moment == "manifest damaged":  # the store keeps other bytes than those it received
        bench.buckets.put(BUCKET, MANIFEST, documents["manifest"].encode()[:-9])
    bench.buckets.before = lambda _what, _key: None
    bench.store().remove_objects()
    assert contents(bench) == before
    assert bench.journal.objects() == []


def test_object_cleanup_undoes_failed_replacement(replacing):
    """The store did not respond when the task failed; the manifest was stored later."""
    bench, before, sealed, _ = replacing
    bench.finish(sealed, existing="replace")
    failed(bench)
    ObjectCleanup(bench.records, bench.buckets, "localhost", stall_timeout=60.0).run_once()
    assert contents(bench) == before
    assert not bench.records.has_orphans(bench.bundle_id)


def test_failed_replacement_keeps_manifest_of_another_user(replacing, small, make_bench, buckets):
    bench, _, sealed, _ = replacing
    bench.finish(sealed, existing="replace")
    failed(bench)
    third = make_bench(buckets, bundle_id="bun-00000003")
    sealed_bundle(third, small, existing="replace")
    manifest = buckets.get(BUCKET, MANIFEST)
    ObjectCleanup(bench.records, bench.buckets, "localhost", stall_timeout=60.0).run_once()
    assert buckets.get(BUCKET, MANIFEST) == manifest
    assert all(buckets.head(BUCKET, key) for key in BundleLocation(BUCKET, "", PREFIX).part_keys(manifest))


def test_remaining_parts_of_replaced_bundle_are_removed_later(replacing):
    bench, before, sealed, _ = replacing
    bench.finish(sealed, existing="replace")
    bench.buckets.before = refuse_deletion
    with pytest.raises(AccessDenied):
        bench.store().remove_earlier()
    assert bench.records.complete(bench.bundle_id)
    (seen,) = TaskQueries(bench.engine, bench.records).of([bench.bundle_id])
    assert {*before} - {MANIFEST} <= {*seen.orphaned_keys}
    bench.buckets.before = lambda _what, _key: None
    ObjectCleanup(bench.records, bench.buckets, "localhost", stall_timeout=60.0).run_once()
    assert {*bench.stored_keys()} & ({*before} - {MANIFEST}) == set()
    assert not bench.records.has_orphans(bench.bundle_id)


def test_bundle_restored_by_hand_is_not_removed(replacing):
    """The parts had to be removed; before that, the owner has copied the bundle to the location again."""
    bench, before, sealed, _ = replacing
    bench.finish(sealed, existing="replace")
    for key, data in before.items():
        bench.buckets.put(BUCKET, key, data)
    bench.store().remove_earlier()
    assert contents(bench).items() >= before.items()


def test_hostile_manifest_cannot_cause_removal_of_other_objects(small, buckets, bench, make_bench):
    """The manifest names files of other bundles; they stay when the bundle is replaced."""
    others = ["other.part.0", f"{PREFIX}2.part.0", f"{PREFIX}.part.0x", "../escape", f"{PREFIX}.parts"]
    sealed = sealed_bundle(bench, small)
    manifest = manifest_of(replace(sealed, parts=tuple(
        replace(sealed.parts[0], index=index, filename=name) for index, name in enumerate([*others[:3], *others[4:]])
    )))  # fmt: skip
    assert BundleLocation(BUCKET, "", PREFIX).part_keys(manifest) == ()
    assert BundleLocation(BUCKET, "", PREFIX).part_keys(b"<manifest>") == ()


def test_cancel_rejects_task_whose_manifest_may_be_sent(replacing):
    bench, _, sealed, _ = replacing
    bench.finish(sealed, existing="replace")
    assert not bench.records.cancel(bench.bundle_id)
    assert bench.records.complete(bench.bundle_id)


@pytest.mark.parametrize("damage", ["missing", "shorter", "other bytes"])
def test_verify_stored_finds_damaged_part(disk, buckets, bench, damage):
    """The directory store keeps no MD5, so each part is read back."""
    sealed = bench.seal(RawVolume(disk))
    documents = bench.documents(sealed)
    for each in (sealed.parts[0], sealed.parts[5], sealed.parts[-1]):
        data = bytearray(buckets.get(BUCKET, each.filename))
        if damage == "missing":
            buckets.delete(BUCKET, [each.filename])
        else:
            changed = data[:-1] if damage == "shorter" else data[:-1] + bytes([data[-1] ^ 1])
            buckets.put(BUCKET, each.filename, bytes(changed))
        with pytest.raises(TaskFailure, match=re.escape(each.filename)), bench.monitor() as monitor:
            bench.store().verify_stored(documents, monitor)
        buckets.put(BUCKET, each.filename, bytes(data))
    with bench.monitor() as monitor:
        bench.store().verify_stored(documents, monitor)


def test_verify_stored_checks_part_without_record(small, buckets, bench):
    sealed = bench.seal(RawVolume(small))
    documents = bench.documents(sealed)
    bench.journal.end_deletion([item.key for item in bench.journal.objects()])
    buckets.delete(BUCKET, [sealed.parts[0].filename])
    with pytest.raises(TaskFailure, match="has lost"), bench.monitor() as monitor:
        bench.store().verify_stored(documents, monitor)


def test_object_with_late_abandoned_upload_stays_recorded(small, buckets, bench, run_in_thread, stall_clock):
    """The object is stored after its removal."""
    buckets.block("put", part_of_small := ".part.0")
    sealing = run_in_thread(bench.seal, RawVolume(small), stall_timeout=1.0)
    eventually(lambda: buckets.started, "the upload starts")
    stall_clock.run()
    with pytest.raises(TaskFailure, match=r"Server\.NoProgress"):
        sealing.result(120)
    bench.store().remove_objects()
    assert [item.key for item in bench.journal.objects()] == [PREFIX + part_of_small]
    buckets.release_all()
    buckets.wait_for(lambda: len(buckets.ended) == 1)
    eventually(lambda: bench.stored_keys() == [PREFIX + part_of_small])
    failed(bench)
    assert bench.records.has_orphans(bench.bundle_id)
    looking = ObjectCleanup(bench.records, buckets, "localhost", stall_timeout=60.0)
    eventually(lambda: looking.run_once() or not bench.records.has_orphans(bench.bundle_id))
    assert bench.stored_keys() == []


def refuse_deletion(what, _key):
    if what == "delete":
        raise AccessDenied("Access Denied")


@pytest.mark.s3
def test_verify_stored_finds_other_part_of_same_size_by_etag(disk, make_bench, seaweedfs):
    buckets = owners(seaweedfs).of(OWNER)
    buckets.create(BUCKET, OWNER)
    bench = make_bench(BlockingStore(buckets))
    sealed = bench.seal(RawVolume(disk))
    assert [item.etag for item in bench.journal.objects()] == [
        buckets.head(BUCKET, key).etag for key in bench.stored_keys()
    ]
    documents = bench.documents(sealed)
    with bench.monitor() as monitor:
        bench.store().verify_stored(documents, monitor)
    buckets.put(BUCKET, sealed.parts[4].filename, bytes(PART_SIZE))
    with (
        pytest.raises(TaskFailure, match=rf"a different object now as '{PREFIX}{part(4)}'"),
        bench.monitor() as monitor,
    ):
        bench.store().verify_stored(documents, monitor)
    bench.store().remove_objects()
    assert bench.stored_keys() == []


def test_journal_is_the_same_on_every_database(disk, buckets, make_bench, database):
    bench = make_bench(buckets, **database)
    first = bench.seal(RawVolume(disk))
    left = bench.journal.resume_state()
    assert (left.first_part, [*left.sent]) == (PARTS - 1, [PARTS - 1])
    assert bench.seal(RawVolume(disk)).parts == first.parts
    assert len(buckets.started) == PARTS
    bench.store().remove_objects()
    assert (bench.journal.resume_state(), bench.journal.objects(), bench.stored_keys()) == (None, [], [])
