"""One owner for each object: no deletion and no late request of one task reaches the bundle of another one."""

import random
import threading
from contextlib import ExitStack, closing, suppress
from datetime import timedelta

import pytest
import sqlalchemy as sa

from support.eventually import eventually
from support.service.upload_bench import BUCKET, MANIFEST, PREFIX, UploadBench
from thrave.buckets.errors import AccessDenied, TransientError
from thrave.concurrency import utc_now
from thrave.database import bundle_part, bundle_task
from thrave.tasks import claims
from thrave.tasks.bundle_location import BundleLocation
from thrave.tasks.claims import ObjectInUseError
from thrave.tasks.errors import TaskCancelled, TaskFailure
from thrave.tasks.housekeeping import ObjectCleanup
from thrave.tasks.lease import LeaseExpiredError, RightLostError
from thrave.tasks.queries import TaskQueries
from thrave.volumes.raw import RawVolume

A, B = "bun-0000000a", "bun-0000000b"
KEY = f"{PREFIX}.part.0"


@pytest.fixture
def make_bench(tmp_path, buckets, database):
    """Return a function that creates a bench; all benches of a test have the same bucket, prefix and database."""
    with ExitStack() as stack:
        yield lambda bundle_id: stack.enter_context(
            closing(UploadBench(tmp_path, buckets, bundle_id=bundle_id, **database))
        )


@pytest.fixture
def on_sqlite(tmp_path, buckets):
    """As `make_bench`, on SQLite only, for tests that do not depend on the database."""
    with ExitStack() as stack:
        yield lambda bundle_id: stack.enter_context(closing(UploadBench(tmp_path, buckets, bundle_id=bundle_id)))


def volume(folder, seed):
    path = folder / f"{seed}.raw"
    path.write_bytes(random.Random(seed).randbytes(1 << 16))
    return RawVolume(path)


def bundled(bench, folder):
    """Upload the bundle of a task, with its manifest."""
    bench.finish(bench.seal(volume(folder, bench.bundle_id), existing="replace"), existing="replace")


def fail(bench):
    bench.records.fail(bench.bundle_id, TaskCancelled())


def complete(bench):
    bench.store().remove_earlier()
    assert bench.records.complete(bench.bundle_id)


def clean_up(bench, **options):
    ObjectCleanup(bench.records, bench.buckets, "localhost", **{"stall_timeout": 60.0, **options}).run_once()


def rows(bench):
    """Return the recorded owner and state of each object."""
    columns = bundle_part.c.key, bundle_part.c.bundle_id, bundle_part.c.state
    with bench.engine.connect() as connection:
        return {key: (owner, state) for key, owner, state in connection.execute(sa.select(*columns))}


def change(bench, **values):
    with bench.engine.begin() as connection:
        connection.execute(bundle_part.update().values(**values))


def let_time_pass(bench):
    """Set all settle times to an hour ago."""
    settled = bundle_part.update().where(bundle_part.c.settle_time.is_not(None))
    with bench.engine.begin() as connection:
        connection.execute(settled.values(settle_time=utc_now() - timedelta(hours=1)))


def is_whole(bench):
    """Whether the bucket has the manifest of a task, and every part that it names."""
    manifest = bench.buckets.get(BUCKET, MANIFEST)
    mine = {key for key, (owner, _) in rows(bench).items() if owner == bench.bundle_id}
    parts = BundleLocation(BUCKET, "", PREFIX).part_keys(manifest)
    return bool(parts) and {*parts, MANIFEST} <= mine and {*parts} <= {*bench.stored_keys()}


# The owner and the content of a row, and the result of a claim by another task.
@pytest.mark.parametrize(
    ("owner", "sender", "settles", "seconds"),
    [
        ("unfinished", None, None, None),
        ("unfinished", "other", None, None),
        ("failed", None, None, "free"),
        ("complete", None, None, "free"),
        ("failed", "other", None, 0.0),
        ("complete", "other", None, 0.0),
        ("failed", None, -1.0, "free"),
        ("complete", None, 3600.0, 3600.0),
        ("failed", None, 3600.0, 3600.0),
    ],
)
def test_claim_of_key_recorded_by_another_task(make_bench, owner, sender, settles, seconds):
    first = make_bench(A)
    first.journal.record_upload(KEY)
    if owner != "unfinished":
        fail(first)
    with first.engine.begin() as connection:  # the prefix is free for another task
        connection.execute(bundle_task.update().values(prefix="other"))
        if owner == "complete":
            connection.execute(bundle_task.update().values(state="complete"))
    change(first, sender=sender, settle_time=settles and utc_now() + timedelta(seconds=settles), state="sent")
    second = make_bench(B)
    if seconds == "free":
        second.journal.check_free(KEY)
        second.journal.record_upload(KEY)
        assert rows(second) == {KEY: (B, "sent")}
        assert first.journal.objects() == []
        return
    for claim in (second.journal.check_free, second.journal.record_upload):
        with pytest.raises(ObjectInUseError) as caught:
            claim(KEY)
        assert caught.value.seconds == (seconds and pytest.approx(seconds, abs=120))
    assert rows(second) == {KEY: (A, "sent")}


