"""Faults that Thrave once had, as patches: the simulation has to find each of them.

The names are those of the review that found them. Some faults have two halves today, since a second check was added
with the repair of the first; then the patch takes out both.
"""

from contextlib import suppress
from functools import partial

import sqlalchemy as sa

from thrave.compute import power_records
from thrave.compute.power_records import WantedPower
from thrave.database import instance_power
from thrave.tasks import claims, lease, workflow
from thrave.tasks.errors import TaskFailure
from thrave.tasks.instance_power import InstancePower
from thrave.tasks.models import UNDO_STEPS, Step
from thrave.tasks.store_calls import CallGroup
from thrave.tasks.task_objects import TaskObjects


def interrupted_undo_completes(patch, _world):
    """T1: a failure is not recorded before it is undone, so a run after a crash goes forward again."""

    def roll_back(self, failure):
        for step in UNDO_STEPS:
            if step is not Step.FAIL:
                with suppress(TaskFailure):
                    self._run_step(step)
        self._retry(lambda: self._repository.fail(self._task.bundle_id, failure))

    patch(workflow.BundleWorkflow, "roll_back", roll_back)
    _verify_only_what_is_recorded(patch)


def verification_loses_its_last_failure(patch, _world):
    """T2: a call that failed does not count as pending, and nothing else reports it."""
    _lose_failures(patch, "_verify_object")


def last_upload_failure_is_lost(patch, _world):
    """T3: the same for uploads; only parts that are recorded as stored are verified."""
    _lose_failures(patch, "_upload")
    _verify_only_what_is_recorded(patch)


def cleanup_deletes_the_next_bundle(patch, _world):
    """T5: a key has no owner: a task reuses the names of an earlier one, whose deletion may be in flight."""

    def can_take_over(connection, _bundle_id, bucket, key, *, sender, busy):
        query = sa.select(claims.bundle_part).where(
            claims.bundle_part.c.bucket == bucket, claims.bundle_part.c.key == key
        )
        return connection.execute(query).first() is not None

    patch(claims, "_can_take_over", can_take_over)

    def has_no_bundle(self, monitor):
        return self._call(partial(_head, self._bucket, self._location.manifest_key), monitor) is None

    patch(TaskObjects, "can_use_plain_names", has_no_bundle)


def two_tasks_in_one_place(patch, world):
    """T9: nothing refuses a second task with the same bucket and prefix, and keys have no owner."""
    for (name,) in world.database.rows("SELECT name FROM sqlite_master WHERE type = 'index' AND sql LIKE '%prefix%'"):
        world.database.rows(f"DROP INDEX {name}")
    world.invariants.allows_two_in_one_place = True
    cleanup_deletes_the_next_bundle(patch, world)


def failed_start_fails_the_task(patch, _world):
    """T12: an error of the hypervisor at the start of the instance undoes a bundle whose parts are all stored."""
    warnings = {step: text for step, text in workflow._STEP_WARNINGS.items() if step is not Step.START}
    patch(workflow, "_STEP_WARNINGS", warnings)


def bundle_forgets_a_pending_start(patch, _world):
    """T20: a task records the state that it sees, although its owner has asked for another one."""

    def borrow(connection, instance_id, bundle_id, *, running, version=None):
        power_records._lock_row(connection, instance_id)
        mine = instance_power.update().where(instance_power.c.instance_id == instance_id)
        wanted = WantedPower.RUNNING if running else WantedPower.STOPPED
        connection.execute(mine.values(wanted=wanted, borrowed_by=bundle_id, request=None))
        return running

    patch(power_records, "borrow", borrow)


def cancellation_starts_a_stopped_instance(patch, _world):
    """T26: the undo of a task starts the instance whatever its owner has asked for since."""
    restore = InstancePower._restore

    def start_if_it_ran(self, record):
        task = self._records.get(self._task.bundle_id)
        if task.run_after_task and task.error_code is not None:
            self._instances.start(self._task.instance_id)
            self._records.give_back(self._task.bundle_id)
        else:
            restore(self, record)

    patch(InstancePower, "_restore", start_if_it_ran)


def lost_lease_is_not_noticed(patch, _world):
    """F1: a process without a connection to the database goes on although another host may have its tasks."""
    patch(lease.LeaseTimer, "is_valid", lambda self, seconds=0.0: True)


def new_bundle_removes_the_earlier_manifest_first(patch, _world):
    """The manifest of the earlier bundle, with the only copy of its key, is removed before anything is read."""
    check_location = TaskObjects.check_location

    def remove_manifest(self, monitor):
        check_location(self, monitor)
        self._buckets.delete(self._bucket, [self._location.manifest_key])

    patch(TaskObjects, "check_location", remove_manifest)


FAULTS = {
    "T1": interrupted_undo_completes,
    "T2": verification_loses_its_last_failure,
    "T3": last_upload_failure_is_lost,
    "T5": cleanup_deletes_the_next_bundle,
    "T9": two_tasks_in_one_place,
    "T12": failed_start_fails_the_task,
    "T20": bundle_forgets_a_pending_start,
    "T26": cancellation_starts_a_stopped_instance,
    "F1": lost_lease_is_not_noticed,
    "manifest": new_bundle_removes_the_earlier_manifest_first,
}


def _lose_failures(patch, of):
    """Have groups of calls of the method `of` not count a failed call as pending, and end without its error."""
    start, pending, leave = CallGroup.start, CallGroup.pending, CallGroup.__exit__

    def start_marked(self, call):
        self.loses_failures = getattr(getattr(call, "func", None), "__name__", "") == of
        start(self, call)

    def loses_failures(self):
        return getattr(self, "loses_failures", False)

    def pending_without_failures(self):
        if not loses_failures(self):
            return pending.fget(self)
        with self._changed:
            return self._running + len(self._results)

    def leave_without_check(self, kind, error, trace):
        if loses_failures(self) and error is None:
            self._failures.clear()
        leave(self, kind, error, trace)

    patch(CallGroup, "start", start_marked)
    patch(CallGroup, "pending", property(pending_without_failures))
    patch(CallGroup, "__exit__", leave_without_check)


def _head(bucket, key, buckets):
    return buckets.head(bucket, key)


def _verify_only_what_is_recorded(patch):
    def verify(self, documents, monitor):
        deleted = self._journal.orphaned_objects()  # an undo had no record of these
        for stored in self._journal.objects():
            head = partial(_head, self._bucket, stored.key)
            if stored.size and stored not in deleted and self._call(head, monitor) is None:
                raise TaskFailure("Server.S3Error", "the bucket has lost a part")

    patch(TaskObjects, "verify_stored", verify)