def test_claim_by_two_processes_at_once(make_bench, run_in_thread):
    first = make_bench(A)
    fail(first)
    second = make_bench(B)
    with first.engine.begin() as connection:  # both unfinished, at different locations
        connection.execute(
            bundle_task.update().where(bundle_task.c.bundle_id == A).values(prefix="x", state="bundling")
        )
    at_once = threading.Barrier(2)

    def claim(bench):
        at_once.wait(60)
        try:
            bench.journal.record_upload(KEY)
        except ObjectInUseError:
            return False
        return True

    outcomes = {bench.bundle_id: run_in_thread(claim, bench) for bench in (first, second)}
    winners = [bundle_id for bundle_id, outcome in outcomes.items() if outcome.result(60)]
    assert [owner for owner, _ in rows(first).values()] == winners
    assert len(winners) == 1


def test_claim_rejects_ended_task(make_bench):
    bench = make_bench(A)
    fail(bench)
    with pytest.raises(RightLostError):
        bench.journal.record_upload(KEY)
    assert rows(bench) == {}


def test_claim_again_keeps_other_parts_stored(make_bench):
    bench = make_bench(A)
    for _ in range(2):
        bench.journal.record_upload(KEY)
    bench.journal.record_upload(f"{KEY}1")
    assert [item.size for item in bench.journal.objects()] == [None, None]
    assert {state for _, state in rows(bench).values()} == {"sent"}


@pytest.mark.parametrize("moment", ["before the parts", "before the manifest", "once complete"])
def test_deletion_in_progress_when_next_task_starts(on_sqlite, buckets, tmp_path, run_in_thread, moment):
    """The cleanup of a failed task has sent a deletion; the store carries it out after the next task has started."""
    first = on_sqlite(A)
    bundled(first, tmp_path)
    fail(first)
    second = on_sqlite(B)
    if moment != "before the parts":
        sealed = second.seal(volume(tmp_path, B), existing="replace")
    if moment == "once complete":
        second.finish(sealed, existing="replace")
        complete(second)
    asked = threading.Event()
    buckets.before = lambda what, _key: what == "delete" and asked.set()
    buckets.block("delete")
    cleaning = run_in_thread(clean_up, first)
    assert moment == "once complete" or asked.wait(60)
    if moment == "before the parts":
        following = run_in_thread(bundled, second, tmp_path)
    elif moment == "before the manifest":
        following = run_in_thread(second.finish, sealed, existing="replace")
    if moment != "once complete":
        eventually(lambda: following.done() or second.records.history(B))
        assert rows(second)[MANIFEST][0] == A  # the next task waits
        assert not following.done()
    buckets.release_all()
    cleaning.result(60)
    if moment != "once complete":
        following.result(60)
        complete(second)
    clean_up(first)
    assert is_whole(second)
    assert {owner for owner, _ in rows(second).values()} == {B}
    assert {*second.stored_keys()} == {*rows(second)}


def test_claim_between_deletion_claim_and_first_request(on_sqlite):
    """The same within one process, whose list of requests is still empty."""
    first = on_sqlite(A)
    first.journal.record_upload(MANIFEST)
    fail(first)
    assert [*first.journal.start_deletion()] == [MANIFEST]
    second = on_sqlite(B)
    with pytest.raises(ObjectInUseError, match="may be in flight"):
        second.journal.record_upload(MANIFEST)
    first.journal.end_deletion([])  # the store has refused the deletion
    second.journal.record_upload(MANIFEST)
    assert rows(second) == {MANIFEST: (B, "sent")}


def test_task_fails_with_message_if_earlier_deletion_does_not_end(on_sqlite, buckets, tmp_path):
    first = on_sqlite(A)
    bundled(first, tmp_path)
    fail(first)
    buckets.block("delete")
    deletions = []
    buckets.before = lambda what, _key: deletions.append(what) if what == "delete" else None
    eventually(lambda: clean_up(first, stall_timeout=0.2) or deletions, "the deletion begins")
    second = on_sqlite(B)
    store = second.store(existing="replace", stall_timeout=0.2)
    words = r"Client\.PrefixInUse: The object .* cannot be written: a request of an earlier bundle task"
    with pytest.raises(TaskFailure, match=words), second.monitor() as monitor:
        store.check_location(monitor)
    assert buckets.get(BUCKET, MANIFEST)


@pytest.mark.parametrize("late", ["before the removal", "after the removal", "never"])
@pytest.mark.parametrize("key", [KEY, MANIFEST])
def test_late_upload_of_earlier_run(on_sqlite, buckets, key, late):
    """The run was killed. Its objects are deleted now, and again when no late request can arrive any more."""
    bench = on_sqlite(A)  # the host that adopts it
    bench.journal.record_upload(key)
    change(bench, sender="other")
    with bench.engine.begin() as connection:  # recorded before the manifest is claimed
        connection.execute(bundle_task.update().values(manifest_sent=key == MANIFEST))
    if late == "before the removal":
        buckets.put(BUCKET, key, b"late")
    bench.store().remove_objects()
    fail(bench)
    assert bench.stored_keys() == []
    if late == "after the removal":
        buckets.put(BUCKET, key, b"late")
    assert rows(bench) == {key: (A, "gone")}
    assert not bench.records.has_orphans(A)
    (seen,) = TaskQueries(bench.engine, bench.records).of([A])
    assert (seen.stored.objects, [*seen.orphaned_keys]) == (0, [])
    assert bench.records.delete_ended(-timedelta(days=1), limit=9) == 0
    clean_up(bench)  # too early
    assert rows(bench) == {key: (A, "gone")}
    let_time_pass(bench)
    clean_up(bench)
    assert (rows(bench), bench.stored_keys()) == ({}, [])
    assert bench.records.delete_ended(-timedelta(days=1), limit=9) == 1


@pytest.mark.parametrize("kind", ["the same sealing", "another sealing"])
def test_unconfirmed_upload_of_earlier_run(on_sqlite, buckets, tmp_path, kind):
    """The task resumes: it sends the same bytes under the same names, or other bytes under other names."""
    earlier = on_sqlite(A)
    sealed = earlier.seal(volume(tmp_path, A))
    (key,) = (part.filename for part in sealed.parts)
    change(earlier, sender="other", size=None)  # killed before the response was recorded
    bench = on_sqlite(A)
    sealed = bench.seal(volume(tmp_path, A if kind == "the same sealing" else B))
    bench.finish(sealed)
    complete(bench)
    buckets.put(BUCKET, key, b"late") if kind == "another sealing" else None
    assert (key in {part.filename for part in sealed.parts}) == (kind == "the same sealing")
    assert is_whole(bench)
    let_time_pass(bench)
    clean_up(bench)
    assert is_whole(bench)
    assert {*bench.stored_keys()} == {*rows(bench)}


@pytest.mark.parametrize("answer", [TransientError("NoResponse", 0, "Nothing moved"), TransientError("", 504, "")])
def test_deletion_without_response_may_arrive_later(on_sqlite, buckets, tmp_path, answer):
    """The second attempt has succeeded. The first may be carried out at any time, so the manifest's key is not free."""
    bench = on_sqlite(A)
    bundled(bench, tmp_path)
    attempts = []

    def lose_the_first(what, _key):
        attempts.append(what)
        if attempts.count("delete") == 1 and what == "delete":
            raise answer

    buckets.before = lose_the_first
    bench.store(retry_timeout=60.0).remove_objects()
    fail(bench)
    assert bench.stored_keys() == []
    assert rows(bench)[MANIFEST] == (A, "gone")
    second = on_sqlite(B)
    with pytest.raises(ObjectInUseError, match="may arrive until") as caught:
        second.journal.check_free(MANIFEST)
    assert caught.value.seconds > 0
    let_time_pass(bench)
    second.journal.check_free(MANIFEST)


class NotRecordedError(Exception):
    pass


@pytest.mark.parametrize(("key", "moment"), [(MANIFEST, "proof"), (MANIFEST, "record"), (KEY, "record")])
def test_upload_without_response_is_kept_until_recorded(on_sqlite, buckets, tmp_path, monkeypatch, key, moment):
    """The second attempt has succeeded, but the task fails before this is recorded. The first may still arrive."""
    bench = on_sqlite(A)
    attempts = []

    def lose_the_first(what, of):
        if of != key:
            return
        attempts.append(what)
        if what == "put" and attempts.count("put") == 1:
            raise TransientError("GatewayTimeout", 504, "held by a proxy")
        if what == "head" and "put" in attempts and moment == "proof":
            raise AccessDenied("no")

    def delay(connection, bundle_id, keys):
        real_delay(connection, bundle_id, keys)
        if keys and moment == "record":
            raise NotRecordedError

    real_delay = claims.delay
    buckets.before = lose_the_first
    monkeypatch.setattr(claims, "delay", delay)
    with pytest.raises((NotRecordedError, AccessDenied)):
        bench.finish(bench.seal(volume(tmp_path, A), retry_timeout=60.0), retry_timeout=60.0)
    monkeypatch.setattr(claims, "delay", real_delay)
    buckets.before = lambda *_: None
    assert attempts.count("put") == 2
    bench.store().remove_objects()
    fail(bench)
    assert bench.stored_keys() == []
    assert rows(bench) == {key: (A, "gone")}
    second = on_sqlite(B)
    with pytest.raises(ObjectInUseError, match="may arrive until"):
        second.journal.check_free(key)
    buckets.put(BUCKET, key, b"late")
    let_time_pass(bench)
    clean_up(bench)
    assert (rows(bench), bench.stored_keys()) == ({}, [])
    second.journal.check_free(key)


@pytest.mark.parametrize("reason", ["its deletion hangs", "its upload was late"])
@pytest.mark.parametrize("removes", ["the task", "the agent"])
def test_own_manifest_does_not_keep_parts_of_failed_task(on_sqlite, buckets, tmp_path, reason, removes):
    """No record of an object is deleted while the object is in the bucket."""
    bench = on_sqlite(A)
    bundled(bench, tmp_path)
    objects = {*bench.stored_keys()}
    if removes == "the agent":
        fail(bench)

    def remove(**options):
        with suppress(TaskFailure):
            clean_up(bench, **options) if removes == "the agent" else bench.store(**options).remove_objects()

    if reason == "its deletion hangs":
        buckets.block("delete")
        for _ in range(2):
            remove(stall_timeout=0.3)
            assert {*rows(bench)} == objects
        buckets.release_all()
    else:
        later = utc_now() + timedelta(hours=1)
        with bench.engine.begin() as connection:  # as after a deletion of the manifest alone
            manifest = bundle_part.update().where(bundle_part.c.key == MANIFEST)
            connection.execute(manifest.values(state="gone", settle_time=later))
        remove()
        assert bench.stored_keys() == [MANIFEST]
    if removes == "the task":
        fail(bench)

    def is_clean():
        let_time_pass(bench)
        clean_up(bench)
        return rows(bench) == {}

    assert eventually(is_clean)
    assert bench.stored_keys() == []


@pytest.mark.parametrize("arrives", [True, False])
def test_failed_replacement_keeps_its_parts_while_its_manifest_may_arrive(on_sqlite, buckets, tmp_path, arrives):
    """Without the parts, a late manifest would replace a bundle that can be opened by one that cannot."""
    first = on_sqlite(A)
    bundled(first, tmp_path)
    complete(first)
    second = on_sqlite(B)
    earlier = {key: buckets.get(BUCKET, key) for key in first.stored_keys()}

    def lose_manifest(what, key):
        if (what, key) == ("put", MANIFEST):
            raise TransientError("NoResponse", 0, "held by a proxy")

    buckets.before = lose_manifest
    with pytest.raises(TransientError, match="held by a proxy"):
        bundled(second, tmp_path)
    buckets.before = lambda *_: None
    manifest = second.journal.documents()["manifest"].encode()
    second.store().remove_objects()
    fail(second)
    if arrives:
        buckets.put(BUCKET, MANIFEST, manifest)
    clean_up(second)  # too early
    assert {*BundleLocation(BUCKET, "", PREFIX).part_keys(manifest)} <= {*second.stored_keys()}
    let_time_pass(second)
    clean_up(second)
    assert {key: buckets.get(BUCKET, key) for key in second.stored_keys()} == earlier
    assert {*rows(second).values()} == {(A, "sent")}


def test_abandoned_deletion_stops_retrying(on_sqlite, buckets, tmp_path):
    bench = on_sqlite(A)
    bundled(bench, tmp_path)

    def fail_deletion(what, _key):
        if what == "delete":
            raise TransientError("SlowDown", 503, "Please reduce your request rate.")

    buckets.before = fail_deletion
    with pytest.raises(TaskFailure, match=r"Server\.NoProgress"):
        bench.store(retry_timeout=600.0, stall_timeout=0.2).remove_objects()
    before = {*bench.stored_keys()}
    buckets.before = lambda _what, _key: None
    eventually(lambda: not [each for each in threading.enumerate() if each.name == "store-call"])
    assert {*bench.stored_keys()} == before


def test_deletion_needs_the_lease(on_sqlite, buckets, tmp_path):
    bench = on_sqlite(A)
    bundled(bench, tmp_path)
    before = bench.stored_keys()

    def refuse():
        raise LeaseExpiredError

    with pytest.raises(LeaseExpiredError):
        bench.store(before_attempt=refuse).remove_objects()
    fail(bench)
    with pytest.raises(LeaseExpiredError):
        clean_up(bench, before_attempt=refuse)
    assert bench.stored_keys() == before


@pytest.mark.parametrize("settles", [False, True])
def test_replacement_deletes_earlier_bundle_of_resumed_task(on_sqlite, tmp_path, settles):
    """A late request of a killed run may store a part again: that part is deleted twice."""
    first = on_sqlite(A)
    bundled(first, tmp_path)
    complete(first)
    earlier = {*first.stored_keys()} - {MANIFEST}
    if settles:
        with first.engine.begin() as connection:
            parts = bundle_part.update().where(bundle_part.c.key.in_(earlier))
            connection.execute(parts.values(settle_time=utc_now() + timedelta(hours=1)))
    second = on_sqlite(B)
    bundled(second, tmp_path)
    complete(second)
    assert not earlier & {*second.stored_keys()}
    assert is_whole(second)
    assert {key: rows(second).get(key) for key in earlier} == dict.fromkeys(earlier, (B, "gone") if settles else None)
    let_time_pass(second)
    clean_up(second)
    assert {*rows(second)} == {*second.stored_keys()}
    assert second.journal.earlier() is None


def test_retention_of_later_task_does_not_release_keys_to_earlier_cleanup(make_bench, buckets, tmp_path):
    """The objects of the first task cannot be deleted until after the end of the retention."""
    first = make_bench(A)
    bundled(first, tmp_path)
    fail(first)

    def refuse(what, _key):
        if what == "delete":
            raise AccessDenied("object lock")

    buckets.before = refuse
    clean_up(first)
    second = make_bench(B)
    bundled(second, tmp_path)
    assert second.records.complete(B)
    second.journal.record_earlier(None)  # the first bundle's parts are removed otherwise
    with second.engine.begin() as connection:
        connection.execute(bundle_part.delete().where(bundle_part.c.bundle_id == B, bundle_part.c.state != "sent"))
    kept = {key for key, (owner, _) in rows(second).items() if owner == B}
    assert MANIFEST in kept
    assert second.records.delete_ended(-timedelta(days=8), limit=9) == 1
    assert {owner for owner, _ in rows(second).values()} <= {A}
    buckets.before = lambda _what, _key: None
    clean_up(first)
    assert kept <= {*second.stored_keys()}
    assert second.records.get(B) is None


def test_cleanup_of_one_task_does_not_wait_for_another(on_sqlite, buckets):
    first = on_sqlite(A)
    first.journal.record_upload(KEY)
    fail(first)
    second = on_sqlite(B)
    second.journal.record_upload(f"{KEY}1")
    fail(second)

    def break_first(what, key):
        if what == "head" and key == KEY:
            raise OSError("broken")

    buckets.before = break_first
    clean_up(first)
    assert first.records.has_orphans(A)
    assert not first.records.has_orphans(B)


def test_cleanup_does_not_read_every_task(on_sqlite):
    """The query runs every few seconds, so its cost must not grow with the number of ended tasks."""
    bench = on_sqlite(A)
    bench.journal.record_upload(KEY)
    fail(bench)
    queries = []
    sa.event.listen(bench.engine, "before_cursor_execute", lambda *args: queries.append((args[2], args[3])))
    assert [task.bundle_id for task in bench.records.cleanups("localhost")] == [A]
    with bench.engine.connect() as connection:
        for text, parameters in [*queries]:
            plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", parameters)]
            scans = [line for line in plan if line.startswith("SCAN")]
            assert all("bundle_part_to_be_deleted" in line or "bundle_task_replaces" in line for line in scans), plan


def test_cleanup_logs_command_if_store_refuses(on_sqlite, buckets, capsys):
    bench = on_sqlite(A)
    buckets.put(BUCKET, KEY, b"part")
    bench.journal.record_upload(KEY)
    fail(bench)

    def refuse(what, _key):
        if what == "delete":
            raise AccessDenied("Access Denied")

    buckets.before = refuse
    looking = ObjectCleanup(bench.records, bench.buckets, "localhost", stall_timeout=60.0)
    for _ in range(3):
        looking.run_once()
    assert capsys.readouterr().out.count(f"thrave task show {A}") == 1
    (seen,) = TaskQueries(bench.engine, bench.records).of([A])
    assert [*seen.orphaned_keys] == [KEY]
